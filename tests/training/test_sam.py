"""SAM against its formula in float64, and what must not happen around it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from fgvc import api
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.config.training import Log, Sam
from fgvc.data.loader import TrainBatch
from fgvc.errors import FgvcError
from fgvc.models.norms import running_norms
from fgvc.runs import checkpoint
from fgvc.runs.distributed import process_group
from fgvc.runs.step import StepModule
from fgvc.techniques.centre_loss.technique import CentreLoss, Centres
from fgvc.training import optimizer_step as training_step
from fgvc.training import trainer as loop
from fgvc.training.log import Events
from fgvc.training.sam import perturbed
from fgvc.training.session import Session, open_session

NO_RHO = Sam.model_construct(rho=0.0, adaptive=False)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(7, 4, dtype=torch.float64, generator=rng), torch.randint(3, (7,), generator=rng)


def by_hand(net: nn.Module, rho: float, adaptive: bool) -> list[torch.Tensor]:
    """The gradient at w + e, weight by weight: e = rho g / |g|, or rho w^2 g / ||w| g|."""
    x, y = data()
    g = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
    size = 0.0
    for w, slope in zip(net.parameters(), g, strict=True):
        for a, b in zip(w.flatten().tolist(), slope.flatten().tolist(), strict=True):
            size += (a * b) ** 2 if adaptive else b**2
    moved = copy.deepcopy(net)
    for w, slope in zip(moved.parameters(), g, strict=True):
        w.data += rho * (w.data**2 * slope if adaptive else slope) / size**0.5
    return list(torch.autograd.grad(F.cross_entropy(moved(x), y), list(moved.parameters())))


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("rho", [0.05, 2.0])
def test_the_gradient_is_that_of_the_perturbed_weights(rho: float, adaptive: bool) -> None:
    net, (x, y) = small(), data()
    before = [w.detach().clone() for w in net.parameters()]
    F.cross_entropy(net(x), y).backward()
    with perturbed(net, Sam(rho=rho, adaptive=adaptive)):
        assert all(w.grad is None for w in net.parameters())
        F.cross_entropy(net(x), y).backward()
    for w, old, expected in zip(net.parameters(), before, by_hand(small(), rho, adaptive), strict=True):
        assert torch.equal(w, old)
        torch.testing.assert_close(w.grad, expected, rtol=1e-9, atol=1e-12)


def test_what_has_no_gradient_stays_and_none_at_all_is_no_division_by_zero() -> None:
    net, (x, y) = small(), data()
    net[0].weight.requires_grad_(False)
    (0 * F.cross_entropy(net(x), y)).backward()
    with perturbed(net, Sam()):
        for w, old in zip(net.parameters(), small().parameters(), strict=True):
            assert torch.equal(w, old)


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_weights_and_the_norms_as_they_were(stop: type[BaseException]) -> None:
    net, (x, y) = nn.Sequential(small(), nn.BatchNorm1d(3).double()).train(), data()
    F.cross_entropy(net(x), y).backward()
    before = {key: value.clone() for key, value in net.state_dict().items()}

    def dies() -> None:
        with perturbed(net, Sam()):
            net(x)
            raise stop

    with pytest.raises(stop):
        dies()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert len(running_norms(net)) == 1


def recipe(tree: dict, **sections: object) -> Recipe:
    merged = tree | {k: (tree.get(k, {}) | v if isinstance(v, dict) else v) for k, v in sections.items()}
    return validate(Recipe, merged, where="test")


def sam_of(config: Recipe, sam: Sam | None) -> Recipe:
    return config.model_copy(update={"optim": config.optim.model_copy(update={"sam": sam})})


def states(session: Session) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in session.step.state_dict().items()}


def stepped(config: Recipe, steps: int = 2) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Everything that is learned in a few steps, and the losses said."""
    with process_group(config.train) as process, open_session(config, process) as session:
        quiet, losses_by_step = Events(Path(), Log(), active=False), []
        batches: Iterator[TrainBatch] = session.loader.epoch(0)
        for _ in range(steps):
            losses, _ = loop.optimizer_step(session, batches, quiet)
            losses_by_step.append({name: float(value) for name, value in losses.items()})
            session.progress.step += 1
        return states(session), losses_by_step


MANY = {
    "dcl": {"grid": 4, "bn": "shared"},
    "adl": {"stages": [-2], "per": "sample"},
    "dropblock": {"stages": [-2], "rate": 0.2},
    "cam_erasing": {"source": "ema"},
    "centre_loss": {},
    "similar_smoothing": {},
    "acol": {"shared": True},
}
# Alone: beside others its branch, made earlier in the first pass, has its gradient added in another order.
ATTENTION = {"attention_crop_drop": {"maps": 4}}


