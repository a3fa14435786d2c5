"""Class maps against pytorch-grad-cam, against loops in float64 written from the formulas, and what they may not touch."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_grad_cam import GradCAM, GradCAMPlusPlus
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from fgvc.models.class_maps import (
    ClassMapper,
    Method,
    cam,
    closed_form,
    dominant,
    evaluating,
    grad_cam,
    grad_cam_plus_plus,
    normalised,
    refusal,
)
from tests.models.net import CLASSES, distinct_net

SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1,) * 4, "num_heads": (1, 1, 2, 2)}
VIT = {"img_size": 64, "global_pool": "avg"}
NETS: dict[str, tuple[int, dict, str]] = {  # name: size, settings, the module that makes the last features
    "resnet18": (96, {}, "layer4"),
    "mobilenetv3_small_100": (128, {}, "blocks"),
    "regnety_002": (96, {}, "final_conv"),
    "efficientnet_lite0": (96, {}, "bn2"),
    "test_vit": (64, VIT, "norm"),
    "swin_tiny_patch4_window7_224": (64, SWIN, "norm"),
}
METHODS: tuple[Method, ...] = ("cam", "gradcam", "gradcam++")


def pictures(size: int, count: int = 3) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def theirs(kind: type, net: nn.Module, layer: nn.Module, x: Tensor, labels: Tensor, reshape: object = None) -> Tensor:
    """pytorch-grad-cam's map before it is resized and scaled."""
    targets = [ClassifierOutputTarget(int(y)) for y in labels]
    with kind(net, [layer], reshape_transform=reshape) as method:
        method(x, targets)
        hooks = method.activations_and_grads
        raw = method.get_cam_image(x, layer, targets, hooks.activations[0].numpy(), hooks.gradients[0].numpy())
    return torch.from_numpy(np.maximum(raw, 0))


def tokens(f: Tensor) -> Tensor:
    return f[:, 1:].transpose(1, 2).unflatten(2, (4, 4))  # test_vit has one class token


RESHAPE = {"test_vit": tokens, "swin_tiny_patch4_window7_224": lambda f: f.permute(0, 3, 1, 2)}


@pytest.mark.parametrize("name", list(NETS))
def test_gradient_maps_are_those_of_pytorch_grad_cam(name: str) -> None:
    size, kwargs, layer = NETS[name]
    net, x, labels = distinct_net(name, **kwargs), pictures(size), torch.tensor([4, 0, 2])
    features = net.forward_features(x)
    for method, kind, scale in (("gradcam", GradCAM, 1), ("gradcam++", GradCAMPlusPlus, 1000)):
        with torch.no_grad():  # theirs adds 1e-6 to the square of the gradient, which must be much larger
            net.get_classifier().weight *= scale
        maps = ClassMapper(net)(features, [(labels, None)], method, (size, size))
        expected = theirs(kind, net, net.get_submodule(layer), x, labels, RESHAPE.get(name))
        assert maps.shape == expected.shape
        assert maps.dtype == torch.float32
        assert not maps.requires_grad
        assert expected.amax() > 0, "nothing would be compared"
        torch.testing.assert_close(maps / expected.amax(), expected / expected.amax(), rtol=2e-4, atol=1e-5)


def test_cam_is_its_formula_and_grad_cam_up_to_scale_and_relu() -> None:
    net, x, labels = distinct_net("resnet18"), pictures(96), torch.tensor([4, 0, 2])
    features = net.forward_features(x).detach()
    weight = net.fc.weight.detach()
    expected = torch.zeros(3, 3, 3, dtype=torch.float64)
    for b, y in enumerate(labels.tolist()):
        for k in range(512):
            expected[b] += float(weight[y, k]) * features[b, k].double()
    cam = ClassMapper(net)(features, [(labels, None)], "cam")
    torch.testing.assert_close(cam.double(), expected, rtol=1e-5, atol=1e-5)
    assert cam.amin() < 0 < cam.amax()
    torch.testing.assert_close(theirs(GradCAM, net, net.layer4, x, labels), cam.relu() / 9, rtol=1e-4, atol=1e-5)


def numbers(seed: int) -> tuple[Tensor, Tensor]:
    """Features and gradients in float64; some gradients are exactly 0."""
    rng = torch.Generator().manual_seed(seed)
    f, g = torch.rand(2, 2, 4, 3, 5, generator=rng, dtype=torch.float64).unbind()
    g = g - 0.5
    g[:, :, 0, :2] = 0
    return f, g


