"""Convolutions with a scale or a norm of their own: the function and its bits stay, and they fold back."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from fgvc.errors import FgvcError
from fgvc.reparam.kinds import acb, dbb, overparam, repvgg
from fgvc.reparam.replace import Site, find_sites, folded_state, replace_conv
from fgvc.reparam.unfold import EPS, NormedConv2d, ScaledConv2d, fit, output_spreads, unfold


class Net(nn.Module):
    """A net of two convolutions as a folded file has them: channels of very different sizes, and large means."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 4)
        with torch.no_grad():
            self.one.weight.mul_(torch.logspace(-2, 1, 8)[:, None, None, None])
            self.one.bias.copy_(torch.tensor([0, 0.01, -0.3, 1, 2, -5, 1e-3, 7]))  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x).relu()).relu().mean((2, 3)))


NAMES = ("one", "two")


def images(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) + 2


def pair(*, norms: bool) -> tuple[Net, Net]:
    """A net with its scales and norms fitted, and as it was."""
    torch.manual_seed(0)
    plain = Net().eval()
    net = copy.deepcopy(plain)
    unfold(net, NAMES, norms=norms)
    fit(net, [images(4, 1), images(2, 2)])
    return net, plain


def test_a_scale_keeps_every_bit() -> None:
    net, plain = pair(norms=False)
    assert torch.equal(net(images()), plain(images()))
    assert not torch.equal(net.one.weight, plain.one.weight)
    for key, value in plain.state_dict().items():
        assert torch.equal(folded_state(net)[key].float(), value)


def test_the_weight_has_outputs_of_unit_spread_within_the_rounding_of_its_scale() -> None:
    net, _ = pair(norms=False)
    for name in NAMES:
        conv = net.get_submodule(name)
        assert isinstance(conv, ScaledConv2d)
        spread = output_spreads(net, [name], [images(4, 1), images(2, 2)])[name].variance.sqrt()
        ratio = (spread / conv.scale.flatten())[spread > 0]  # a channel of dead inputs has none
        assert len(ratio) >= 6
        assert (ratio >= 2**-0.51).all()
        assert (ratio <= 2**0.51).all()
        assert (conv.scale.log2() % 1 == 0).all()


@pytest.mark.parametrize("norms", [False, True])
def test_a_scale_that_is_known_is_taken(norms: bool) -> None:
    _, plain = pair(norms=False)
    net = copy.deepcopy(plain)
    unfold(net, NAMES, norms=norms)
    scale = torch.tensor([0.25, 0.3, 1, 1.3, 1.5, 4, 8, 0.1])
    fit(net, [images()], {"two.weight": scale})
    block = net.get_submodule("two")
    conv = block.conv if isinstance(block, NormedConv2d) else block
    assert isinstance(conv, ScaledConv2d)
    assert conv.scale.flatten().tolist() == [0.25, 0.25, 1, 1, 2, 4, 8, 0.125]
    torch.testing.assert_close(net(images()), plain(images()), rtol=1e-5, atol=1e-5)


