"""Rules of spelling keep every answer of onnxruntime, make ways of writing equal, and hide no change."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from fgvc.errors import FgvcError
from fgvc.exporting.canonical import canonicalise
from fgvc.exporting.rules import RULES
from fgvc.exporting.spelling import compare_spelling, respelled
from fgvc.runtime.engine import load_session

K, SIDE = 3, 8


def stored(name: str, values: object, dtype: type = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values, dtype=dtype), name)


def weights(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.5, shape).astype(np.float32)


def classifier() -> ModelProto:
    """Two branches of convolutions, a pool, a reshape by a shape that depends on the batch, a linear layer; all rules apply
    to ways of writing it."""
    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["c1"], name="stem", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Clip", ["c1", "low", "high"], ["a1"], name="relu6"),
        helper.make_node("Conv", ["a1", "w2"], ["c2"], name="left", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["a1", "w3", "b3"], ["c3"], name="right"),
        helper.make_node("Sigmoid", ["c3"], ["s3"], name="gate"),
        helper.make_node("Mul", ["c2", "s3"], ["m"], name="gated"),
        helper.make_node("Add", ["m", "a1"], ["r"], name="residual"),
        helper.make_node("MaxPool", ["r"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["p"], ["g"], name="mean"),
        helper.make_node("Reshape", ["g", "flat"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "wf", "bf"], ["scores"], name="head", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", K])],
        [
            stored("w1", weights(1, 4, 3, 3, 3)), stored("b1", weights(2, 4)), stored("low", 0.0), stored("high", 6.0),
            stored("w2", weights(3, 4, 4, 3, 3)), stored("w3", weights(4, 4, 4, 1, 1)), stored("b3", weights(5, 4)),
            stored("flat", [-1, 4], np.int64), stored("wf", weights(6, K, 4)), stored("bf", weights(7, K)),
        ],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def node(model: ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def changed(change: Callable[[ModelProto], None]) -> ModelProto:
    model = classifier()
    change(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def answers(model: ModelProto) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(2, 3, SIDE, SIDE)).astype(np.float32)
    return np.asarray(load_session(model.SerializeToString(), threads=1).run(None, {"image": x})[0])


def rules_between(candidate: ModelProto, reference: ModelProto) -> dict[str, tuple[int, int]] | None:
    """The rules that make two models equal; None where they are different."""
    spelling = compare_spelling(candidate, reference)
    return None if spelling.verdict == "different" else dict(spelling.rules)


# --- ways of writing the same ----------------------------------------------------------------------------------------------


def write_defaults(model: ModelProto) -> None:
    node(model, "stem").attribute.extend(
        [
            helper.make_attribute("dilations", [1, 1]),
            helper.make_attribute("group", 1),
            helper.make_attribute("kernel_shape", [3, 3]),
            helper.make_attribute("auto_pad", "NOTSET"),
        ]
    )
    node(model, "pool").attribute.extend(
        [helper.make_attribute("dilations", [1, 1]), helper.make_attribute("ceil_mode", 0)]
    )
    node(model, "pool").attribute.append(helper.make_attribute("pads", [0, 0, 0, 0]))
    node(model, "head").attribute.append(helper.make_attribute("alpha", 1.0))


def swap_inputs(model: ModelProto) -> None:
    for name in ("gated", "residual"):
        node(model, name).input[:] = list(node(model, name).input)[::-1]


def write_constants(model: ModelProto, names: tuple[str, ...] = ("flat", "low", "wf")) -> None:
    for name in names:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        model.graph.node.insert(0, helper.make_node("Constant", [], [name], value=tensor))
        model.graph.initializer.remove(tensor)


def add_identities(model: ModelProto) -> None:
    at = list(model.graph.node).index(node(model, "gated"))
    model.graph.node.insert(at, helper.make_node("Identity", ["s3"], ["s3_again"]))
    node(model, "gated").input[1] = "s3_again"
    model.graph.node.insert(0, helper.make_node("Identity", ["b1"], ["b1_again"]))
    node(model, "stem").input[2] = "b1_again"
    node(model, "head").output[0] = "scores_inside"
    model.graph.node.append(helper.make_node("Identity", ["scores_inside"], ["scores"]))


def import_more(model: ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def compute_shapes(model: ModelProto) -> None:
    """The number of channels, from the shape of the map before the pool, as some exporters write it."""
    at = list(model.graph.node).index(node(model, "flatten"))
    model.graph.initializer.remove(next(t for t in model.graph.initializer if t.name == "flat"))
    model.graph.initializer.extend(
        [stored("one", 1, np.int64), stored("axis", [0], np.int64), stored("minus", [-1], np.int64)]
    )
    nodes = [
        helper.make_node("Shape", ["g"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["channels"], axis=0),
        helper.make_node("Unsqueeze", ["channels", "axis"], ["channels_1"]),
        helper.make_node("Concat", ["minus", "channels_1"], ["flat"], axis=0),
    ]
    for shift, new in enumerate(nodes):
        model.graph.node.insert(at + shift, new)


def compute_batch(model: ModelProto, *, swapped: bool = False) -> None:
    """The shape behind the mean, from the batch of the images and the number of channels, as torch's dynamo exporter wrote it."""
    model.graph.initializer.remove(next(t for t in model.graph.initializer if t.name == "flat"))
    model.graph.initializer.append(stored("four", [4], np.int64))
    model.graph.node.insert(0, helper.make_node("Shape", ["image"], ["batch"], start=0, end=1))
    at = list(model.graph.node).index(node(model, "flatten"))
    pieces = ["four", "batch"] if swapped else ["batch", "four"]
    model.graph.node.insert(at, helper.make_node("Concat", pieces, ["flat"], axis=0))


