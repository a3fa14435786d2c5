"""Regularisers that timm has itself, by `model.kwargs`: they do what their papers say, and leave the graph alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.config.exporting import Export
from fgvc.exporting.onnx import Interface, export_onnx
from fgvc.exporting.proofs import compare_structure
from fgvc.exporting.reference import independent_plain
from fgvc.models.backbone import plain_model
from fgvc.models.norms import running_norms

RATE = 0.4


def recorded(net: nn.Module, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output of a module in train mode."""
    calls: list[tuple[Tensor, Tensor]] = []
    handle = net.get_submodule(name).register_forward_hook(
        lambda _m, args, out: calls.append((args[0].clone(), out.clone()))
    )
    torch.manual_seed(0)
    net.train()(x)
    handle.remove()
    return calls[0][0].detach(), calls[0][1].detach()


def images(count: int = 64) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_dropout_drops_features_before_the_classifier_and_raises_the_others() -> None:
    net = plain_model("test_resnet", 5, {"drop_rate": RATE})
    pooled: list[Tensor] = []
    net.global_pool.register_forward_hook(lambda _m, _args, out: pooled.append(out.detach()))
    read, _ = recorded(net, "fc", images(512))
    dropped = read == 0
    alive = pooled[0] != 0
    assert dropped[alive].float().mean() == pytest.approx(RATE, abs=0.02)
    torch.testing.assert_close(read, torch.where(dropped, 0.0, pooled[0] / (1 - RATE)))


def test_drop_path_drops_whole_branches_of_some_samples_and_raises_the_others() -> None:
    net = plain_model("resnet18", 5, {"drop_path_rate": RATE})
    rate = net.get_submodule("layer4.1.drop_path").drop_prob
    assert rate == pytest.approx(RATE, abs=1e-3), "the deepest block has the whole rate"
    nn.init.ones_(net.layer4[1].bn2.weight)  # timm starts this branch at zero
    branch, left = recorded(net, "layer4.1.drop_path", images(256))
    dropped = (left == 0).flatten(1).all(1)
    assert dropped.float().mean() == pytest.approx(RATE, abs=0.1)
    torch.testing.assert_close(left[~dropped], branch[~dropped] / (1 - RATE))


def test_dropblock_drops_squares_and_keeps_the_sum() -> None:
    net = plain_model("resnet18", 5, {"drop_block_rate": RATE})
    block = net.get_submodule("layer3.0.drop_block")
    f, left = recorded(net, "layer3.0.drop_block", images(64).repeat(1, 1, 2, 2))
    assert (block.drop_prob, block.block_size) == (RATE, 5)
    keep = (left != 0).any(1, keepdim=True)
    dropped = F.pad((~keep).float(), (4, 4, 4, 4), value=1.0)  # squares may reach over the border
    whole = 1 - F.max_pool2d(1 - dropped, 5, 1)  # where a 5 x 5 square that is dropped begins
    opened = F.max_pool2d(F.pad(whole, (4, 4, 4, 4)), 5, 1)[..., 4:-4, 4:-4]
    assert torch.equal(opened.bool(), ~keep), "what is dropped is made of whole squares"
    torch.testing.assert_close(left, torch.where(keep, f * keep.numel() / keep.sum(), 0.0))


@pytest.mark.parametrize("kwargs", [{"drop_rate": 0.3}, {"drop_path_rate": 0.2}, {"drop_block_rate": 0.1}])
def test_the_graph_stays_the_plain_one(kwargs: dict) -> None:
    settings = Export(exporter="torchscript")
    net = plain_model("resnet18", 5, kwargs).eval()
    for norm in running_norms(net):  # as after training: equal initializers would be shared
        for values in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(values)
    ours = export_onnx(net, size=(64, 64), exporter=settings.exporter, opset=settings.opset)
    interface = Interface(size=(64, 64), opset=settings.opset)
    for reference_kwargs in (kwargs, {}):
        reference, positions = independent_plain(
            backbone="resnet18", num_classes=5, kwargs=reference_kwargs, interface=interface, exporter="torchscript"
        )
        result = compare_structure(ours, reference, positions)
        assert result.passed, result.differences
