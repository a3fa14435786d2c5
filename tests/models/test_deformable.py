"""Deformable convolutions: the formula, the plain net at the start, its weights, and the contract."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fgvc.config.exporting import Export
from fgvc.config.models import Model
from fgvc.errors import FgvcError
from fgvc.exporting.onnx import export_onnx
from fgvc.exporting.prove import PlainBackbone
from fgvc.models.backbone import memory_format, plain_model
from fgvc.models.deformable import Deformable, offsets
from fgvc.models.weights import load_weights
from fgvc.reparam.block import refusal
from fgvc.reparam.kinds import acb
from fgvc.reparam.replace import find_sites, replace_conv

SIZE = (64, 64)


def pair(name: str = "resnet18", **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """The plain net and the deformable one, from the same seed."""
    nets = []
    for backbone in (name, f"{name}_deform"):
        torch.manual_seed(0)
        nets.append(plain_model(backbone, 5, kwargs))
    return nets[0], nets[1]


def images(count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, *SIZE, dtype=dtype, generator=torch.Generator().manual_seed(1))


def read(image: np.ndarray, y: float, x: float) -> np.ndarray:
    """(C,) at a place between pixels, bilinear, zero outside: sum_q max(0,1-|q_y-y|) max(0,1-|q_x-x|) image(q)."""
    value = np.zeros(len(image))
    for row in range(image.shape[1]):
        for column in range(image.shape[2]):
            value += max(0.0, 1 - abs(row - y)) * max(0.0, 1 - abs(column - x)) * image[:, row, column]
    return value


@pytest.mark.parametrize(("stride", "dilation", "bias"), [(1, 1, False), (2, 1, True), (1, 2, False)])
def test_every_tap_is_read_at_its_own_place(stride: int, dilation: int, bias: bool) -> None:
    """y(p) = sum_k w_k x(p + p_k + dp_k) (Dai et al., equation 2), in loops."""
    torch.manual_seed(2)
    conv = nn.Conv2d(2, 3, 3, stride=stride, padding=dilation, dilation=dilation, bias=bias).double()
    block = Deformable(conv)
    nn.init.normal_(block.offset.weight, std=0.3)
    nn.init.normal_(block.offset.bias)
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        outputs = block(x)[0].numpy()
        places = block.offset(x)[0].numpy()  # (18,h,w): dy, dx of tap 0, dy, dx of tap 1, ...
    weight = conv.weight.detach().numpy()
    assert outputs.shape == tuple(conv(x).shape[1:])
    for h, w in np.ndindex(*outputs.shape[1:]):
        expected = np.zeros(3) if conv.bias is None else conv.bias.detach().numpy().copy()
        for tap in range(9):
            down, across = divmod(tap, 3)
            y = h * stride + (down - 1) * dilation + places[2 * tap, h, w]
            across_at = w * stride + (across - 1) * dilation + places[2 * tap + 1, h, w]
            expected += weight[:, :, down, across] @ read(x[0].numpy(), y, across_at)
        np.testing.assert_allclose(outputs[:, h, w], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "kwargs"), [("resnet18", {}), ("resnet18", {"output_stride": 16}), ("resnet50", {"zero_init_last": False})]
)
def test_it_starts_as_the_plain_net(name: str, kwargs: dict[str, Any], training: bool) -> None:
    plain, net = (each.double().train(training) for each in pair(name, **kwargs))
    deformed = [module for module in net.modules() if isinstance(module, Deformable)]
    assert len(deformed) == {"resnet18": 8, "resnet50": 9}[name]
    with torch.no_grad():
        z, deformable_z = plain(images(dtype=torch.float64)), net(images(dtype=torch.float64))
        assert (net.forward_head(net.forward_features(images(dtype=torch.float64))) - z).abs().max() < 1e-12 or training
    assert (deformable_z - z).abs().max() <= 1e-12 * z.abs().max()
    assert set(net.state_dict()) == set(plain.state_dict()) | offsets(net)
    assert net.feature_info == plain.feature_info
    net.init_weights()
    assert not any(net.state_dict()[key].any() for key in offsets(net))


def test_it_learns_where_to_look() -> None:
    _, net = pair(zero_init_last=False)
    nn.functional.cross_entropy(net.train()(images(4)), torch.arange(4)).backward()
    for name in offsets(net):
        assert net.get_parameter(name).grad.abs().max() > 0, name


@pytest.mark.parametrize("half", [False, True])
def test_layout_and_half_precision_change_little(half: bool) -> None:
    # The layout alone in double precision: rounding moves the places that are read, and how far depends on the processor.
    dtype = torch.float32 if half else torch.float64
    _, net = pair(zero_init_last=False)
    rng = torch.Generator().manual_seed(4)  # of its own: other tests leave the global one anywhere
    for name in offsets(net):
        nn.init.normal_(net.get_parameter(name), std=0.05, generator=rng)
    net.to(dtype).eval()
    with torch.no_grad():
        z = net(images(dtype=dtype))
        net.to(memory_format=memory_format(net))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            again = net(images(dtype=dtype).contiguous(memory_format=torch.channels_last)).to(dtype)
    assert memory_format(net) == torch.channels_last
    assert (again - z).abs().max() <= (0.1 if half else 1e-12) * z.abs().max()


def test_weights_of_the_plain_net_fit(tmp_path: Path) -> None:
    plain, net = pair()
    with torch.no_grad():
        for value in plain.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.1, 0.2)
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    loaded = load_weights(net, Model(backbone="resnet18_deform", weights=str(tmp_path / "plain.safetensors")))
    assert set(loaded.fresh) == offsets(net)
    assert loaded.unused == ()
    with torch.no_grad():
        z, deformable_z = (each.double().eval()(images(dtype=torch.float64)) for each in (plain, net))
    torch.testing.assert_close(deformable_z, z, rtol=1e-12, atol=0)


def test_weights_of_its_own_must_be_whole(tmp_path: Path) -> None:
    _, net = pair()
    state = {key: torch.full_like(value, 0.25) for key, value in net.state_dict().items()}
    save_file(state, tmp_path / "whole.safetensors")
    model = Model(backbone="resnet18_deform", weights=str(tmp_path / "whole.safetensors"))
    assert load_weights(net, model).fresh == ()
    assert net.get_parameter("layer4.1.conv2.offset.bias").unique().tolist() == [0.25]
    del state["layer4.1.conv2.offset.bias"]
    save_file(state, tmp_path / "whole.safetensors")
    with pytest.raises(FgvcError, match=r"layer4\.1\.conv2\.offset\.bias: not in the file"):
        load_weights(net, model)
    _, plain = pair()
    del state["layer4.1.conv2.weight"]
    save_file({k: v for k, v in state.items() if "offset" not in k}, tmp_path / "whole.safetensors")
    with pytest.raises(FgvcError, match=r"layer4\.1\.conv2\.weight: not in the file"):
        load_weights(plain, model)


def test_timm_loads_the_imagenet_weights_of_the_plain_net(tmp_path: Path) -> None:
    net = plain_model("resnet18_deform", 5)
    own, theirs = net.pretrained_cfg, timm.get_pretrained_cfg("resnet18")
    assert (own["hf_hub_id"], own["url"], own["mean"]) == (theirs.hf_hub_id, theirs.url, theirs.mean)
    plain = plain_model("resnet18", 1000)
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    loaded = timm.create_model(
        "resnet18_deform",
        pretrained=True,
        num_classes=5,
        pretrained_cfg_overlay={"file": tmp_path / "model.safetensors"},
    )
    assert torch.equal(loaded.layer4[0].conv1.weight, plain.layer4[0].conv1.weight)
    assert loaded.num_classes == 5
    maps = timm.create_model("resnet18_deform", features_only=True)(images())
    assert [tuple(f.shape[1:]) for f in maps][-2:] == [(256, 4, 4), (512, 2, 2)]


def test_a_deformable_convolution_is_no_place_for_a_graft() -> None:
    _, net = pair()
    sites, refused = find_sites(net, SIZE)
    deformed = {name for name, module in net.named_modules() if isinstance(module, Deformable)}
    assert {name for name, reason in refused.items() if "deformable" in reason} == deformed == set(refused)
    assert math.prod(site.name not in deformed for site in sites)
    assert {site.name for site in sites} >= {f"{name}.offset" for name in deformed}


SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 16]}  # the last four of its 3x3 convolutions are deformable


def trained() -> nn.Module:
    """A trained net with branches beside a plain convolution and beside the one that finds the offsets."""
    _, net = pair(zero_init_last=False, **SMALL)
    torch.manual_seed(3)
    sites = [site for site in find_sites(net, SIZE)[0] if refusal(net.get_submodule(site.name)) is None]
    for site in [sites[1], next(site for site in sites if site.name.endswith("offset"))]:
        replace_conv(net, site, acb(net.get_submodule(site.name)))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim == 1 or "offset" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return net.eval()


def test_the_contract_holds_with_dynamo_and_torchscript_is_refused() -> None:
    batches = [images(6).numpy()]
    recipe: dict[str, Any] = {"backbone": "resnet18_deform", "num_classes": 5, "kwargs": SMALL, "size": SIZE}
    proven = PlainBackbone(**recipe, export=Export()).prove(trained(), batches)
    assert proven.structural.passed
    assert 0 < proven.numeric.folded_float64 <= 1e-9
    assert proven.behavioural.worst <= 1e-4
    assert proven.model.count(b"DeformConv") >= 4
    with pytest.raises(FgvcError, match=r"(?s)deform_conv2d.*set export\.exporter=dynamo"):
        export_onnx(pair(**SMALL)[1].eval(), size=SIZE, exporter="torchscript", opset=20)
