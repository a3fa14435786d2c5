"""Every method by name against formulas in float64 that share no code with it, on three kinds of backbone; and what looking may
not change."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
from sklearn.decomposition import KernelPCA
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.errors import FgvcError
from fgvc.models.cam import methods as method
from fgvc.models.cam import offline
from fgvc.models.cam.offline import BY_CHANNEL, LIBRARY, METHODS, class_maps_of, method_name, offline_maps
from fgvc.models.class_maps import evaluating
from tests.models.net import CLASSES, distinct_net

SIZE = (64, 96)  # height, width
NETS: dict[str, dict] = {
    "resnet18": {},  # (B,C,h,w), pooling and a linear layer
    "mobilenetv3_small_100": {},  # a convolution after the pooling
    "test_vit": {"img_size": SIZE, "patch_size": 16, "global_pool": "avg"},  # tokens
}
HEAD = "resnet18"  # where cam has its closed form
COUNT = 6  # channels tried one by one


def pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([3, 1])


class Truth:
    """Feature maps A and gradients g of a net in float64, as (B,C,h,w) numpy, by plain autograd."""

    def __init__(self, name: str, net: nn.Module) -> None:
        self.net, self.tokens = copy.deepcopy(net).double(), name == "test_vit"
        with torch.no_grad():
            self.a = self.grid(self.net.forward_features(pictures().double())).numpy()

    def grid(self, features: Tensor) -> Tensor:
        if not self.tokens:
            return features
        patches = features[:, 1:] if features.shape[1] == 25 else features
        return patches.reshape(len(features), SIZE[0] // 16, SIZE[1] // 16, -1).permute(0, 3, 1, 2)

    def gradient(self, x: Tensor, score: Callable[[Tensor], Tensor]) -> np.ndarray:
        leaf = self.net.forward_features(x.double()).detach().requires_grad_()
        (g,) = torch.autograd.grad(score(self.net.forward_head(leaf)), leaf)
        return self.grid(g).numpy()

    def logit(self, z: Tensor) -> Tensor:
        return z[torch.arange(len(z)), LABELS].sum()

    def p(self, x: Tensor, label: int) -> float:
        with torch.no_grad():
            return float(self.net(x[None].double()).softmax(1)[0, label])

    def up(self, plane: np.ndarray) -> np.ndarray:
        """A map enlarged and normalised, n(up(A_k)): bilinear with pixel centres at halves, written out."""
        (h, w), (rows, columns) = plane.shape, SIZE
        y = np.clip((np.arange(rows) + 0.5) * h / rows - 0.5, 0, h - 1)
        x = np.clip((np.arange(columns) + 0.5) * w / columns - 0.5, 0, w - 1)
        along = np.array([np.interp(y, np.arange(h), column) for column in plane.T]).T
        large = np.array([np.interp(x, np.arange(w), row) for row in along])
        return (large - large.min()) / (large.max() - large.min())


def combined(weights: np.ndarray, a: np.ndarray) -> np.ndarray:
    return np.einsum("bc,bchw->bhw", weights, a)


def principal(a: np.ndarray) -> np.ndarray:
    """The first principal component of the cells, by the covariance's eigenvectors; its sign is arbitrary."""
    cells = a.reshape(*a.shape[:2], -1).transpose(0, 2, 1)
    cells = cells - cells.mean(1, keepdims=True)
    first = np.linalg.eigh(cells.transpose(0, 2, 1) @ cells)[1][..., -1]
    return np.einsum("bnc,bc->bn", cells, first).reshape(len(a), *a.shape[2:])


def kernel_principal(a: np.ndarray) -> np.ndarray:
    components = []
    for cells in a.reshape(*a.shape[:2], -1).transpose(0, 2, 1):
        centred = cells - cells.mean(0)
        kernel = np.tanh(centred @ centred.T / cells.shape[1] + 1)
        j = np.eye(len(kernel)) - 1 / len(kernel)
        values, vectors = np.linalg.eigh(j @ kernel @ j)
        components.append(vectors[:, -1] * np.sqrt(values[-1]))
    return np.reshape(components, (len(a), *a.shape[2:]))


