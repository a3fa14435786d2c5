"""Small classifiers as ONNX files, each with one thing that files of other programs have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE, CLASSES, WIDTH = 8, 5, 6
RNG = np.random.default_rng(0)


def weights(kind: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "stem.weight": rng.normal(0, 0.3, (WIDTH, 3, 3, 3)).astype(kind),
        "stem.bias": rng.normal(0, 0.3, WIDTH).astype(kind),
        "head.weight": rng.normal(0, 0.3, (CLASSES, WIDTH)).astype(kind),
        "head.bias": rng.normal(0, 0.3, CLASSES).astype(kind),
    }


def model(
    nodes: list[onnx.NodeProto],
    tensors: list[onnx.TensorProto],
    *,
    shape: tuple[Any, ...] = ("n", 3, SIZE, SIZE),
    kind: int = TensorProto.FLOAT,
    output: tuple[Any, ...] = ("n", CLASSES),
    out_kind: int | None = None,
    opset: int = 17,
    domains: tuple[str, ...] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "small", [helper.make_tensor_value_info("image", kind, shape)],
        [helper.make_tensor_value_info("scores", out_kind or TensorProto.FLOAT, output)], tensors,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="a test")


def layers(last: str = "scores") -> list[onnx.NodeProto]:
    node = helper.make_node
    return [
        node("Conv", ["image", "stem.weight", "stem.bias"], ["a"], name="/stem/Conv", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Relu", ["a"], ["b"]),
        node("GlobalAveragePool", ["b"], ["c"]),
        node("Flatten", ["c"], ["d"]),
        node("Gemm", ["d", "head.weight", "head.bias"], [last], transB=1),
    ]


def plain(**options: Any) -> onnx.ModelProto:
    return model(layers(), [numpy_helper.from_array(value, name) for name, value in weights().items()], **options)


def in_constants() -> onnx.ModelProto:
    """Weights in Constant nodes, one behind an Identity, and a head behind a Transpose and a MatMul."""
    value, node = weights(), helper.make_node
    constants = [
        node("Constant", [], [name], value=numpy_helper.from_array(array, ""))
        for name, array in value.items()
        if name != "head.weight"
    ]
    turned = node("Constant", [], ["w"], value=numpy_helper.from_array(value["head.weight"], ""))
    nodes = layers()[:-1]
    nodes[0].input[1] = "same"
    nodes = [
        *constants,
        turned,
        node("Identity", ["stem.weight"], ["same"]),
        node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        *nodes,
    ]
    nodes += [node("MatMul", ["d", "wt"], ["e"]), node("Add", ["e", "head.bias"], ["scores"])]
    return model(nodes, [])


def half() -> onnx.ModelProto:
    """fp16 throughout, its values in a typed field, where they are packed whole numbers."""
    tensors = [
        helper.make_tensor(name, TensorProto.FLOAT16, value.shape, value.reshape(-1))
        for name, value in weights(np.float16).items()
    ]
    assert all(not tensor.HasField("raw_data") for tensor in tensors)
    return model(layers(), tensors, kind=TensorProto.FLOAT16, out_kind=TensorProto.FLOAT16)


def typed() -> onnx.ModelProto:
    """float32 in a typed field."""
    return model(
        layers(),
        [helper.make_tensor(name, TensorProto.FLOAT, value.shape, value.reshape(-1)) for name, value in weights().items()],
    )


def bytes_in() -> onnx.ModelProto:
    """uint8 images, channels last, normalised in the graph; a softmax at the end."""
    node = helper.make_node
    tensors = [numpy_helper.from_array(value, name) for name, value in weights().items()]
    tensors += [
        numpy_helper.from_array(np.array([120, 110, 100], np.float32).reshape(1, 3, 1, 1), "mean"),
        numpy_helper.from_array(np.array([60, 58, 57], np.float32).reshape(1, 3, 1, 1), "std"),
    ]
    before = [
        node("Cast", ["image"], ["f"], to=TensorProto.FLOAT),
        node("Transpose", ["f"], ["t"], perm=[0, 3, 1, 2]),
        node("Sub", ["t", "mean"], ["m"]),
        node("Div", ["m", "std"], ["x"]),
    ]
    after = layers("logits")
    after[0].input[0] = "x"
    return model(
        [*before, *after, node("Softmax", ["logits"], ["scores"], axis=1)],
        tensors,
        shape=("n", SIZE, SIZE, 3),
        kind=TensorProto.UINT8,
    )


def arithmetic_norm() -> onnx.ModelProto:
    """A norm as a multiplication and a sum, after the convolution; and a shape that is computed."""
    node, rng = helper.make_node, np.random.default_rng(2)
    tensors = [numpy_helper.from_array(value, name) for name, value in weights().items()]
    tensors += [
        numpy_helper.from_array(rng.uniform(0.5, 1.5, (1, WIDTH, 1, 1)).astype(np.float32), name)
        for name in ("scale", "shift")
    ]
    tensors += [numpy_helper.from_array(np.array([-1], np.int64), "rest")]
    first, relu, pool, _, last = layers()
    relu.input[0] = "normal"
    nodes = [
        first, node("Mul", ["a", "scale"], ["s"]), node("Add", ["s", "shift"], ["normal"]), relu, pool,
        node("Shape", ["c"], ["shape"]), node("Constant", [], ["zero"], value_int=0),
        node("Gather", ["shape", "zero"], ["batch"]),
        node("Constant", [], ["axis"], value_ints=[0]), node("Unsqueeze", ["batch", "axis"], ["batches"]),
        node("Concat", ["batches", "rest"], ["wanted"], axis=0), node("Reshape", ["c", "wanted"], ["d"]), last,
    ]  # fmt: skip
    return model(nodes, tensors)


def shared() -> onnx.ModelProto:
    """One kernel, read by two convolutions; and two paths that are added."""
    node, rng = helper.make_node, np.random.default_rng(3)
    tensors = [numpy_helper.from_array(value, name) for name, value in weights().items()]
    tensors += [numpy_helper.from_array(rng.normal(0, 0.3, (WIDTH, WIDTH, 1, 1)).astype(np.float32), "mix")]
    first, relu, pool, flat, last = layers()
    pool.input[0] = "sum"
    nodes = [
        first, relu, node("Conv", ["b", "mix"], ["one"]), node("Sigmoid", ["one"], ["gate"]),
        node("Conv", ["gate", "mix"], ["two"]),
        node("Add", ["b", "two"], ["sum"]), pool, flat, last,
    ]  # fmt: skip
    return model(nodes, tensors)


def fixed_batch() -> onnx.ModelProto:
    """A batch of one, as torch exports by default: tokens by reshapes whose sizes are numbers, and a class token."""
    node, rng = helper.make_node, np.random.default_rng(4)
    cells = (SIZE // 2) ** 2
    tensors = [numpy_helper.from_array(value, name) for name, value in weights().items()]
    tensors += [
        numpy_helper.from_array(np.array([1, WIDTH, cells], np.int64), "to tokens"),
        numpy_helper.from_array(rng.normal(0, 1, (1, 1, WIDTH)).astype(np.float32), "class token"),
        numpy_helper.from_array(np.array([1, cells + 1, 2, WIDTH // 2], np.int64), "to heads"),
        numpy_helper.from_array(np.array([1, cells + 1, -1], np.int64), "from heads"),
        numpy_helper.from_array(np.array(0, np.int64), "first"),
        numpy_helper.from_array(rng.normal(0, 0.4, (WIDTH, WIDTH)).astype(np.float32), "mix"),
    ]
    first, relu, _, _, last = layers()
    last.input[0] = "token"
    nodes = [
        first, relu, node("Reshape", ["b", "to tokens"], ["flat"]), node("Transpose", ["flat"], ["tokens"], perm=[0, 2, 1]),
        node("Concat", ["class token", "tokens"], ["all"], axis=1), node("MatMul", ["all", "mix"], ["mixed"]),
        node("Reshape", ["mixed", "to heads"], ["heads"]), node("Softmax", ["heads"], ["weighed"], axis=1),
        node("Reshape", ["weighed", "from heads"], ["whole"]), node("Gather", ["whole", "first"], ["token"], axis=1), last,
    ]  # fmt: skip
    return model(nodes, tensors, shape=(1, 3, SIZE, SIZE), output=(1, CLASSES))


def kept_norm() -> onnx.ModelProto:
    """A batch norm, asymmetric padding, a hard swish, and a head that is a convolution."""
    node, rng = helper.make_node, np.random.default_rng(5)
    value = weights()
    value["head.weight"] = value["head.weight"].reshape(CLASSES, WIDTH, 1, 1)
    value |= {f"norm.{name}": rng.uniform(0.5, 1.5, WIDTH).astype(np.float32) for name in ("weight", "bias", "mean", "var")}
    first, _, pool, flat, _ = layers()
    first.ClearField("attribute")
    first.attribute.extend([helper.make_attribute("auto_pad", "SAME_UPPER"), helper.make_attribute("strides", [2, 2])])
    flat.input[0], flat.output[0] = "e", "scores"
    nodes = [
        first, node("BatchNormalization", ["a", "norm.weight", "norm.bias", "norm.mean", "norm.var"], ["n"], epsilon=1e-3),
        node("HardSwish", ["n"], ["b"]), pool, node("Conv", ["c", "head.weight", "head.bias"], ["e"]), flat,
    ]  # fmt: skip
    return model(nodes, [numpy_helper.from_array(array, name) for name, array in value.items()])


def fused() -> onnx.ModelProto:
    """onnxruntime's own operators: a convolution with its activation and a sum, a biased Gelu."""
    node, rng = helper.make_node, np.random.default_rng(6)
    tensors = [numpy_helper.from_array(value, name) for name, value in weights().items()]
    tensors += [numpy_helper.from_array(rng.normal(0, 0.3, WIDTH).astype(np.float32), "shift")]
    first, _, pool, flat, last = layers()
    nodes = [
        node("FusedConv", list(first.input), ["b"], domain="com.microsoft", pads=[1, 1, 1, 1], strides=[2, 2], activation="Relu"),
        pool, flat, node("BiasGelu", ["d", "shift"], ["g"], domain="com.microsoft"), last,
    ]  # fmt: skip
    last.input[0] = "g"
    return model(nodes, tensors, domains=("com.microsoft",))