def repeat_constants(model: ModelProto) -> None:
    model.graph.initializer.append(stored("zero_again", 0.0))
    at = list(model.graph.node).index(node(model, "left"))
    model.graph.node.insert(at, helper.make_node("Max", ["a1", "zero_again"], ["a1_again"]))
    node(model, "left").input[0] = "a1_again"


def share_constants(model: ModelProto) -> None:
    repeat_constants(model)
    next(n for n in model.graph.node if n.op_type == "Max").input[1] = "low"
    model.graph.initializer.remove(next(t for t in model.graph.initializer if t.name == "zero_again"))


def call_a_function(model: ModelProto) -> None:
    body = [helper.make_node("Sigmoid", ["x"], ["y"])]
    model.functions.append(helper.make_function("own", "Gate", ["x"], ["y"], body, [helper.make_opsetid("", 17)]))
    model.opset_import.append(helper.make_opsetid("own", 1))
    gate = node(model, "gate")
    gate.op_type, gate.domain = "Gate", "own"


SPELLINGS: dict[str, tuple[Callable[[ModelProto], None], str]] = {
    "defaults": (write_defaults, "default attributes"),
    "swapped": (swap_inputs, "order of commutative inputs"),
    "constants": (write_constants, "Constant nodes"),
    "identities": (add_identities, "Identity nodes"),
    "imports": (import_more, "unused operator sets"),
    "shapes": (compute_shapes, "shape arithmetic"),
    "batch": (compute_batch, "shape arithmetic"),
    "function": (call_a_function, "the file's own functions"),
}


def write_head(model: ModelProto) -> None:
    write_constants(model, ("wf",))


EVERYTHING = (write_defaults, add_identities, swap_inputs, compute_shapes, import_more, call_a_function, write_head)


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_way_of_writing_is_equal_and_named(name: str) -> None:
    change, rule = SPELLINGS[name]
    other, plain = changed(change), classifier()
    np.testing.assert_array_equal(answers(other), answers(plain))
    assert canonicalise(other, weights=None).sha256 != canonicalise(plain, weights=None).sha256
    differences = rules_between(other, plain)
    assert differences is not None
    assert rule in differences
    assert set(differences) <= {rule, "unused operator sets"}
    assert rules_between(plain, other) is not None


