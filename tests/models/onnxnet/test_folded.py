"""Which convolutions a norm was folded into: told from the graph, beside the nets that the files were made of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper
from torch import nn

from fgvc.exporting.inspect import inspect_file
from fgvc.models.onnxnet.folded import folded_convolutions
from fgvc.models.onnxnet.net import open_onnx
from tests.models.onnxnet import small
from tests.models.onnxnet.twins import exported, twin
from tests.trained import Once


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_each_norm_of_the_net_has_been_folded_into_one(name: str, once: Once) -> None:
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in twin(name).modules())
    folded, kept = (inspect_file(exported(once, name, kind)) for kind in ("folded", "kept"))
    assert (folded.norms, len(folded.folded)) == (0, norms)
    assert (kept.norms, len(kept.folded)) == (norms, 0)
    assert f"batch norms: 0 kept, {norms} folded into convolutions" in "\n".join(folded.lines())
    assert f"model.batch_norm: restore puts {norms} norms back" in "\n".join(folded.lines())
    assert "restore" not in "\n".join(kept.lines())


def test_a_norm_that_is_written_as_arithmetic_is_counted(tmp_path: Path) -> None:
    lines = inspect_file(small.saved(small.arithmetic_norm(), tmp_path)).lines()
    assert "batch norms: 0 kept, 1 written as products and sums, 0 folded into convolutions" in lines


def without_bias(where: str) -> object:
    model = small.plain()
    if where == "bias":
        del model.graph.node[0].input[2]
    return model


def one_cell() -> object:
    """A convolution on a pooled map, as in squeeze and excitation."""
    model, rng = small.plain(), np.random.default_rng(7)
    for name, shape in (("squeeze.weight", (small.WIDTH, small.WIDTH, 1, 1)), ("squeeze.bias", (small.WIDTH,))):
        model.graph.initializer.append(numpy_helper.from_array(rng.normal(0, 0.3, shape).astype(np.float32), name))
    node = helper.make_node
    added = [
        node("ReduceMean", ["b"], ["m"], axes=[2, 3], keepdims=1),
        node("Conv", ["m", "squeeze.weight", "squeeze.bias"], ["s"]),
        node("Sigmoid", ["s"], ["g"]),
        node("Mul", ["b", "g"], ["gated"]),
    ]
    for at, new in enumerate(added):
        model.graph.node.insert(2 + at, new)
    model.graph.node[6].input[0] = "gated"
    return model


def layer_norm() -> object:
    """As in a transformer: the convolution has no norm behind it, nor had one."""
    model = small.plain()
    for name in ("ln.weight", "ln.bias"):
        model.graph.initializer.append(
            numpy_helper.from_array(np.linspace(0.5, 1, small.WIDTH, dtype=np.float32), name)
        )
    model.graph.node.insert(4, helper.make_node("LayerNormalization", ["d", "ln.weight", "ln.bias"], ["n"]))
    model.graph.node[5].input[0] = "n"
    del model.graph.node[1]
    model.graph.node[1].input[0] = "a"
    return model


@pytest.mark.parametrize(
    ("make", "names", "left"),
    [
        (small.plain, 1, {}),
        (small.kept_norm, 0, {}),
        (small.arithmetic_norm, 0, {}),
        (small.fused, 1, {}),
        (small.half, 1, {}),
        (small.shared, 1, {"no bias, which a folded norm leaves": 2}),
        (small.standardised, 0, {}),
        (lambda: without_bias("bias"), 0, {"no bias, which a folded norm leaves": 1}),
        (one_cell, 1, {"on a map of one cell": 1}),
        (layer_norm, 0, {"in a net of other norms, and no activation follows": 1}),
    ],
)
def test_a_convolution_without_a_folded_norm_is_listed_with_the_reason(
    make, names: int, left: dict[str, int], tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    folded = folded_convolutions(open_onnx(small.saved(make(), tmp_path)))
    assert len(folded.names) == names
    assert Counter(folded.left.values()) == left
    assert folded.arithmetic == (make is small.arithmetic_norm)
