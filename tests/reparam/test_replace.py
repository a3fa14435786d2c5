"""Sites on hand-made nets whose answer is known, and on timm's; whole nets against timm's plain ones in float64."""

import copy

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, StdConv2d
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.errors import FgvcError
from fgvc.reparam.block import refusal
from fgvc.reparam.kinds import acb
from fgvc.reparam.replace import Site, find_sites, folded_state, replace_conv

SIZE = (64, 64)
TINY = {
    "resnet10t": {},
    "test_efficientnet": {},
    "tf_mobilenetv3_small_minimal_100": {},  # Conv2dSame
    "test_byobnet": {},
    "densenet121": {"growth_rate": 8, "block_config": (2, 2, 2, 2)},
    "mobilenetv3_small_050": {},
    "convnext_atto": {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "ls_init_value": 0.5},
}


def tiny(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=5, **TINY[name])
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return net


def replaced(net: nn.Module) -> list[Site]:
    """Put ACNet's branches wherever one fits."""
    sites = [site for site in find_sites(net, SIZE)[0] if refusal(net.get_submodule(site.name)) is None]
    for site in sites:
        like = net.get_submodule(site.norm) if site.norm else None
        replace_conv(net, site, acb(net.get_submodule(site.name), like))
    return sites


def train(net: nn.Module, steps: int) -> None:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(net.train().parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        loss = F.cross_entropy(net(torch.randn(4, 3, *SIZE)), torch.randint(0, 5, (4,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()


class Net(nn.Module):
    """A net with one convolution of each fate, under the name of its fate."""

    def __init__(self) -> None:
        super().__init__()

        def conv(**settings: object) -> nn.Conv2d:
            return nn.Conv2d(4, 4, 3, **({"padding": 1, "bias": False} | settings))

        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.good, self.good_norm = conv(), BatchNormAct2d(4)
        self.biased, self.biased_norm = conv(bias=True), nn.BatchNorm2d(4)
        self.skipping, self.skipping_norm = conv(), nn.BatchNorm2d(4)
        self.detached, self.detached_norm = conv(), nn.BatchNorm2d(4)
        self.activated, self.activated_norm = conv(), nn.BatchNorm2d(4)
        self.twice, self.twice_norm = conv(), nn.BatchNorm2d(4)
        self.first_of_two, self.second_of_two, self.norm_of_two = conv(), conv(), nn.BatchNorm2d(4)
        self.grouped, self.grouped_norm = conv(), nn.GroupNorm(2, 4)
        self.batchwise, self.batchwise_norm = conv(), nn.BatchNorm2d(4, track_running_stats=False)
        self.never = conv(bias=True)
        self.dilated = conv(bias=True, dilation=2, padding=2)
        self.reflected = conv(bias=True, padding_mode="reflect")
        self.frozen = conv(bias=True).requires_grad_(False)
        self.standardised = StdConv2d(4, 4, 3, padding=1, bias=True)
        self.normed = nn.utils.parametrizations.weight_norm(conv(bias=True))
        self.hooked = conv(bias=True)
        self.hooked.register_forward_hook(lambda module, args, output: None)
        self.alias = self.original = conv(bias=True)
        self.tied, self.tied_too = conv(bias=True), conv(bias=True)
        self.tied_too.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.good_norm(self.good(x))
        x = self.biased_norm(self.biased(x))
        y = self.skipping(x)
        x = self.skipping_norm(y) + y
        y = self.detached(x)
        x = self.detached_norm(y) + y.detach().mean()
        x = self.activated_norm(self.activated(x).relu_())
        x = self.twice_norm(self.twice(self.twice(x)))
        x = self.norm_of_two(self.first_of_two(x)) + self.norm_of_two(self.second_of_two(x))
        x = self.grouped_norm(self.grouped(x))
        x = self.batchwise_norm(self.batchwise(x))
        for conv in (self.dilated, self.reflected, self.frozen, self.standardised, self.normed, self.hooked):
            x = conv(x)
        for conv in (self.alias, self.tied, self.tied_too):
            x = conv(x)
        return x.mean((2, 3))


def test_sites_and_reasons_of_a_hand_made_net() -> None:
    sites, refused = find_sites(Net(), (8, 8))
    assert sites == [Site("stem", None), Site("good", "good_norm"), Site("biased", "biased_norm")]
    nowhere = "no bias, and no batch norm that alone reads its output"
    expected = {
        "skipping": nowhere, "detached": nowhere, "activated": nowhere, "grouped": nowhere, "batchwise": nowhere,
        "first_of_two": nowhere, "second_of_two": nowhere, "twice": "called 2 times", "never": "not called",
        "dilated": "dilation is 2", "reflected": "padding mode is reflect", "frozen": "frozen",
        "standardised": "a StdConv2d", "normed": "a ParametrizedConv2d", "hooked": "hooks",
        "alias": "two names", "tied": "shared", "tied_too": "shared",
    }  # fmt: skip
    assert set(refused) == set(expected)
    assert {name: reason for name, reason in refused.items() if expected[name] not in reason} == {}


def test_an_output_that_the_net_also_returns_is_read_by_others() -> None:
    class Returning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return self.norm(y), y

    assert find_sites(Returning(), (8, 8))[0] == []


class AlwaysDrop(nn.Module):
    """Dropout that draws from torch's generator in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, training=True)


@pytest.mark.parametrize("training", [True, False])
def test_finding_sites_leaves_the_net_untouched(training: bool) -> None:
    net = tiny("test_efficientnet").train(training)
    net.conv_stem.eval()
    net.classifier = nn.Sequential(AlwaysDrop(), net.classifier)
    next(net.parameters()).grad = torch.ones_like(next(net.parameters()))
    state, flags = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    random = torch.get_rng_state()
    find_sites(net, SIZE)
    assert [module.training for module in net.modules()] == flags
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert [p.grad is not None for p in net.parameters()].count(True) == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize(
    ("name", "count", "first"),
    [
        ("resnet10t", 14, Site("conv1.0", "conv1.1")),
        ("mobilenetv3_small_050", 53, Site("conv_stem", "bn1")),
        ("test_byobnet", 22, Site("stem.conv", "stem.bn")),
        ("convnext_atto", None, Site("stem.0", None)),  # LayerNorm behind convolutions with bias
        ("densenet121", None, Site("features.conv0", "features.norm0")),
    ],
)
def test_sites_of_timm_nets(name: str, count: int | None, first: Site) -> None:
    net = tiny(name)
    sites, refused = find_sites(net, SIZE)
    convolutions = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    assert sorted([site.name for site in sites] + list(refused)) == sorted(convolutions)
    assert sites[0] == first
    assert count is None or len(sites) == count


def test_densenet_concatenates_and_convnext_has_no_batch_norm() -> None:
    sites, refused = find_sites(tiny("densenet121"), SIZE)
    assert Site("features.denseblock1.denselayer1.conv1", "features.denseblock1.denselayer1.norm2") in sites
    assert "nowhere to go" in refused["features.denseblock1.denselayer1.conv2"]  # feeds the concatenation
    sites, refused = find_sites(tiny("convnext_atto"), SIZE)
    assert refused == {}
    assert {site.norm for site in sites} == {None}


def test_sites_under_activation_checkpointing() -> None:
    net = tiny("resnet10t")
    plain = find_sites(net, SIZE)
    net.set_grad_checkpointing()
    assert find_sites(net, SIZE) == plain


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("training", [True, False])
def test_step_zero_is_the_plain_net_bit_for_bit(name: str, training: bool) -> None:
    plain = tiny(name).train(training)
    net = copy.deepcopy(plain)
    assert replaced(net)
    assert all(module.training == training for module in net.modules())
    x = torch.randn(4, 3, *SIZE)
    torch.manual_seed(2)
    expected = plain(x)
    torch.manual_seed(2)
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("name", TINY)
def test_folded_state_is_the_trained_net(name: str) -> None:
    """Level 1 of the contract: float64, strict load into timm's own model, within 1e-9 of max |logit|."""
    net = tiny(name)
    sites = replaced(net)
    train(net, 5)
    x = torch.randn(4, 3, *SIZE, dtype=torch.float64)
    before = copy.deepcopy(net.state_dict())
    state = folded_state(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    plain = timm.create_model(name, num_classes=5, **TINY[name]).double().eval()
    assert list(state) == list(plain.state_dict())  # the same keys in the same order
    assert all(value.dtype == plain.state_dict()[key].dtype for key, value in state.items())
    plain.load_state_dict(state, strict=True)
    trained = net.double()(x)
    assert (trained - plain(x)).abs().max() < 1e-9 * trained.abs().max()

    for site in sites:  # the branches carry part of the function: without them it is another one
        block = net.get_submodule(site.name)
        assert not torch.equal(state[f"{site.name}.weight"], block.origin.weight.detach())
        nn.init.zeros_(block.branches["1xk"].norm.weight)
    assert (net(x) - trained).abs().max() > 1e-6 * trained.abs().max()


def test_the_bias_goes_into_the_running_mean_or_the_own_bias() -> None:
    for biased in (False, True):
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=biased), nn.BatchNorm2d(4)).eval()
        block = acb(net[0])
        replace_conv(net, Site("0", "1"), block)
        nn.init.constant_(block.branches["1xk"].norm.bias, 2.0)
        own = net[0].origin.bias.detach().clone().double() if biased else None
        state = folded_state(net)
        if biased:
            assert torch.equal(state["0.bias"], own + 2)
        assert torch.equal(state["1.running_mean"], torch.full((4,), 0.0 if biased else -2.0, dtype=torch.float64))
        assert state["1.num_batches_tracked"].dtype == torch.int64


def test_folded_state_of_a_plain_net_is_its_own_and_shares_no_memory() -> None:
    net = tiny("test_efficientnet").double().eval()
    state = folded_state(net)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    before = copy.deepcopy(net.state_dict())
    for value in state.values():
        value.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_folding_in_train_mode_is_refused() -> None:
    net = tiny("test_efficientnet").train()
    with pytest.raises(FgvcError, match=r"net\.eval\(\)"):
        folded_state(net)
    net.eval().bn1.train()
    with pytest.raises(FgvcError, match="train mode"):
        folded_state(net)


def test_a_second_graft_at_the_same_place_is_refused() -> None:
    net = tiny("resnet10t")
    site = replaced(net)[0]
    with pytest.raises(FgvcError, match=r"conv1\.0.*Branched replaces it already"):
        replace_conv(net, site, acb(nn.Conv2d(3, 24, 3, padding=1)))
    with pytest.raises(FgvcError, match="already"):  # nor inside a block
        replace_conv(net, Site(f"{site.name}.origin", None), acb(nn.Conv2d(3, 24, 3, padding=1)))


def test_a_block_that_cannot_fold_is_refused() -> None:
    net = tiny("resnet10t")
    with pytest.raises(TypeError, match="fold"):
        replace_conv(net, find_sites(net, SIZE)[0][0], nn.Conv2d(3, 24, 3, padding=1))