def test_spreads_are_those_of_all_outputs_together() -> None:
    net, plain = pair(norms=False)
    x = torch.cat([images(4, 1), images(2, 2)])
    outputs = plain.one(x).double()
    spread = output_spreads(net, NAMES, [x[:4], x[4:]])["one"]
    torch.testing.assert_close(spread.mean, outputs.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(spread.variance, outputs.var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


def test_a_restored_norm_has_the_statistics_of_its_input_and_keeps_the_function() -> None:
    net, plain = pair(norms=True)
    x, block = torch.cat([images(4, 1), images(2, 2)]), net.get_submodule("one")
    assert isinstance(block, NormedConv2d)
    norm, y = block.batch_norm, plain.one(x).double()
    torch.testing.assert_close(norm.running_mean.double(), y.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.weight.double(), y.std((0, 2, 3), correction=0), rtol=5e-4, atol=5e-3)
    assert torch.equal(norm.bias, norm.running_mean)
    assert torch.equal(norm.weight.double(), (norm.running_var.double() + EPS).sqrt()), "exactly"
    torch.testing.assert_close(net(images()), plain(images()), rtol=1e-5, atol=1e-5)


def test_an_untrained_norm_folds_into_the_very_bits() -> None:
    net, plain = pair(norms=True)
    state = folded_state(net)
    assert state.keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(state[key].float(), value), key


def moved(net: Net) -> Net:
    """Train two steps by batch statistics, whatever is trained."""
    net.train()
    optimizer = torch.optim.SGD([value for value in net.parameters() if value.requires_grad], lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images()), torch.arange(4)).backward()
        optimizer.step()
    return net.eval()


@pytest.mark.parametrize("norms", [False, True])
def test_what_was_trained_folds_into_the_plain_net(norms: bool) -> None:
    net, plain = pair(norms=norms)
    before = plain(images()).detach().double()
    net = moved(net)
    plain.double().load_state_dict(folded_state(net))
    with torch.no_grad():
        after, trained = plain(images().double()), copy.deepcopy(net).double()(images().double())
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(after, trained, rtol=1e-9, atol=1e-9)


def test_the_bias_in_front_of_a_norm_is_not_trained() -> None:
    net, plain = pair(norms=True)
    block = moved(net).get_submodule("one")
    assert isinstance(block, NormedConv2d)
    assert torch.equal(block.conv.bias, plain.one.bias)  # type: ignore[arg-type]
    assert not torch.equal(folded_state(net)["one.bias"].float(), plain.one.bias)  # type: ignore[arg-type]


def test_a_channel_without_spread_keeps_its_kernel() -> None:
    conv = nn.Conv2d(2, 5, 1)
    with torch.no_grad():
        conv.weight[0] = 0
        conv.weight[1] = 1e-38
    kernel = conv.weight.detach().clone()
    scaled = ScaledConv2d(conv)
    scaled.rescale(torch.tensor([0.0, 2.0**10, float("nan"), float("inf"), 0.3]))
    assert scaled.scale.flatten().tolist() == [1, 1, 1, 1, 0.25]
    assert torch.equal(scaled.weight * scaled.scale, kernel)
    scaled.rescale(torch.ones(5))
    assert torch.equal(scaled.weight, kernel)


def test_a_constant_channel_has_a_norm_that_is_finite() -> None:
    conv = nn.Conv2d(2, 3, 1)
    with torch.no_grad():
        conv.weight.zero_()
    block = NormedConv2d(conv)
    block.restore(torch.ones(3), torch.zeros(3))
    for training in (True, False):
        assert block.train(training)(torch.randn(2, 2, 4, 4)).isfinite().all()


def test_what_can_not_be_unfolded_is_refused() -> None:
    with pytest.raises(FgvcError, match="no place for the shift"):
        NormedConv2d(nn.Conv2d(1, 1, 1, bias=False))
    with pytest.raises(FgvcError, match="padding mode reflect"):
        ScaledConv2d(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))
    net = Net()
    unfold(net, NAMES, norms=False)
    with pytest.raises(FgvcError, match="no image"):
        fit(net, [])
    with pytest.raises(FgvcError, match="one: its output for training images is not finite"):
        fit(net, [torch.full((2, 3, 8, 8), float("inf"))])


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("make", [acb, dbb, repvgg, overparam])
def test_blocks_go_beside_it_and_fold_with_it(make, norms: bool) -> None:  # type: ignore[no-untyped-def]
    net, plain = pair(norms=norms)
    sites, refused = find_sites(net, (16, 16))
    norm_of = {f"{name}.conv": f"{name}.batch_norm" for name in NAMES} if norms else dict.fromkeys(NAMES)
    assert sites == [Site(name, norm) for name, norm in norm_of.items()]
    assert not refused
    for site in sites:
        like = None if site.norm is None else net.get_submodule(site.norm)
        replace_conv(net, site, make(net.get_submodule(site.name), like))
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(images()), plain(images()), rtol=1e-5, atol=1e-5)
    net = moved(net)
    state = folded_state(net)
    assert state.keys() == plain.state_dict().keys()
    plain.double().load_state_dict(state)
    with torch.no_grad():
        x = images().double()
        torch.testing.assert_close(plain(x), copy.deepcopy(net).double()(x), rtol=1e-9, atol=1e-9)
    with pytest.raises(FgvcError, match="replaces it already"):
        replace_conv(net, sites[0], make(nn.Conv2d(3, 8, 3, padding=1)))


@pytest.mark.parametrize("norms", [False, True])
def test_states_and_averages_keep_the_scale(norms: bool) -> None:
    net, plain = pair(norms=norms)
    average = ModelEmaV3(net, decay=0.5)
    scales = {key: value for key, value in net.state_dict().items() if key.endswith("scale")}
    moved(net)
    for _ in range(3):
        average.update(net)
    other = copy.deepcopy(plain)
    unfold(other, NAMES, norms=norms)
    other.load_state_dict(average.module.state_dict())
    for key, value in scales.items():
        assert torch.equal(other.state_dict()[key], value)
    assert torch.equal(other(images()), average.module(images()))
