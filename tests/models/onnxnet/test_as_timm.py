"""The net of a file where the rest of fgvc meets it: it has what timm's nets have, and means the same by it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import helper, numpy_helper
from safetensors.torch import save_file
from torch import nn

from fgvc.config.models import Model
from fgvc.config.training import Optim
from fgvc.errors import FgvcError
from fgvc.models.backbone import freeze, head_prefixes
from fgvc.models.classifier import Classifier
from fgvc.models.net import shipped_net
from fgvc.models.onnxnet.net import OnnxNet, open_onnx
from fgvc.models.weights import load_weights
from fgvc.reparam.replace import find_sites
from fgvc.training.optim import parameter_groups
from tests.models.onnxnet import small

WIDTH = small.WIDTH


def staged() -> onnx.ModelProto:
    """Two stages below names that nest (`blocks.0`, `blocks.1`), as exporters write them, the second with a sum at its end."""
    node, rng = helper.make_node, np.random.default_rng(7)
    shapes = {"blocks.0.conv": (WIDTH, 3, 3, 3), "blocks.1.conv": (WIDTH, WIDTH, 3, 3), "blocks.1.mix": (WIDTH, WIDTH, 1, 1)}
    shapes |= {"blocks.2.conv": (WIDTH, WIDTH, 3, 3), "head": (small.CLASSES, WIDTH)}
    tensors = [
        numpy_helper.from_array(rng.normal(0, 0.3, shape).astype(np.float32), f"{name}.{kind}")
        for name, whole in shapes.items()
        for kind, shape in (("weight", whole), ("bias", whole[:1]))
    ]

    def conv(name: str, x: str, y: str, stride: int, pad: int) -> onnx.NodeProto:
        return node("Conv", [x, f"{name}.weight", f"{name}.bias"], [y], strides=[stride] * 2, pads=[pad] * 4)

    nodes = [
        conv("blocks.0.conv", "image", "a", 2, 1), node("Relu", ["a"], ["b"]),
        conv("blocks.1.conv", "b", "c", 2, 1), node("Relu", ["c"], ["d"]), conv("blocks.1.mix", "d", "e", 1, 0),
        node("Add", ["d", "e"], ["f"]), conv("blocks.2.conv", "f", "g", 2, 1), node("Relu", ["g"], ["h"]),
        node("GlobalAveragePool", ["h"], ["i"]), node("Flatten", ["i"], ["j"]),
        node("Gemm", ["j", "head.weight", "head.bias"], ["scores"], transB=1),
    ]  # fmt: skip
    return small.model(nodes, tensors, shape=("n", 3, 16, 16))


@pytest.fixture
def net(tmp_path: Path) -> OnnxNet:
    return open_onnx(small.saved(staged(), tmp_path))


def test_it_has_what_the_nets_of_timm_have(net: OnnxNet) -> None:
    assert isinstance(net, Classifier)
    for name in ("test_resnet", "test_vit", "test_efficientnet", "test_convnext"):
        assert isinstance(timm.create_model(name), Classifier)
    assert not isinstance(nn.Linear(1, 1), Classifier)
    assert [stage["reduction"] for stage in net.feature_info] == [2, 4, 8]
    assert head_prefixes(net) == ("classifier.",)


@pytest.mark.parametrize("stages", [1, 2])
def test_frozen_stages_are_what_a_forward_comes_to_first(net: OnnxNet, stages: int) -> None:
    """The truth by autograd: the parameters that the stage's output depends on."""
    outputs: list[torch.Tensor] = []
    stage = net.get_submodule(net.feature_info[stages - 1]["module"])
    handle = stage.register_forward_hook(lambda _m, _x, y: outputs.append(y))
    net(torch.randn(2, 3, 16, 16))
    handle.remove()
    named = dict(net.named_parameters())
    gradients = torch.autograd.grad(outputs[0].sum(), list(named.values()), allow_unused=True)
    before = {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}
    freeze(net, stages)
    assert {name for name, value in net.named_parameters() if not value.requires_grad} == before


def test_layers_decay_from_the_head_to_the_stem(net: OnnxNet) -> None:
    groups = parameter_groups(net, Optim(layer_decay=0.5), head=head_prefixes(net))
    names = {id(value): name for name, value in net.named_parameters()}
    scale = {names[id(value)]: group["lr_scale"] for group in groups for value in group["params"]}
    order = [f"body.blocks.{number}.conv.weight" for number in range(3)]
    assert scale[order[0]] < scale[order[1]] < scale[order[2]] < scale["classifier.weight"] == 1
    decay = {names[id(value)]: group["weight_decay"] for group in groups for value in group["params"]}
    assert all((decay[name] > 0) == name.endswith("weight") for name in decay)


def test_checkpointed_activations_give_the_same_gradients(net: OnnxNet) -> None:
    x = torch.randn(2, 3, 16, 16)
    gradients = []
    for enable in (False, True):
        net.set_grad_checkpointing(enable)
        net.zero_grad()
        net(x).square().sum().backward()
        gradients.append([value.grad.clone() for value in net.parameters() if value.grad is not None])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_its_convolutions_are_sites_for_blocks(net: OnnxNet) -> None:
    sites, refused = find_sites(net, (16, 16))
    assert [site.name for site in sites] == [f"body.blocks.{name}" for name in ("0.conv", "1.conv", "1.mix", "2.conv")]
    assert not refused


@pytest.mark.parametrize("kind", ["the file's names", "a checkpoint's names", "another file"])
def test_weights_are_laid_into_the_files_places(kind: str, tmp_path: Path) -> None:
    file = small.saved(small.kept_norm(), tmp_path / "a")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(file)).graph.initializer}
    others = {name: torch.from_numpy(value * 2 + 1) for name, value in stored.items()}
    path = tmp_path / "w.safetensors"
    if kind == "another file":
        path = tmp_path / "w.onnx"
        model = small.kept_norm()
        for tensor in model.graph.initializer:
            tensor.CopyFrom(numpy_helper.from_array(others[tensor.name].numpy(), tensor.name))
        path.write_bytes(model.SerializeToString())
    elif kind == "the file's names":
        save_file(others, path)
    else:
        other = open_onnx(file)
        save_file({key: value * 2 + 1 for key, value in other.state_dict().items() if value.is_floating_point()}, path)
    model = Model(onnx=file, weights=str(path))
    net = shipped_net(model, small.CLASSES, None)
    assert isinstance(net, OnnxNet)
    assert not load_weights(net, model, stated=["mean", "std"]).unused
    for name, value in net.stored():
        torch.testing.assert_close(value, others[name].double(), rtol=0, atol=0)


def test_weights_that_do_not_fit_the_file_are_refused(tmp_path: Path) -> None:
    file = small.saved(small.plain(), tmp_path)
    save_file({"stem.weight": torch.zeros(2, 3, 3, 3), "stem.bias": torch.zeros(WIDTH)}, tmp_path / "w.safetensors")
    model = Model(onnx=file, weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(FgvcError, match=r"does not fit deployed\.onnx:\n  body\.stem\.weight: \(2, 3, 3, 3\) in the file"):
        load_weights(shipped_net(model, small.CLASSES, None), model)