def smooth(t: Truth) -> np.ndarray:
    rng = torch.Generator().manual_seed(0)
    x, n = pictures().double(), offline.SAMPLES["smoothgradcam++"]
    spread = 0.15 * (x.flatten(1).max(1).values - x.flatten(1).min(1).values)
    g = np.stack(
        [
            t.gradient(x + spread[:, None, None, None] * torch.randn(3, *SIZE, generator=rng).double(), t.logit)
            for _ in range(n)
        ]
    )
    d1, d2, d3 = g.mean(0), (g**2).mean(0), (g**3).mean(0)
    below = 2 * d2 + t.a.sum((2, 3), keepdims=True) * d3
    alpha = np.divide(d2, below, out=np.zeros_like(d2), where=d2 != 0)
    return combined((alpha * np.maximum(d1, 0)).sum((2, 3)), t.a)


def plus_plus(t: Truth) -> np.ndarray:
    g = t.gradient(pictures(), t.logit)
    below = 2 * g**2 + t.a.sum((2, 3), keepdims=True) * g**3
    alpha = np.divide(g**2, below, out=np.zeros_like(g), where=g != 0)
    return combined((alpha * np.maximum(g, 0)).sum((2, 3)), t.a).clip(min=0)


def scored(t: Truth, *, noise: float = 0.0, samples: int = 1) -> np.ndarray:
    weights = np.zeros(t.a.shape[:2])
    for row, (x, label) in enumerate(zip(pictures(), LABELS.tolist(), strict=True)):
        for k in np.argsort(-t.a[row].mean((1, 2)))[:COUNT]:
            rng = torch.Generator().manual_seed(0)
            draws = [torch.randn(SIZE, generator=rng) for _ in range(samples)]
            mask = torch.from_numpy(t.up(t.a[row, k]))
            weights[row, k] = np.mean([t.p(x * (mask + noise * draw), label) for draw in draws])
    return combined(weights, t.a)


def ablated(t: Truth) -> np.ndarray:
    weights = np.zeros(t.a.shape[:2])
    with torch.no_grad():
        f = t.net.forward_features(pictures().double())
        whole = t.net.forward_head(f)
        for row, label in enumerate(LABELS.tolist()):
            for k in np.argsort(-t.a[row].mean((1, 2)))[:COUNT]:
                less = f.clone()
                if t.tokens:
                    less[row, less.shape[1] - 24 :, k] = 0
                else:
                    less[row, k] = 0
                weights[row, k] = whole[row, label] - t.net.forward_head(less)[row, label]
    return combined(weights, t.a)


def finer(t: Truth) -> np.ndarray:
    def score(z: Tensor) -> Tensor:
        total = torch.zeros(())
        for row, label in zip(z, LABELS.tolist(), strict=True):
            apart = (row - row[label]).abs().tolist()
            others = sorted((k for k in range(CLASSES) if k != label), key=apart.__getitem__)[:3]
            p = row.softmax(0)[others]
            total = total + (p * (row[label] - row[others])).sum() / p.sum()
        return total

    return combined(t.gradient(pictures(), score).mean((2, 3)), t.a)


def fem(t: Truth) -> np.ndarray:
    limit = t.a.mean((2, 3), keepdims=True) + 2 * t.a.std((2, 3), keepdims=True)
    return combined((t.a > limit).mean((2, 3)), t.a)


def by_gradient(formula: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[Truth], np.ndarray]:
    return lambda t: formula(t.a, t.gradient(pictures(), t.logit))