def test_constants_that_are_stored_twice_are_equal_to_one() -> None:
    twice, once = changed(repeat_constants), changed(share_constants)
    assert rules_between(twice, once) == {"equal constants": (1, 0)}
    np.testing.assert_array_equal(answers(twice), answers(once))


def test_all_ways_at_once_are_equal() -> None:
    def everything(model: ModelProto) -> None:
        for change in EVERYTHING:
            change(model)

    other = changed(everything)
    differences = rules_between(other, classifier())
    assert differences is not None
    assert len(differences) >= 5
    np.testing.assert_array_equal(answers(other), answers(classifier()))


def test_a_model_is_equal_to_itself_by_no_rule() -> None:
    assert rules_between(classifier(), classifier()) == {}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_alone_keeps_the_answers(rule: str) -> None:
    """Also where other ways of writing are there, and twice."""
    model = changed(repeat_constants)
    for change in EVERYTHING:
        change(model)
    expected = answers(model)
    assert RULES[rule](model) > 0
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_array_equal(answers(model), expected)


# --- true changes near each rule -------------------------------------------------------------------------------------------


def _attribute(name: str, key: str, value: object) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        target = node(model, name)
        kept = [a for a in target.attribute if a.name != key]
        del target.attribute[:]
        target.attribute.extend([*kept, helper.make_attribute(key, value)])

    return change


def _reads(name: str, slot: int, value: str) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        node(model, name).input[slot] = value

    return change


def _holds(name: str, values: object, dtype: type = np.float32) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        next(t for t in model.graph.initializer if t.name == name).CopyFrom(stored(name, values, dtype))

    return change


def _other_channel(model: ModelProto) -> None:
    compute_shapes(model)
    _holds("one", 2, np.int64)(model)  # height in place of channels: 1, another shape of the batch


def _identity_that_is_none(model: ModelProto) -> None:
    add_identities(model)
    next(n for n in model.graph.node if n.op_type == "Identity" and n.output[0] == "s3_again").op_type = "Abs"


def _other_function(model: ModelProto) -> None:
    call_a_function(model)
    model.functions[0].node[0].op_type = "Tanh"


@pytest.mark.parametrize(
    "change",
    [
        _attribute("left", "dilations", [2, 2]),
        _attribute("pool", "ceil_mode", 1),
        _attribute("head", "alpha", 0.5),
        _attribute("stem", "strides", [1, 1]),
        _reads("residual", 1, "c2"),
        _reads("gated", 0, "a1"),
        _holds("high", 5.0),
        _holds("low", -1.0),
        _other_channel,
        _identity_that_is_none,
        _other_function,
    ],
)
def test_a_true_change_near_a_rule_is_seen(change: Callable[[ModelProto], None]) -> None:
    other = classifier()
    change(other)
    assert rules_between(other, classifier()) is None
    other = classifier()
    write_defaults(other)
    change(other)
    assert rules_between(other, classifier()) is None


def test_a_shape_in_which_the_batch_is_another_axis_is_another() -> None:
    other = classifier()
    compute_batch(other, swapped=True)
    assert rules_between(other, classifier()) is None
    other = classifier()
    compute_batch(other)
    other.graph.node[0].attribute[0].i, other.graph.node[0].attribute[1].i = 1, 2  # the channels of the images: 3, not n
    assert rules_between(other, classifier()) is None


def test_a_batch_that_may_be_another_than_the_shapes_is_not_left_open() -> None:
    """Reshape of a map whose size is open: -1 would take its rows, too."""
    models = []
    for target in (["batch", "four"], ["minus", "four"]):
        model = classifier()
        for side in (2, 3):
            model.graph.input[0].type.tensor_type.shape.dim[side].dim_param = f"side{side}"
        node(model, "flatten").input[:] = ["p", "flat"]
        model.graph.node.remove(node(model, "mean"))
        compute_batch(model)
        model.graph.initializer.append(stored("minus", [-1], np.int64))
        next(n for n in model.graph.node if n.op_type == "Concat").input[:] = target
        models.append(model)
    assert rules_between(*models) is None