def standardised() -> onnx.ModelProto:
    """A kernel that is standardised in the graph, by its own mean and spread; and places that are skipped."""
    node = helper.make_node
    tensors = [numpy_helper.from_array(value, name) for name, value in weights().items()]
    tensors += [numpy_helper.from_array(np.array(values, np.int64), name) for name, values in
                {"from": [0, 0], "to": [99, 99], "axes": [2, 3], "by": [2, 2]}.items()]  # fmt: skip
    first, relu, pool, flat, last = layers()
    first.input[1], pool.input[0] = "kernel", "fewer"
    nodes = [
        node("ReduceMean", ["stem.weight"], ["mean"], axes=[1, 2, 3]), node("Sub", ["stem.weight", "mean"], ["centred"]),
        node("ReduceL2", ["centred"], ["length"], axes=[1, 2, 3]), node("Div", ["centred", "length"], ["kernel"]),
        first, relu, node("Slice", ["b", "from", "to", "axes", "by"], ["fewer"]), pool, flat, last,
    ]  # fmt: skip
    return model(nodes, tensors)


def standardised_by_a_norm() -> onnx.ModelProto:
    """A kernel that is standardised by a batch norm of opset 13, whose five outputs say that it takes its own statistics; those
    that it is given are computed from a copy of the kernel that nothing else reads."""
    node, value = helper.make_node, weights()
    flat = value["stem.weight"].reshape(1, WIDTH, -1)
    value |= {"stem.weight": flat, "copy": flat, "gain": np.linspace(0.5, 1.5, WIDTH, dtype=np.float32)}
    tensors = [numpy_helper.from_array(array, name) for name, array in value.items()]
    tensors += [numpy_helper.from_array(np.zeros(WIDTH, np.float32), "zero"),
                numpy_helper.from_array(np.array([WIDTH, 3, 3, 3], np.int64), "shape")]  # fmt: skip
    nodes = layers()
    nodes[0].input[1] = "kernel"
    before = [
        node("ReduceMean", ["copy"], ["mean"], axes=[0, 2], keepdims=0),
        node("ReduceMean", ["copy"], ["middle"], axes=[0, 2], keepdims=1),
        node("Sub", ["copy", "middle"], ["centred"]),
        node("Mul", ["centred", "centred"], ["squares"]),
        node("ReduceMean", ["squares"], ["variance"], axes=[0, 2], keepdims=0),
        node("BatchNormalization", ["stem.weight", "gain", "zero", "mean", "variance"], ["standard", "m", "v", "sm", "sv"]),
        node("Reshape", ["standard", "shape"], ["kernel"]),
    ]
    return model([*before, *nodes], tensors, opset=13)