TRUTH: dict[str, Callable[[Truth], np.ndarray]] = {
    "cam": lambda t: combined(t.net.get_classifier().weight.detach().numpy()[LABELS], t.a),
    "gradcam": by_gradient(lambda a, g: combined(g.mean((2, 3)), a)),
    "gradcam++": plus_plus,
    "smoothgradcam++": smooth,
    "scorecam": scored,
    "sscam": lambda t: scored(t, noise=2.0, samples=offline.SAMPLES["sscam"]),
    "ablationcam": ablated,
    "finercam": finer,
    "hirescam": by_gradient(lambda a, g: (a * g).sum(1)),
    "xgradcam": by_gradient(lambda a, g: combined((g * a / (a.sum((2, 3), keepdims=True) + 1e-7)).sum((2, 3)), a)),
    "layercam": by_gradient(lambda a, g: (np.maximum(g, 0) * a).sum(1)),
    "gradcamelementwise": by_gradient(lambda a, g: np.maximum(g * a, 0).sum(1)),
    "eigencam": lambda t: principal(t.a),
    "eigengradcam": by_gradient(lambda a, g: principal(a * g)),
    "segeigencam": by_gradient(lambda a, g: principal(a * abs(g))),
    "kpcacam": lambda t: kernel_principal(t.a),
    "fem": fem,
}
SIGNLESS = {
    "eigencam",
    "eigengradcam",
    "segeigencam",
    "kpcacam",
}  # of a principal component only the direction is defined