@pytest.mark.parametrize(
    ("techniques", "train"),
    [
        (MANY, {}),
        (MANY, {"grad_accum_steps": 2}),
        (MANY, {"grad_checkpointing": True}),
        (MANY, {"precision": "bf16"}),
        (ATTENTION, {}),
        ({"mixup": {}}, {}),
    ],
    ids=["many", "grad_accum_steps", "grad_checkpointing", "bf16", "attention", "mixup"],
)
def test_without_a_way_to_go_it_is_the_plain_step_bit_for_bit(recipe_tree: dict, techniques: dict, train: dict) -> None:
    """Dropout, views, gates, centres and running statistics: the second pass sees all as the first and counts nothing."""
    config = recipe(
        recipe_tree,
        image={"size": 64},
        techniques=techniques,
        train=train,
        ema={"decay": 0.9},
        model={"backbone": "test_resnet", "kwargs": {"drop_rate": 0.3, "drop_path_rate": 0.2}},
    )
    (plain, losses), (sam, again) = stepped(config), stepped(sam_of(config, NO_RHO))
    for key, value in plain.items():
        assert torch.equal(value, sam[key]), key
    assert losses == again


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_a_step_is_that_of_an_explicit_sam(recipe_tree: dict, grad_accum_steps: int) -> None:
    """A ViT in float64 (no batch norm): one perturbation for the whole batch, however many parts."""
    optim = {
        "name": "momentum",
        "lr": 0.1,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "warmup_epochs": 0,
        "sam": {"rho": 0.3},
    }
    config = recipe(
        recipe_tree | {"optim": optim},
        model={"backbone": "test_vit", "kwargs": {"img_size": 32}},
        train={"grad_accum_steps": grad_accum_steps},
        loss={"label_smoothing": 0.0},
    )
    with process_group(config.train) as process, open_session(config, process) as session:
        raws = [raw for _, raw in zip(range(grad_accum_steps), session.loader.epoch(0), strict=False)]
        session.schedule.step_update(0)
        twin = copy.deepcopy(session.step.net).double()
        x = torch.cat([session.normalise(raw.images) for raw in raws]).double()
        y = torch.cat([raw.labels for raw in raws])
        weights = list(twin.parameters())
        first = F.cross_entropy(twin(x), y)
        g = torch.autograd.grad(first, weights)
        size = sum(float(slope.square().sum()) for slope in g) ** 0.5
        old = [w.detach().clone() for w in weights]
        for w, slope in zip(weights, g, strict=True):
            w.data += 0.3 * slope / size
        g = torch.autograd.grad(F.cross_entropy(twin(x), y), weights)
        losses, _ = loop.optimizer_step(session, iter(raws), Events(Path(), Log(), active=False))
        assert float(losses["loss"]) == pytest.approx(float(first.detach()), rel=1e-5), "of the first pass"
        for w, start, slope in zip(session.step.net.parameters(), old, g, strict=True):
            torch.testing.assert_close(w.double(), start - 0.1 * slope, rtol=1e-4, atol=1e-5)


def test_hooks_and_statistics_count_a_batch_once(recipe_tree: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"forward": 0, "follow": 0, "moved": 0}

    def counting(name: str, of: type, method: str) -> None:
        real = getattr(of, method)

        def wrapper(self: object, *args: object, **kwargs: object) -> object:
            counts[name] += 1
            return real(self, *args, **kwargs)

        monkeypatch.setattr(of, method, wrapper)

    counting("forward", StepModule, "forward")
    counting("follow", CentreLoss, "after_step")
    counting("moved", Centres, "follow")
    config = recipe(recipe_tree, techniques={"centre_loss": {}}, optim={"lr": 0.02, "sam": {}})
    state, _ = stepped(config, steps=3)
    assert counts == {"forward": 6, "follow": 3, "moved": 3}
    assert state["net.bn1.num_batches_tracked"] == 3


def test_an_interrupted_second_pass_ends_with_the_weights_of_before(
    tmp_path: Path, recipe_tree: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(recipe_tree, optim={"lr": 0.02, "sam": {"rho": 5.0}}, checkpoint={"every_steps": 2})
    real, calls, in_second_pass = training_step.forward_backward, [0], {}

    def stops(session: Session, *rest: object, **options: object) -> object:
        calls[0] += 1
        if calls[0] == 6:  # the second pass of the third step
            in_second_pass["moved"] = states(session)
            in_second_pass["session"] = session
            raise KeyboardInterrupt
        return real(session, *rest, **options)

    monkeypatch.setattr(training_step, "forward_backward", stops)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "run")
    monkeypatch.undo()
    saved = load_file(tmp_path / "run" / "ckpt" / "last" / "net.safetensors")
    now = in_second_pass["session"].step.net.state_dict()
    trained = {key for key, _ in in_second_pass["session"].step.net.named_parameters()}
    assert all(torch.equal(now[key], saved[key]) for key in trained)
    assert any(not torch.equal(in_second_pass["moved"][f"net.{key}"], saved[key]) for key in trained)
    whole = load_file(loop.train(config, tmp_path / "whole") / "ckpt" / "last" / "net.safetensors")
    again = load_file(loop.train(config, tmp_path / "run") / "ckpt" / "last" / "net.safetensors")
    assert all(torch.equal(value, again[key]) for key, value in whole.items()), "resumed"