@settings(deadline=None)  # the first call in a process warms torch up
@given(st.integers(0, 2**32))
def test_grad_cam_plus_plus_is_its_formula(seed: int) -> None:
    f, g = numbers(seed)
    expected = torch.zeros(2, 3, 5, dtype=torch.float64)
    for b in range(2):
        for k in range(4):
            total, weight = sum(f[b, k].flatten().tolist()), 0.0
            for v in g[b, k].flatten().tolist():
                alpha = 0.0 if v == 0 else v**2 / (2 * v**2 + total * v**3)
                weight += alpha * max(v, 0.0)
            expected[b] += weight * f[b, k]
    torch.testing.assert_close(grad_cam_plus_plus(f, g), expected.clamp(min=0))


def test_small_gradients_of_large_maps_are_not_drowned() -> None:
    """g ~ W/(h w): at 448 pixels of 1e-4, whose square is smaller than other code's epsilon."""
    f, g = (part.float() for part in numbers(0))
    computed = [grad_cam_plus_plus(f, small).double() for small in (1e-4 * g, 1e-6 * g)]
    expected = torch.einsum("bchw,bc->bhw", f, g.relu().sum((2, 3))).double() / 2  # where the sum of f is no matter
    for maps, scale in zip(computed, (1e-4, 1e-6), strict=True):
        torch.testing.assert_close(maps / scale, expected, rtol=2e-3, atol=0)


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_grad_cam_is_its_formula(seed: int) -> None:
    f, g = numbers(seed)
    expected = torch.zeros(2, 3, 5, dtype=torch.float64)
    for b in range(2):
        for k in range(4):
            expected[b] += sum(g[b, k].flatten().tolist()) / 15 * f[b, k]
    torch.testing.assert_close(grad_cam(f, g), expected.clamp(min=0))
    torch.testing.assert_close(
        cam(f, g[:, :, 1, 2], torch.tensor([1, 0])), (g[[1, 0], :, 1, 2][:, :, None, None] * f).sum(1)
    )


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv4_conv_small"])  # the second has a batch norm in its head
def test_training_is_not_disturbed(name: str) -> None:
    net, labels = distinct_net(name, drop_rate=0.5), torch.tensor([4, 0, 2])
    expected = {
        m: ClassMapper(net)(net.forward_features(pictures(96)), [(labels, None)], m) for m in ("gradcam", "gradcam++")
    }
    net.train()
    list(net.children())[1].eval()  # a frozen part among those that train
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    next(net.parameters()).grad = None
    with evaluating(net):
        features = net.forward_features(pictures(96))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    assert features.requires_grad
    for method, maps in expected.items():
        with torch.no_grad() if method == "gradcam" else torch.enable_grad():
            again = ClassMapper(net)(features, [(labels, None)], method)
        torch.testing.assert_close(again, maps, msg="dropout, or the batch's own statistics")
    with evaluating(net):
        assert not any(module.training for module in net.modules())
    closed_form(net, (96, 96))
    refusal(net, (96, 96), "gradcam")
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert next(net.parameters()).grad is None
    assert all((p.grad == 3).all() for p in list(net.parameters())[1:])
    assert all(p.requires_grad for p in net.parameters())
    net.forward_head(features).sum().backward()  # the step's own graph is still whole


def test_train_modes_are_restored_even_after_an_error() -> None:
    net = distinct_net("resnet18").train()
    net.layer1.eval()
    modes = [module.training for module in net.modules()]
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        ClassMapper(net)(net.forward_features(pictures(64)), [(torch.tensor([0, 99, 0]), None)], "gradcam")
    assert [module.training for module in net.modules()] == modes


@pytest.mark.parametrize("method", METHODS)
def test_features_made_in_inference_mode_have_maps_too(method: Method) -> None:
    net, target = distinct_net("resnet18"), [(torch.tensor([4, 0, 2]), None)]
    with torch.inference_mode():
        maps = ClassMapper(net)(net.forward_features(pictures(96)), target, method)
    torch.testing.assert_close(maps, ClassMapper(net)(net.forward_features(pictures(96)), target, method))