@pytest.mark.parametrize("name", NETS)
def test_every_method_against_its_formula(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(TRUTH) == set(METHODS)
    monkeypatch.setattr(offline, "SAMPLES", {"smoothgradcam++": 3, "sscam": 2})
    monkeypatch.setattr(offline, "FORWARD", 4)  # in pieces
    net = distinct_net(name, **NETS[name])
    truth, chosen = Truth(name, net), [method for method in METHODS if method != "cam" or name == HEAD]
    with class_maps_of(net, SIZE, chosen, channels=COUNT) as look:
        for kind in chosen:
            maps, raw = look(pictures(), LABELS, kind)
            expected = TRUTH[kind](truth)
            assert raw.dtype == maps.dtype == torch.float32
            for map_, ours, by_hand in zip(maps.numpy(), raw.numpy(), expected, strict=True):
                signed = -by_hand if kind in SIGNLESS and (ours * by_hand).sum() < 0 else by_hand
                np.testing.assert_allclose(ours, signed, atol=2e-4 * abs(signed).max(), rtol=1e-3, err_msg=kind)
                if kind == "segeigencam":
                    assert abs(ours.max()) >= abs(ours.min()), "the sign that the paper corrects"
                if ours.max() > 0:
                    cut = ours if kind in ("scorecam", "sscam") else ours.clip(min=0)
                    small = torch.from_numpy(cut[None, None])
                    large = F.interpolate(small, SIZE, mode="bilinear", align_corners=False)[0, 0].numpy().clip(min=0)
                    large = (large - large.min()) / np.ptp(large)
                    np.testing.assert_allclose(map_, large, atol=2e-5, err_msg=kind)


@pytest.mark.parametrize(
    ("kinds", "bias", "scale"),
    [(("scorecam", "sscam"), -140.0, 1.0), (("gradcam", "gradcam++", "hirescam", "layercam"), 0.0, 1e-7)],
)
def test_maps_of_the_most_unlikely_classes_reach_from_0_to_1(kinds: tuple[str, ...], bias: float, scale: float) -> None:
    """The weights of Score-CAM are probabilities, here of 1e-60; those of Grad-CAM are gradients, which may be small, too."""
    net = distinct_net(HEAD)
    with torch.no_grad():
        net.get_classifier().bias[LABELS] += bias
        net.get_classifier().weight[LABELS] *= scale
    with class_maps_of(net, SIZE, kinds, channels=40) as look:
        for kind in kinds:
            maps, raw = look(pictures(), LABELS, kind)
            assert raw.abs().max() < 1e-6, kind
            spoken = maps.amax((1, 2)) > 0
            assert spoken.any(), kind
            assert maps[spoken].amax((1, 2)).eq(1).all(), kind
            assert maps.amin((1, 2)).eq(0).all(), kind


def test_kernel_pca_is_the_same_every_time_and_the_library_s_where_that_is_exact() -> None:
    """With more than 200 cells the library's solver starts at random, and so it gives another sign or another map each time."""
    a = np.random.default_rng(0).normal(size=(2, 5, 15, 16)).astype(np.float32)
    results = []
    for seed in (0, 1):
        np.random.seed(seed)  # the library's
        results.append(method.KPCACAM.get_cam_image(None, None, None, None, a, None, False))  # type: ignore[arg-type]
    assert results[0].tobytes() == results[1].tobytes()
    cells = a.reshape(2, 5, -1).transpose(0, 2, 1)
    for ours, own in zip(results[0], cells - cells.mean(1, keepdims=True), strict=True):
        exact = KernelPCA(n_components=1, kernel="sigmoid", eigen_solver="dense").fit_transform(np.float64(own))
        np.testing.assert_allclose(ours.ravel(), exact[:, 0], rtol=1e-4, atol=1e-6)
        assert ours.max() >= -ours.min()


def test_cam_is_grad_cam_up_to_scale_where_pooling_and_a_linear_layer_are_the_head() -> None:
    net = distinct_net(HEAD)
    with class_maps_of(net, SIZE, ["cam", "gradcam", "hirescam", "ablationcam"]) as look:
        raw = {kind: look(pictures(), LABELS, kind)[1] for kind in ("cam", "gradcam", "hirescam", "ablationcam")}
    cells = raw["cam"][0].numel()
    torch.testing.assert_close(raw["gradcam"] * cells, raw["cam"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(raw["hirescam"] * cells, raw["cam"], rtol=1e-4, atol=1e-4)
    a = net.forward_features(pictures()).detach()
    falls = net.get_classifier().weight[LABELS].detach() * a.mean((2, 3))
    torch.testing.assert_close(raw["ablationcam"], torch.einsum("bc,bchw->bhw", falls, a), rtol=1e-3, atol=1e-3)


def test_without_noise_the_smooth_methods_are_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "SIGMA", {"smoothgradcam++": 0.0, "sscam": 0.0})
    with class_maps_of(distinct_net("mobilenetv3_small_100"), SIZE, ["gradcam++"], channels=COUNT) as look:
        for smoothed, plain in (("smoothgradcam++", "gradcam++"), ("sscam", "scorecam")):
            smoothed_maps, expected = (look(pictures(), LABELS, kind)[1].clamp(min=0) for kind in (smoothed, plain))
            torch.testing.assert_close(smoothed_maps, expected, rtol=1e-3, atol=1e-6)


def test_a_map_does_not_depend_on_its_batch() -> None:
    with class_maps_of(distinct_net("mobilenetv3_small_100"), SIZE, ["gradcam"], channels=3) as look:
        for kind in ("gradcam", "smoothgradcam++", "scorecam", "ablationcam", "finercam"):
            both, alone = look(pictures(), LABELS, kind)[1], look(pictures()[1:], LABELS[1:], kind)[1]
            torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kwargs", [{}, {"global_pool": "token"}])
def test_class_tokens_are_tapped_before_the_last_block(kwargs: dict) -> None:
    """The patches of the last features have no gradient there; what the last block reads of them has."""
    net = distinct_net("test_vit", img_size=64, **kwargs)
    x, y = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2])
    with class_maps_of(net, (64, 64), ["gradcam", "ablationcam", "scorecam"], channels=4) as look:
        torch.testing.assert_close(look.logits(x), net(x))
        raw = {kind: look(x, y, kind)[1] for kind in ("gradcam", "ablationcam", "scorecam")}
    inputs: list[Tensor] = []
    handle = net.blocks[-1].norm1.register_forward_hook(lambda m, i, o: inputs.append(o))
    logits = net(x)
    handle.remove()
    (g,) = torch.autograd.grad(logits[[0, 1], y].sum(), inputs[0])
    a, g = ((t[:, 1:].transpose(1, 2).unflatten(2, (4, 4))).detach() for t in (inputs[0], g))
    torch.testing.assert_close(raw["gradcam"], torch.einsum("bc,bchw->bhw", g.mean((2, 3)), a), rtol=1e-3, atol=1e-6)
    assert g.abs().max() > 0
    weights = torch.zeros(a.shape[:2])
    for row in range(2):
        for k in a[row].mean((1, 2)).argsort(descending=True)[:4].tolist():
            changed = inputs[0].detach().clone()
            changed[row, 1:, k] = 0
            handle = net.blocks[-1].norm1.register_forward_hook(lambda m, i, o, new=changed: new)
            weights[row, k] = (logits - net(x))[row, y[row]].detach()
            handle.remove()
    torch.testing.assert_close(raw["ablationcam"], torch.einsum("bc,bchw->bhw", weights, a), rtol=1e-3, atol=1e-5)


