"""The multi-scale head: its terms from the stages themselves, in every layout, under activation checkpointing."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.errors import FgvcError
from fgvc.models.backbone import feature_map
from fgvc.runs.step import StepModule
from fgvc.techniques.api import Batch, Draws
from fgvc.techniques.mixup.settings import MixupSettings
from fgvc.techniques.multiscale_head.settings import MultiscaleHeadSettings
from fgvc.techniques.registry import build_technique

CLASSES, SIZE = 5, (72, 56)  # odd sides in the later stages
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # losses are taken in float32
SWIN = {"window_size": 2, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "drop_path_rate": 0.0}
NETS = {  # with the last blocks of their last three stages
    "NCHW": ("test_resnet", {}, ["layer2.0", "layer3.0", "layer4.0"]),
    "NHWC": ("swin_tiny_patch4_window7_224", {"img_size": 64, **SWIN}, ["layers.1", "layers.2", "layers.3"]),
    "tokens": ("test_vit", {"img_size": 64}, ["blocks.3", "blocks.4", "blocks.5"]),
}


def net(name: str = "test_resnet", **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, **kwargs).double()


def batch(count: int = 3, size: tuple[int, int] = SIZE) -> Batch:
    x = torch.randn(count, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = (torch.arange(count) * 2) % CLASSES
    return Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=y, geometry=torch.zeros(count, 2, 3))


def run_step(
    model: nn.Module, data: Batch, *, grad_checkpointing: bool = False, progress: float = 0.0, **settings: object
) -> tuple[StepModule, dict[str, Tensor]]:
    technique = build_technique(MultiscaleHeadSettings(**settings))
    size = (data.x.shape[2], data.x.shape[3])
    torch.manual_seed(3)
    step = StepModule(model, {"multiscale_head": technique}, size=size, grad_checkpointing=grad_checkpointing).double().train()
    step.attach_hooks()
    return step, step(data, Draws(progress))[0]


def stages(model: nn.Module, names: list[str], x: Tensor) -> list[Tensor]:
    """Maps (B,C,h,w) by hooks of the test's own."""
    outputs: dict[str, Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _m, _x, f, name=name: outputs.update({name: f}))
    with torch.no_grad():
        model.train().forward_features(x)
    return [feature_map(model, outputs[name], x.shape[2:]) for name in names]


@pytest.mark.parametrize("layout", NETS)
def test_the_terms_are_those_of_the_stages(layout: str) -> None:
    name, kwargs, blocks = NETS[layout]
    data = batch(size=(64, 64))
    step, losses = run_step(net(name, **kwargs), data, fused=0.5, each=0.25)
    maps = stages(net(name, **kwargs), blocks, data.x)
    branches = step.branches["multiscale_head"]
    with torch.no_grad():
        fused, weights = branches["fusion"](maps)
        z = fused.sum((2, 3)) / fused[0, 0].numel() @ branches["fused"].weight.T + branches["fused"].bias
        torch.testing.assert_close(losses["multiscale_head.fused"].double(), F.cross_entropy(z, data.labels), **CLOSE)
        terms = []
        for f, (norm, linear) in zip(maps, branches["each"], strict=True):
            v = f.mean((2, 3))
            v = (v - v.mean(1, keepdim=True)) / (v.var(1, unbiased=False, keepdim=True) + norm.eps).sqrt()
            terms.append(float(F.cross_entropy(v @ linear.weight.T + linear.bias, data.labels)))
    assert float(losses["multiscale_head.each"].detach()) == pytest.approx(sum(terms) / 3, rel=1e-5)
    shares = [float(losses[f"multiscale_head.share_of_{stage}"]) for stage in (-3, -2, -1)]
    assert shares == pytest.approx(weights.mean((0, 2, 3)).tolist())
    assert sum(shares) == pytest.approx(1)
    total = losses["base"] + 0.5 * losses["multiscale_head.fused"] + 0.25 * losses["multiscale_head.each"]
    torch.testing.assert_close(losses["loss"], total)


def test_the_level_and_its_width_are_as_told() -> None:
    channels = [info["num_chs"] for info in net().feature_info]
    for level, sides in ((None, (5, 4)), (-3, (9, 7)), ("features", (3, 2))):
        step, _ = run_step(net(), batch(), stages=(-3, -2, "features"), level=level)
        pictures = step.contexts["multiscale_head"].shown
        assert {name: tuple(maps.shape) for name, (_, maps) in pictures.items()} == {
            f"weight of stage {stage}": (3, *sides) for stage in (-3, -2, "features")
        }
        width = {None: channels[-2], -3: channels[-3], "features": channels[-1]}[level]
        assert step.branches["multiscale_head"]["fused"].in_features == width
    step, _ = run_step(net(), batch(), width=7)
    assert step.branches["multiscale_head"]["fused"].in_features == 7
    step, _ = run_step(net("resnet18"), batch(), stages=(-2, -1))  # of two the second, with 512 channels
    assert step.branches["multiscale_head"]["fused"].in_features == 256


