"""A file trains as the net that it was made of: 20 steps in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.models.onnxnet.folded import folded_convolutions
from fgvc.models.onnxnet.net import OnnxNet, open_onnx
from fgvc.reparam.replace import folded_state
from fgvc.reparam.unfold import ScaledConv2d, fit, unfold
from tests.models.onnxnet.twins import CLASSES, PIXELS, exported, twin
from tests.trained import Once

STEPS, IMAGES = 20, 2
SMALL = ("test_resnet", "test_efficientnet")
LARGE = tuple(
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("resnet18", "tf_efficientnet_lite0", "mobilenetv3_small_050")
)
nets = pytest.mark.parametrize("name", [*SMALL, *LARGE])


def convolutions(net: nn.Module) -> list[tuple[nn.Conv2d, nn.Module | None]]:
    """The convolutions in the order in which they run, each with the batch norm that runs next."""
    ran: list[nn.Module] = []
    kinds = (nn.Conv2d, nn.BatchNorm2d)
    handles = [m.register_forward_hook(lambda m, *_: ran.append(m)) for m in net.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        net.eval()(torch.zeros(2, 3, PIXELS, PIXELS, dtype=next(net.parameters()).dtype))
    for handle in handles:
        handle.remove()
    return [
        (module, ran[at + 1] if at + 1 < len(ran) and isinstance(ran[at + 1], nn.BatchNorm2d) else None)
        for at, module in enumerate(ran)
        if isinstance(module, nn.Conv2d)
    ]


def train(net: nn.Module, *, batch: bool = False, lr: float = 2e-3) -> None:
    """Train by SGD with momentum, and decay of kernels; norms with the batch's statistics, or frozen."""
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and not batch:
            module.eval()
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    learned = [value for value in net.parameters() if value.requires_grad]
    groups = [
        {"params": [value for value in learned if value.ndim > 1], "weight_decay": 1e-3},
        {"params": [value for value in learned if value.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    images = torch.randn(IMAGES, 3, PIXELS, PIXELS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(net(images), torch.arange(IMAGES) % CLASSES).backward()
        optimizer.step()
    net.eval()


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def answers(net: nn.Module) -> Tensor:
    images = torch.randn(IMAGES, 3, PIXELS, PIXELS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return net.eval()(images)


def pair(once: Once, name: str, kind: str) -> tuple[OnnxNet, nn.Module]:
    return open_onnx(exported(once, name, kind)).double(), twin(name).double()


@nets
@pytest.mark.parametrize("batch", [False, True], ids=["frozen", "batch"])
def test_a_file_with_its_norms_trains_as_its_twin(name: str, batch: bool, once: Once) -> None:
    net, other = pair(once, name, "kept")
    before = answers(net)
    train(net, batch=batch)
    train(other, batch=batch)
    assert apart(before, answers(net)) > 1e-2, "or nothing is compared"
    assert apart(answers(net), answers(other)) < 1e-9
    for (ours, our_norm), (theirs, their_norm) in zip(convolutions(net), convolutions(other), strict=True):
        assert apart(ours.weight, theirs.weight) < 1e-9
        if their_norm is not None:
            assert our_norm is not None
            for key, value in their_norm.state_dict().items():
                if key != "num_batches_tracked":
                    assert apart(our_norm.state_dict()[key], value) < 1e-9, key


def fold_likewise(other: nn.Module, net: OnnxNet) -> None:
    """The twin with the file's kernels and biases in place of its own and its norms."""
    pairs = zip(convolutions(other), convolutions(net), strict=True)
    for (conv, norm), (folded, _) in list(pairs):
        conv.weight = nn.Parameter(folded.weight.detach().clone())
        assert folded.bias is not None
        conv.bias = nn.Parameter(folded.bias.detach().clone())
        if norm is not None:  # timm's norms hold their activation
            norm.forward = (lambda own: lambda x: own.act(own.drop(x)) if hasattr(own, "act") else x)(norm)
            norm.requires_grad_(False)


@nets
def test_a_folded_file_trains_as_its_twin_that_is_folded_likewise(name: str, once: Once) -> None:
    net, other = pair(once, name, "folded")
    before = answers(other)
    fold_likewise(other, net)
    assert apart(answers(other), before) < 1e-5
    start = answers(net)
    train(net)
    train(other)
    assert apart(start, answers(net)) > 1e-2
    assert apart(answers(net), answers(other)) < 1e-9


def power_of_two_norms(net: nn.Module) -> None:
    """Norms whose gamma/sigma are powers of two, and gammas that are not trained."""
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_var is not None
            exponents = torch.randint(-2, 1, norm.running_var.shape, generator=torch.Generator().manual_seed(3))
            norm.weight.data = (norm.running_var + norm.eps).sqrt() * exponents.double().exp2()
            norm.weight.requires_grad_(False)


@pytest.mark.parametrize("name", SMALL)
def test_a_scaled_kernel_moves_as_the_kernel_before_the_fold(name: str, once: Once) -> None:
    """With the scale gamma/sigma of the twin's norms, whose gammas alone the file does not have."""
    net, other = pair(once, name, "folded")
    power_of_two_norms(other)
    unfold(net, folded_convolutions(net).names, norms=False)
    pairs = list(zip(convolutions(net), convolutions(other), strict=True))
    with torch.no_grad():
        for (ours, _), (theirs, norm) in pairs:
            if not isinstance(norm, nn.BatchNorm2d):
                continue
            assert isinstance(ours, ScaledConv2d)
            assert norm.running_var is not None
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            ours.weight.copy_(theirs.weight * scale[:, None, None, None])
            ours.bias.copy_(norm.bias - norm.running_mean * scale)  # type: ignore[union-attr,operator]
            ours.rescale(scale)
            torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-12, atol=0)
    assert apart(answers(net), answers(other)) < 1e-12
    start = answers(net)
    train(net, lr=1e-3)
    train(other, lr=1e-3)
    assert apart(start, answers(net)) > 1e-2
    assert apart(answers(net), answers(other)) < 1e-9
    for (ours, _), (theirs, _) in pairs:
        assert apart(ours.weight, theirs.weight) < 1e-9


def images(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(4)).to(dtype)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("norms", [False, True], ids=["scales", "norms"])
def test_what_was_not_trained_comes_back_bit_for_bit(name: str, norms: bool, once: Once) -> None:
    net, plain = (open_onnx(exported(once, name, "folded")) for _ in range(2))
    unfold(net, folded_convolutions(net).names, norms=norms)
    batches = [images(8), images(3)]
    fit(net, batches)
    with torch.no_grad():
        assert apart(net(images(2)), plain(images(2))) <= (1e-5 if norms else 0)
    state, before = folded_state(net), plain.state_dict()
    assert state.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(state[key].to(value.dtype), value), key


@pytest.mark.parametrize("name", SMALL)
def test_restored_norms_train_as_batch_norms_and_are_folded_back(name: str, once: Once) -> None:
    net, plain = (open_onnx(exported(once, name, "folded")).double() for _ in range(2))
    unfold(net, folded_convolutions(net).names, norms=True)
    fit(net, [images(8, torch.float64)])
    start = answers(net)
    train(net, batch=True)
    assert apart(start, answers(net)) > 1e-2
    plain.load_state_dict(folded_state(net))
    assert apart(answers(plain), answers(net)) < 1e-9