def test_the_net_is_left_as_it_was() -> None:
    """Mode of every module, flags, gradients, hooks, buffers, and so every bit of what it says."""
    net = distinct_net("mobilenetv3_small_100", drop_rate=0.5).train()
    net.blocks[0].eval()
    next(net.parameters()).requires_grad_(False)
    net(pictures()).sum().backward()

    def state() -> tuple:
        with evaluating(net), torch.no_grad():
            logits = net(pictures())
        return (
            [module.training for module in net.modules()],
            [p.requires_grad for p in net.parameters()],
            [None if p.grad is None else p.grad.numpy().tobytes() for p in net.parameters()],
            [len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in net.modules()],
            {key: value.numpy().tobytes() for key, value in net.state_dict().items()},
            logits.numpy().tobytes(),
        )

    before, modules = state(), [id(module) for module in net.modules()]
    for kind in METHODS[1:]:
        with class_maps_of(net, SIZE, [kind], channels=2) as look:
            look(pictures(), LABELS, kind)
    assert state() == before
    assert [id(module) for module in net.modules()] == modules, "no layer was exchanged"
    with pytest.raises(RuntimeError), class_maps_of(net, SIZE, ["gradcam"]) as look:
        look(pictures(), torch.tensor([99, 99]), "gradcam") if False else look(
            torch.zeros(1, 7, 8, 8), LABELS, "gradcam"
        )
    assert state() == before


def test_hooks_are_removed_after_an_unknown_class() -> None:
    net = distinct_net(HEAD)
    with class_maps_of(net, SIZE, ["gradcam"]) as look, pytest.raises(IndexError):
        look(pictures(), torch.tensor([99, 99]), "gradcam")
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize(
    "name", ["GradCAM", "Grad-CAM", "gradcam", "GradCAMPlusPlus", "Smooth Grad-CAM++", "SS-CAM", "KPCA_CAM"]
)
def test_names_as_papers_and_libraries_spell_them(name: str) -> None:
    assert method_name(name) in METHODS


def test_other_names_are_refused_with_the_reason() -> None:
    with pytest.raises(FgvcError, match=r"FullGrad: it adds up the biases.*there are cam, gradcam"):
        method_name("FullGrad")
    with pytest.raises(FgvcError, match=r"no method 'gradcan'; there are cam, gradcam"):
        method_name("gradcan")
    import pytorch_grad_cam

    theirs = {kind.lower() for kind in dir(pytorch_grad_cam) if kind.lower().endswith("cam") and kind[0].isupper()}
    for kind in theirs - set(offline.REFUSED):
        assert method_name(kind) in METHODS, "every one of the library's is either there or refused by name"
    for kind in LIBRARY.values():
        assert hasattr(pytorch_grad_cam, kind)


def test_nets_that_can_have_no_such_map_are_refused() -> None:
    net = distinct_net("mobilenetv3_small_100")
    with pytest.raises(FgvcError, match=r"cam: .*use gradcam"), class_maps_of(net, SIZE, ["cam"]):
        pass
    pit = timm.create_model("pit_ti_224", num_classes=3, img_size=64)
    with pytest.raises(FgvcError, match="class token"), class_maps_of(pit, (64, 64), ["gradcam"]):
        pass