@pytest.mark.parametrize("term", ["fused", "each"])
def test_each_term_teaches_every_stage_and_all_that_it_added(term: str) -> None:
    step, losses = run_step(net(zero_init_last=False), batch(), **{{"fused": "each", "each": "fused"}[term]: 0})
    losses[f"multiscale_head.{term}"].backward()
    for stage in ("layer2", "layer3", "layer4"):
        assert all(p.grad.abs().max() > 0 for p in step.net.get_submodule(stage).parameters() if p.ndim > 1), stage
    assert step.net.get_classifier().weight.grad is None
    assert all(parameter.grad is not None for parameter in step.branches.parameters())


def test_what_has_no_weight_is_not_built() -> None:
    step, losses = run_step(net(), batch(), fused=0)
    assert set(step.branches["multiscale_head"]) == {"each"}
    assert set(losses) == {"base", "loss", "multiscale_head.each"}
    step, losses = run_step(net(), batch(), each=0)
    assert set(step.branches["multiscale_head"]) == {"fusion", "fused"}
    step, losses = run_step(net(), batch(), each=0, fused=0)
    assert not step.branches
    assert not step.attachments.hooked
    assert set(losses) == {"base", "loss"}
    step, losses = run_step(net(), batch(), each=((0.0, 0.0), (1.0, 1.0)))
    assert "multiscale_head.each" not in losses
    assert set(step.branches["multiscale_head"]) == {"fusion", "fused", "each"}


@pytest.mark.parametrize("layout", NETS)
def test_recomputed_activations_change_nothing(layout: str) -> None:
    name, kwargs, _ = NETS[layout]
    data, runs = batch(size=(64, 64)), []
    for grad_checkpointing in (False, True):
        step, losses = run_step(net(name, **kwargs), data, grad_checkpointing=grad_checkpointing)
        losses["loss"].backward()
        runs.append((losses, {key: p.grad for key, p in step.named_parameters()}))
    (plain, expected), (again, gradients) = runs
    torch.testing.assert_close(again, plain)
    assert None not in expected.values()
    torch.testing.assert_close(gradients, expected)


def test_mixed_images_teach_with_both_labels() -> None:
    settings = (MixupSettings(alpha=1.0), MultiscaleHeadSettings())
    techniques = {technique.kind: build_technique(technique) for technique in settings}
    step = StepModule(net(), techniques, size=SIZE).double().train()
    step.attach_hooks()
    losses, views = step(batch(4), step.draw(batch(4), 0.0, seed=1, step=2))
    maps = stages(net(), NETS["NCHW"][2], views[0].x)
    branches = step.branches["multiscale_head"]
    z = branches["fused"](branches["fusion"](maps)[0].mean((2, 3)))
    (y, w), (other, v) = views[0].target
    logs = F.log_softmax(z, 1)
    expected = -(w * logs[range(4), y] + v * logs[range(4), other]).mean()
    torch.testing.assert_close(losses["multiscale_head.fused"].double(), expected, **CLOSE)


def test_images_of_another_size_are_taken() -> None:
    step, _ = run_step(net(), batch(size=(64, 64)))
    losses, _ = step(batch(size=(88, 40)), Draws(0.0))
    assert torch.isfinite(losses["loss"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": (-9, -1)}, r"techniques\.multiscale_head: stage -9: this backbone has 5 stages"),
        ({"stages": (-1, 4)}, r"techniques\.multiscale_head\.stages: \[-1, 4\] names a stage twice"),
    ],
)
def test_stages_that_are_not_there_are_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(FgvcError, match=message):
        run_step(net(), batch(), **settings)


def test_a_layout_that_nobody_knows_is_refused_by_name() -> None:
    model = net()
    model.layer3.register_forward_hook(lambda _m, _x, f: None)
    model.layer3[0].register_forward_hook(lambda _m, _x, f: f.permute(0, 2, 1, 3))
    model.layer4.register_forward_pre_hook(lambda _m, x: (x[0].permute(0, 2, 1, 3),))
    with pytest.raises(FgvcError, match=r"techniques\.multiscale_head: stage -2 should have \d+ channels and gives"):
        run_step(model, batch())