def test_inputs_of_what_does_not_commute_are_not_swapped() -> None:
    def subtract(model: ModelProto) -> None:
        node(model, "residual").op_type = "Sub"

    def swap(model: ModelProto) -> None:
        subtract(model)
        node(model, "residual").input[:] = ["a1", "m"]

    assert rules_between(changed(subtract), changed(swap)) is None


def _mutant(seed: int) -> tuple[str, ModelProto]:
    """One true change: of an attribute, an edge, a constant, a type, an operator, or a node that is added."""
    dice = random.Random(seed)
    model = classifier()
    kind = dice.choice(["attribute", "edge", "constant", "shape", "operator", "node", "type"])
    graph = model.graph
    if kind == "attribute":
        target = dice.choice([n for n in graph.node if n.attribute])
        attribute = dice.choice(list(target.attribute))
        if attribute.ints:
            at = dice.randrange(len(attribute.ints))
            attribute.ints[at] += dice.choice([1, 2, 3])
        else:
            attribute.i += dice.choice([1, 2])
    elif kind == "edge":
        values = ["image", "c1", "a1", "c2", "c3", "s3", "m", "r", "p", "g", "f"]
        target = dice.choice(list(graph.node))
        slot = dice.randrange(len([name for name in target.input if name in values]) or 1)
        slots = [k for k, name in enumerate(target.input) if name in values]
        slot = dice.choice(slots)
        target.input[slot] = dice.choice(
            [name for name in values if name != target.input[slot] and name not in target.output]
        )
    elif kind == "constant":
        name = dice.choice(["low", "high", "flat"])
        tensor = next(t for t in graph.initializer if t.name == name)
        array = numpy_helper.to_array(tensor).copy()
        array = array + np.asarray(dice.choice([1, 2, 3]), array.dtype)
        tensor.CopyFrom(numpy_helper.from_array(array, name))
    elif kind == "shape":
        name = dice.choice(["w1", "b1", "w2", "w3", "b3", "wf", "bf"])
        tensor = next(t for t in graph.initializer if t.name == name)
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(np.concatenate([array, array[:1]]), name))
    elif kind == "type":
        tensor = dice.choice(list(graph.initializer))
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(
            numpy_helper.from_array(array.astype(dice.choice([np.float16, np.float64, np.int32])), tensor.name)
        )
    elif kind == "operator":
        target = dice.choice(
            [n for n in graph.node if n.op_type in ("Sigmoid", "Mul", "Add", "MaxPool", "GlobalAveragePool")]
        )
        others = {
            "Sigmoid": ["Tanh", "Relu"],
            "Mul": ["Sub", "Div"],
            "Add": ["Sub", "Div", "Pow"],
            "MaxPool": ["AveragePool"],
        }
        target.op_type = dice.choice(others.get(target.op_type, ["GlobalMaxPool"]))
    else:
        target = dice.choice(list(graph.node))
        at = list(graph.node).index(target)
        new = helper.make_node(dice.choice(["Relu", "Neg", "Abs", "Sigmoid", "Dropout"]), [target.input[0]], ["added"])
        target.input[0] = "added"
        graph.node.insert(at, new)
    return kind, model


def test_500_mutants_are_refused() -> None:
    plain, _ = respelled(classifier())
    identical = canonicalise(classifier(), weights=None).sha256
    passed = []
    for seed in range(500):
        kind, mutant = _mutant(seed)
        try:
            strict, lenient = canonicalise(mutant, weights=None), respelled(mutant)[0]
        except FgvcError as error:  # an edge that makes a cycle is refused before any comparison
            if "cycle" not in str(error):
                raise
            continue
        if identical == strict.sha256 or lenient.sha256 == plain.sha256:
            passed.append((seed, kind))
    assert not passed