def gated() -> onnx.ModelProto:
    """x hardsigmoid(x) and sigmoid(x) x, and a gate by another value."""
    node = helper.make_node
    first, _, pool, flat, last = layers()
    pool.input[0] = "f"
    nodes = [
        first, node("HardSigmoid", ["a"], ["b"], alpha=1 / 6), node("Mul", ["a", "b"], ["c1"]),
        node("Sigmoid", ["c1"], ["d1"]), node("Mul", ["d1", "c1"], ["e1"]), node("Sigmoid", ["e1"], ["g"]),
        node("Mul", ["a", "g"], ["f"]), pool, flat, last,
    ]  # fmt: skip
    return model(nodes, [numpy_helper.from_array(value, name) for name, value in weights().items()])


def two_heads() -> onnx.ModelProto:
    """The mean of two linear layers, of features of their own, and a softmax."""
    node, value, rng = helper.make_node, weights(), np.random.default_rng(8)
    value |= {
        "other.weight": rng.normal(0, 0.3, (WIDTH, CLASSES)).astype(np.float32),
        "other.bias": rng.normal(0, 0.3, CLASSES).astype(np.float32),
        "factor": rng.uniform(0.5, 1.5, WIDTH).astype(np.float32),
    }
    nodes = [
        *layers("one"), node("Mul", ["d", "factor"], ["e"]), node("MatMul", ["e", "other.weight"], ["f"]),
        node("Add", ["f", "other.bias"], ["two"]), node("Add", ["one", "two"], ["sum"]),
        node("Constant", [], ["half of"], value_float=2.0), node("Div", ["sum", "half of"], ["mean"]),
        node("Softmax", ["mean"], ["scores"]),
    ]  # fmt: skip
    return model(nodes, [numpy_helper.from_array(array, name) for name, array in value.items()])