def test_a_loss_that_is_no_number_uphill_stops_the_run_and_nothing_is_saved(
    recipe_tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, after_first_pass = training_step.forward_backward, []

    def passed(session: Session, batch: object, draws: object, views: object = None, *, last: bool) -> object:
        losses, new_views = original(session, batch, draws, views, last=last)
        if views is not None:
            after_first_pass.append({key: value.clone() for key, value in session.step.net.state_dict().items()})
            losses = losses | {"loss": torch.tensor(float("nan"))}
        return losses, new_views

    monkeypatch.setattr(training_step, "forward_backward", passed)
    config = recipe(recipe_tree, optim={"sam": {"rho": 0.5}})
    with pytest.raises(
        FgvcError,
        match=r"step 1: .* not saved: the loss uphill \(optim\.sam\).* optim\.sam\.rho=0\.25 \(it is 0\.5\)",
    ):
        loop.train(config, tmp_path / "run")
    assert len(after_first_pass) == 1
    assert checkpoint.load(tmp_path / "run" / "ckpt").progress.step == 0


def test_fp16_is_refused_with_the_way_out_and_so_is_no_way_to_go(recipe_tree: dict) -> None:
    with pytest.raises(FgvcError, match=r"optim\.sam: fp16 .* set train\.precision to bf16 or fp32"):
        recipe(recipe_tree, optim={"sam": {}}, train={"precision": "fp16"})
    with pytest.raises(FgvcError, match=r"optim\.sam\.rho"):
        recipe(recipe_tree, optim={"sam": {"rho": 0}})


def test_a_forecast_counts_both_passes(recipe_tree: dict) -> None:
    assert api.forecast(recipe(recipe_tree, optim={"sam": {}})).forwards == 2


SCRIPT = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from types import SimpleNamespace

from fgvc.runs import checkpoint
from fgvc.training import optimizer_step as training_step
from fgvc.training import trainer as loop
from fgvc.training.sam import Sam, perturbed
from fgvc.runs.distributed import ProcessGroup


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    def forward(self, batch, draws, views=None):
        return {"loss": F.cross_entropy(self.net(batch[0]), batch[1])}, []


def known(rank, world):
    step = Step()
    process = ProcessGroup(torch.device("cpu"), rank, world, "fp32")
    session = SimpleNamespace(
        process=process, wrapped=process.wrap(step, branches=False), scaler=process.scaler(),
        recipe=SimpleNamespace(train=SimpleNamespace(grad_accum_steps=2)),
    )
    rng = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 4, dtype=torch.float64, generator=rng), torch.randint(3, (8,), generator=rng)
    parts = [(x[4 * rank + start:][:2], y[4 * rank + start:][:2]) for start in (0, 2)]
    for part in parts:
        training_step.forward_backward(session, part, None, last=False)
    with perturbed(step, Sam(rho=0.5)):
        for number, part in enumerate(parts):
            training_step.forward_backward(session, part, None, [], last=number == 1)
    return [w.grad for w in step.parameters()]
"""


def test_each_rank_goes_uphill_by_its_own_images_and_the_gradients_are_averaged(
    tmp_path: Path, two_ranks: Callable[[str, Path], AbstractContextManager[Path]]
) -> None:
    with two_ranks(SCRIPT, tmp_path):
        pass
    rng = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 4, dtype=torch.float64, generator=rng), torch.randint(3, (8,), generator=rng)
    expected = [torch.zeros_like(w) for w in small().parameters()]
    for rows in (slice(0, 4), slice(4, 8)):
        net = small()
        g = torch.autograd.grad(F.cross_entropy(net(x[rows]), y[rows]), list(net.parameters()))
        size = sum(float(slope.square().sum()) for slope in g) ** 0.5
        for w, slope in zip(net.parameters(), g, strict=True):
            w.data += 0.5 * slope / size
        g = torch.autograd.grad(F.cross_entropy(net(x[rows]), y[rows]), list(net.parameters()))
        expected = [total + slope / 2 for total, slope in zip(expected, g, strict=True)]
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"rank{rank}.pt", weights_only=True), expected)