@pytest.mark.parametrize(
    ("name", "kwargs", "norm", "size", "cells"),
    [
        ("vit_tiny_patch16_224", {"dynamic_img_size": True, "depth": 2}, "blocks.1.norm1", (144, 256), (9, 16)),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True, "depth": 2}, "blocks.1.norm1", (112, 448), (7, 28)),
        (
            "flexivit_small",
            {"dynamic_img_size": True, "depth": 2, "reg_tokens": 2},
            "blocks.1.norm1",
            (64, 128),
            (4, 8),
        ),
        ("xcit_nano_12_p16_224", {"depth": 1}, "cls_attn_blocks.1.norm1", (144, 256), (9, 16)),
        ("cait_xxs24_224", {"img_size": (64, 256), "depth": 1}, "blocks_token_only.1.norm1", (64, 256), (4, 16)),
    ],
)
def test_class_tokens_read_patches_on_grids_that_are_no_squares(
    name: str, kwargs: dict, norm: str, size: tuple[int, int], cells: tuple[int, int]
) -> None:
    """Cell (i, j) of the map is token `prefix + i * columns + j`, weighted by hand."""
    net = distinct_net(name, **kwargs)
    x, y = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1)), torch.tensor([2])
    with class_maps_of(net, size, ["gradcam"]) as look:
        assert look.cells == cells
        maps, raw = look(x, y, "gradcam")
    normed: list[Tensor] = []
    handle = net.get_submodule(norm).register_forward_hook(lambda m, i, o: normed.append(o))
    z = net(x)
    handle.remove()
    (g,) = torch.autograd.grad(z[0, 2], normed[0])
    prefix = normed[0].shape[1] - cells[0] * cells[1]
    assert prefix == net.num_prefix_tokens
    patches, weight = normed[0][0, prefix:].detach(), g[0, prefix:].mean(0)
    by_hand = [[float(patches[i * cells[1] + j] @ weight) for j in range(cells[1])] for i in range(cells[0])]
    torch.testing.assert_close(raw[0], torch.tensor(by_hand), rtol=1e-3, atol=1e-3 * float(raw.abs().max()))
    assert maps.shape == (1, *size)


def test_the_cost_of_each_method_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    net = distinct_net(HEAD)
    costs = {}
    for channels in (None, 10, 0, 9999):
        with class_maps_of(net, SIZE, ["gradcam"], channels=channels) as look:
            costs[channels] = [look.cost(kind) for kind in ("gradcam", "smoothgradcam++", *BY_CHANNEL)]
    advice = "; --channels takes another number, 0 all"
    assert costs[None] == [
        None,
        "16 more forwards an image",
        f"64 forwards an image, for the 64 most active of 512 channels{advice}",
        f"640 forwards an image, for the 64 most active of 512 channels{advice}",
        "512 passes through the head an image, for all 512 channels",
    ]
    assert costs[10][4] == f"10 passes through the head an image, for the 10 most active of 512 channels{advice}"
    assert costs[0] == costs[9999]
    assert costs[0][2] == "512 forwards an image, for all 512 channels"


def test_several_methods_share_one_pass_through_the_backbone() -> None:
    net = distinct_net(HEAD)
    with class_maps_of(net, SIZE, ["cam", "gradcam"]) as look:
        passes = []
        handle = net.conv1.register_forward_hook(lambda *_: passes.append(1))
        x = pictures()
        look.logits(x)
        for kind in ("cam", "gradcam", "gradcam++", "layercam", "ablationcam", "eigencam", "finercam"):
            look(x, LABELS, kind)
        handle.remove()
    assert len(passes) == 1


def test_offline_maps_take_the_names_of_recipes() -> None:
    net, x = distinct_net(HEAD), pictures()
    batches = [(x[:1], LABELS[:1], np.array([7])), (x[1:], LABELS[1:], np.array([9]))]
    batches_of_maps = list(offline_maps(net, batches, "GradCAMPlusPlus"))
    assert [rows.tolist() for rows, _ in batches_of_maps] == [[7], [9]]
    with class_maps_of(net, SIZE, ["gradcam++"]) as look:
        torch.testing.assert_close(torch.cat([maps for _, maps in batches_of_maps]), look(x, LABELS, "gradcam++")[0])
    assert list(offline_maps(net, [], "gradcam")) == []


def test_most_active_channels_in_order() -> None:
    maps = np.array([[[1.0, 2.0]], [[5.0, 5.0]], [[-9.0, 8.0]], [[5.0, 5.0]]])
    assert method.most_active(np.float32(maps), 3).tolist() == [1, 3, 0]