def map_classifier() -> onnx.ModelProto:
    """The classifier is a convolution before the mean."""
    node, value = helper.make_node, weights()
    value["head.weight"] = value["head.weight"].reshape(CLASSES, WIDTH, 1, 1)
    nodes = [
        *layers()[:2], node("Conv", ["b", "head.weight", "head.bias"], ["map"]), node("GlobalAveragePool", ["map"], ["mean"]),
        node("Flatten", ["mean"], ["scores"]),
    ]  # fmt: skip
    return model(nodes, [numpy_helper.from_array(array, name) for name, array in value.items()])


def places() -> onnx.ModelProto:
    """The same with an activation between, as SqueezeNet has it, a softmax over channels, and a mean by an average's window."""
    model, node = map_classifier(), helper.make_node
    del model.graph.node[3:]
    model.graph.node.extend([
        node("Relu", ["map"], ["active"]), node("AveragePool", ["active"], ["mean"], kernel_shape=[SIZE // 2, SIZE // 2]),
        node("Softmax", ["mean"], ["share"], axis=1), node("Flatten", ["share"], ["scores"]),
    ])  # fmt: skip
    return model


def enlarged() -> onnx.ModelProto:
    """An old Upsample, with its scales as an attribute, and a classifier among transposes."""
    node, value = helper.make_node, weights()
    value["head.weight"] = value["head.weight"].reshape(CLASSES, WIDTH, 1, 1)
    nodes = [
        *layers()[:2], node("Upsample", ["b"], ["large"], mode="nearest", scales=[1.0, 1.0, 2.0, 2.0]),
        node("GlobalAveragePool", ["large"], ["mean"]), node("Conv", ["mean", "head.weight", "head.bias"], ["c"]),
        node("Transpose", ["c"], ["t"], perm=[0, 2, 3, 1]), node("Flatten", ["t"], ["scores"]),
    ]  # fmt: skip
    return model(nodes, [numpy_helper.from_array(array, name) for name, array in value.items()], opset=8)


def repeated_token() -> onnx.ModelProto:
    """A class token that is repeated for each image, by sizes that the graph computes."""
    model, node = fixed_batch(), helper.make_node
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    for tensor in model.graph.initializer:
        if tensor.dims and tensor.data_type == TensorProto.INT64:
            numbers = numpy_helper.to_array(tensor).copy()
            numbers[0] = 0 if -1 in numbers[1:] else -1
            tensor.CopyFrom(numpy_helper.from_array(numbers, tensor.name))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, WIDTH], np.int64), "one token"))
    next(each for each in model.graph.node if each.op_type == "Concat").input[0] = "all tokens"
    nodes = [
        node("Shape", ["image"], ["shape"], end=1), node("Concat", ["shape", "one token"], ["wanted"], axis=0),
        node("Expand", ["class token", "wanted"], ["all tokens"]), *model.graph.node,
    ]  # fmt: skip
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


FILES: dict[str, Callable[[], onnx.ModelProto]] = {
    make.__name__: make
    for make in (
        plain, in_constants, half, typed, bytes_in, arithmetic_norm, shared, fixed_batch, kept_norm, fused, standardised,
        standardised_by_a_norm, two_heads, map_classifier, places, enlarged, repeated_token, gated,
    )
}


def saved(model: onnx.ModelProto, folder: Path, *, external: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "deployed.onnx"
    if external:
        onnx.save_model(model, str(path), save_as_external_data=True, location="deployed.onnx.data", size_threshold=0)
    else:
        path.write_bytes(model.SerializeToString())
    return path
