import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fgvc.errors import FgvcError
from fgvc.exporting.reference import randomise
from fgvc.models.backbone import plain_model
from fgvc.reparam.block import Branched, refusal
from fgvc.reparam.kinds import acb
from fgvc.reparam.plain import HOOKS, strip
from fgvc.reparam.replace import find_sites, replace_conv

RECIPE = {"backbone": "test_resnet", "num_classes": 5, "kwargs": {}}


@pytest.fixture
def net() -> nn.Module:
    plain = plain_model("test_resnet", 5)
    randomise(plain, 3)
    return plain.eval()


def replaced(net: nn.Module, count: int = 2) -> nn.Module:
    sites = [s for s in find_sites(net, (32, 32))[0] if refusal(net.get_submodule(s.name)) is None][:count]
    assert len(sites) == count
    for site in sites:
        like = None if site.norm is None else net.get_submodule(site.norm)
        block = acb(net.get_submodule(site.name), like=like)
        randomise(block, 4)
        replace_conv(net, site, block)
    return net.eval()


def test_a_plain_net_comes_back_bit_for_bit(net: nn.Module) -> None:
    stripped = strip(net, **RECIPE)
    assert stripped is not net
    assert not stripped.training
    for key, value in net.state_dict().items():
        assert torch.equal(stripped.state_dict()[key], value), key


def test_grafts_are_folded_and_the_net_stays_as_it_was(net: nn.Module) -> None:
    trained = replaced(net)
    before = copy.deepcopy(trained.state_dict())
    exact = strip(trained, **RECIPE, dtype=torch.float64)
    assert list(exact.state_dict()) == list(plain_model("test_resnet", 5).state_dict())
    assert all(torch.equal(before[key], value) for key, value in trained.state_dict().items())
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = trained.double()(x)
        torch.testing.assert_close(exact(x), z, rtol=0, atol=1e-9 * float(z.abs().max()))


def test_a_leaked_branch_is_named(net: nn.Module) -> None:
    net.add_module("branch", nn.Linear(4, 4).eval())
    with pytest.raises(FgvcError, match=r"branch\.weight \(4, 4\): in no plain model"):
        strip(net, **RECIPE)


def test_another_shape_dtype_or_a_missing_key_is_named(net: nn.Module) -> None:
    wider = plain_model("test_resnet", 6).eval()
    with pytest.raises(FgvcError, match=r"fc\.weight: float \(6, \d+\) where the plain model has float \(5, \d+\)"):
        strip(wider, **RECIPE)
    with pytest.raises(FgvcError, match=r"fc\.weight \(5, \d+\): missing"):
        strip(plain_model("test_resnet", 0).eval(), **RECIPE)
    net.bn1.num_batches_tracked = net.bn1.num_batches_tracked.int()
    with pytest.raises(FgvcError, match=r"bn1\.num_batches_tracked: torch\.int32 \(\) where .* torch\.int64"):
        strip(net, **RECIPE)


def test_weights_that_are_not_finite_are_named(net: nn.Module) -> None:
    with torch.no_grad():
        net.bn1.running_var[0] = float("nan")
    with pytest.raises(FgvcError, match=r"bn1\.running_var: holds values that are not finite"):
        strip(net, **RECIPE)


def spy(*arguments: object) -> None:
    """A hook that does nothing: still refused."""


@pytest.mark.parametrize(
    ("register", "kind"),
    [
        ("register_forward_hook", "forward hook"),
        ("register_forward_pre_hook", "forward pre-hook"),
        ("register_full_backward_hook", "backward hook"),
        ("register_full_backward_pre_hook", "backward pre-hook"),
    ],
)
def test_a_hook_that_is_left_is_named_with_its_module(net: nn.Module, register: str, kind: str) -> None:
    handle = getattr(net.layer2[0].conv1, register)(spy)
    with pytest.raises(FgvcError, match=rf"no plain model has:\n  layer2\.0\.conv1 \(Conv2d\): {kind} spy"):
        strip(net, **RECIPE)
    handle.remove()
    strip(net, **RECIPE)
    assert kind in HOOKS.values()


def test_a_hook_inside_a_grafted_block_is_found(net: nn.Module) -> None:
    trained = replaced(net, 1)
    block = next(m for m in trained.modules() if isinstance(m, Branched))
    block.branches["1xk"].register_forward_hook(spy)
    with pytest.raises(FgvcError, match=r"1xk \(\w+\): forward hook spy"):
        strip(trained, **RECIPE)


def test_a_parametrization_is_refused(net: nn.Module) -> None:
    parametrize.register_parametrization(net.fc, "weight", nn.Identity())
    with pytest.raises(FgvcError, match=r"fc \(\w+\): a parametrization of weight"):
        strip(net, **RECIPE)


def test_train_mode_is_refused(net: nn.Module) -> None:
    with pytest.raises(FgvcError, match="eval"):
        strip(net.train(), **RECIPE)