@pytest.mark.parametrize("method", METHODS)
def test_maps_under_autocast_are_in_float32(method: Method) -> None:
    net, target = distinct_net("resnet18"), [(torch.tensor([4, 0, 2]), None)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = net.forward_features(pictures(96)).bfloat16()
        maps = ClassMapper(net)(features, target, method)
    assert maps.dtype == torch.float32
    assert torch.equal(maps, ClassMapper(net)(features.float(), target, method))
    assert features.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "kwargs", "cam_refused", "gradient_refused"),
    [
        ("resnet18", {}, None, None),
        ("efficientnet_lite0", {}, None, None),
        ("mobilenetv3_small_100", {}, "reads 1024 values, the last feature map has 576; use gradcam", None),
        ("resnet18", {"global_pool": "max"}, "more than global average pooling", None),
        ("resnet18", {"num_classes": 0}, "the classifier is Identity, not one linear layer", None),
        (
            "test_vit",
            {"img_size": 64},
            "more than global average pooling",
            "VisionTransformer reads the class token alone",
        ),
        ("test_vit", VIT, "more than global average pooling", None),  # a norm between them
        ("test_vit", VIT | {"weight_init": "jax"}, "more than global average pooling", None),  # a classifier of zeros
        ("test_vit", VIT | {"fc_norm": False}, None, None),
        ("test_vit", VIT | {"fc_norm": False, "class_token": False}, None, None),
        ("swin_tiny_patch4_window7_224", SWIN, None, None),
    ],
)
def test_nets_without_a_map_are_refused_by_reason(
    name: str, kwargs: dict, cam_refused: str | None, gradient_refused: str | None
) -> None:
    torch.manual_seed(0)
    size = (64, 64)
    net = timm.create_model(name, **{"num_classes": CLASSES} | kwargs).train()
    linear, reason = closed_form(net, size)
    assert (linear is None) == (cam_refused is not None)
    assert (cam_refused or "closed-form class activation maps").removesuffix("; use gradcam") in reason
    if linear is not None:
        assert linear is net.get_classifier()
    for method, expected in (("cam", cam_refused), ("gradcam", gradient_refused), ("gradcam++", gradient_refused)):
        why = refusal(net, size, method)
        assert (why is None) if expected is None else (why is not None and expected in why)
    assert net.training


def test_a_classifier_that_starts_at_zero_is_not_refused() -> None:
    net = distinct_net("mobilenetv3_small_100")
    nn.init.zeros_(net.classifier.weight)
    assert refusal(net, (64, 64), "gradcam") is None


@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224"])
def test_grad_cam_equals_cam_where_that_has_a_closed_form(name: str) -> None:
    """On tokens and NHWC features as on NCHW ones: relu(cam) / cells."""
    _, kwargs, _ = NETS[name]
    net = distinct_net(name, **kwargs | ({"fc_norm": False} if name == "test_vit" else {}))
    features, target = net.forward_features(pictures(64)), [(torch.tensor([1, 3, 3]), None)]
    cam = ClassMapper(net)(features, target, "cam", (64, 64))
    assert cam.amin() < 0 < cam.amax()
    torch.testing.assert_close(
        ClassMapper(net)(features, target, "gradcam", (64, 64)), cam.relu() / cam[0].numel(), rtol=1e-4, atol=1e-5
    )


def test_normalised_maps_reach_0_and_1_and_flat_or_not_finite_ones_are_zero() -> None:
    good = torch.tensor([[-2.0, 0.0], [1.0, 2.0]])
    nan, inf, minus = good.clone(), good.clone(), good.clone()
    nan[0, 1], inf[1, 1], minus[0, 0] = torch.nan, torch.inf, -torch.inf
    flat, ripple, small = torch.full((2, 2), 7.0), torch.tensor([[7.0, 7.0], [7.0, 7.000001]]), good * 1e-12
    maps = normalised(torch.stack([good, nan, inf, minus, flat, ripple, small, good * 0]))
    expected = torch.tensor([[0.0, 0.5], [0.75, 1.0]])
    torch.testing.assert_close(maps[0], expected)
    torch.testing.assert_close(maps[6], expected)
    assert (maps[[1, 2, 3, 4, 5, 7]] == 0).all()
    assert (normalised(good[None] * 1.5e38) == 0).all(), "a span that float32 can't hold"


def test_the_dominant_label_is_the_one_of_most_weight() -> None:
    a, b, c = (torch.tensor(labels) for labels in ([1, 2, 3], [4, 5, 6], [7, 8, 9]))
    light, middle, heavy = torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0.3, 0.6, 0.1]), torch.tensor([1.5, 0.1, 0.2])
    assert dominant([(a, None)]).tolist() == [1, 2, 3]
    assert dominant([(a, light * 0)]).tolist() == [1, 2, 3]
    assert dominant([(a, light), (b, middle)]).tolist() == [4, 5, 3]
    assert dominant([(a, light), (b, middle), (c, heavy)]).tolist() == [7, 5, 3]
    assert dominant([(a, None), (c, heavy)]).tolist() == [7, 2, 3]


def test_a_mixed_target_is_mapped_by_its_dominant_label() -> None:
    net, x = distinct_net("resnet18"), pictures(96)
    labels, others = torch.tensor([4, 0, 2]), torch.tensor([1, 1, 1])
    weight = torch.tensor([0.9, 0.2, 0.6])
    mixed = ClassMapper(net)(net.forward_features(x), [(labels, weight), (others, 1 - weight)], "gradcam")
    assert torch.equal(mixed, ClassMapper(net)(net.forward_features(x), [(torch.tensor([4, 1, 2]), None)], "gradcam"))
