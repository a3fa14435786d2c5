"""L2-SP against its formula in float64, whatever else a step does; and that a run that goes on has the same start."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn

from fgvc import api
from fgvc.config.loading import dump, validate
from fgvc.config.recipe import Recipe
from fgvc.config.training import SIZED, Log, Optim
from fgvc.errors import FgvcError
from fgvc.runs.distributed import process_group
from fgvc.training import trainer as loop
from fgvc.training.log import Events
from fgvc.training.optim import make_optimizer
from fgvc.training.session import open_session

ALPHA, RATE = 0.3, 0.05
ELSEWHERE = ("bnb", "fused", "adahessian", "kron")  # for GPUs, second derivatives, or minutes of compiling


@pytest.fixture
def pretrained(tmp_path: Path, recipe_tree: dict) -> dict:
    torch.manual_seed(5)
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), tmp_path / "start.safetensors")
    (tmp_path / "start.safetensors.json").write_text(json.dumps({"mean": [0.5] * 3, "std": [0.5] * 3}))
    model = {"backbone": "test_resnet", "weights": str(tmp_path / "start.safetensors")}
    optim = {"name": "sgd", "lr": RATE, "warmup_epochs": 0, "schedule": "constant", "weight_decay": 0.01, "l2_sp": ALPHA}
    return recipe_tree | {"model": model, "optim": optim}


def recipe(tree: dict, **sections: object) -> Recipe:
    merged = tree | {k: (tree.get(k, {}) | v if isinstance(v, dict) else v) for k, v in sections.items()}
    return validate(Recipe, merged, where="test")


def pulled(optim: Optim) -> tuple[nn.Parameter, Tensor, torch.optim.Optimizer]:
    net = nn.Linear(3, 2, bias=False).double()
    start = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], dtype=torch.float64)
    net.weight.data = start + torch.tensor([[0.5, 0.0, -1.0], [2.0, 0.25, 0.0]], dtype=torch.float64)
    return net.weight, start, make_optimizer(net, optim, starts={"weight": start})


GRADIENTS = [torch.tensor([[0.1, -0.4, 2.0], [0.0, 1.0, -3.0]], dtype=torch.float64) * scale for scale in (1, -0.5, 2)]


def test_of_sgd_it_is_the_gradient_of_the_penalty_within_the_momentum() -> None:
    w, start, optimizer = pulled(Optim(lr=RATE, momentum=0.9, weight_decay=7.0, l2_sp=ALPHA))
    expected, moving = w.detach().clone(), torch.zeros_like(w)
    for gradient in GRADIENTS:
        free = expected.clone().requires_grad_()
        slope = torch.autograd.grad(ALPHA / 2 * (free - start).square().sum(), free)[0] + gradient
        moving = 0.9 * moving + slope
        expected = expected - RATE * (slope + 0.9 * moving)
        w.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=1e-14)
        assert torch.equal(w.grad, gradient), "what watches gradients sees those of the loss"


def test_of_adamw_it_is_decoupled() -> None:
    w, start, optimizer = pulled(Optim(name="adamw", lr=RATE, weight_decay=7.0, l2_sp=ALPHA))
    expected, first, second = w.detach().clone(), torch.zeros_like(w), torch.zeros_like(w)
    for t, gradient in enumerate(GRADIENTS, 1):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        step = first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        expected = expected - RATE * ALPHA * (expected - start) - RATE * step
        w.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(w.detach(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize("name", [name for name in list_optimizers() if not name.startswith(ELSEWHERE)])
def test_it_goes_with_every_optimizer_whose_steps_do_not_depend_on_where_the_origin_is(name: str) -> None:
    """Without a decay, what these do elsewhere is the same; the others are refused."""
    ends, origin = [], torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
    for shift in (0.0, 5.0):
        w = nn.Parameter(origin + shift)
        next_to_none = {"lr": 0.01, "weight_decay": 1e-9}  # some look at sizes with a decay alone
        optimizer = create_optimizer_v2([{"params": [w], "weight_decay": 1e-9}], opt=name, **next_to_none)
        for step in range(4):
            torch.manual_seed(step)  # of those that draw
            g = torch.randn(w.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            along = (g * origin).sum(1, keepdim=True) / origin.square().sum(1, keepdim=True)
            w.grad = g - along * origin  # some look whether it is at right angles to the weight
            optimizer.step()
        ends.append(w.detach() - shift)
    same = torch.allclose(*ends, rtol=0, atol=1e-5)
    assert same == (not any(part in name for part in SIZED))
    if same:
        w, start, optimizer = pulled(Optim(name=name, lr=0.01, l2_sp=0.5))
        before = w.detach().clone()
        for _ in range(3):
            w.grad = torch.zeros_like(w)
            optimizer.step()
        assert torch.dist(w, start) < torch.dist(before, start)
    else:
        with pytest.raises(ValueError, match=f"l2_sp: {name} takes steps that depend on how large a weight is"):
            Optim(name=name, l2_sp=0.1)


def test_it_holds_what_came_from_the_weights_alone(pretrained: dict) -> None:
    """Norms and biases of the backbone, too; not the head, nor what techniques add or replace."""
    config = recipe(pretrained, techniques={"acb": {}, "dcl": {"grid": 2}}, model={"head": "probe"})
    pretrained_names = set(load_file(config.model.weights))
    with process_group(config.train) as process, open_session(config, process) as session:
        decay = {id(p): group["weight_decay"] for group in session.optimizer.param_groups for p in group["params"]}
        for name, p in session.step.named_parameters():
            plain = name.removeprefix("net.").replace(".origin.", ".")
            is_held = plain in pretrained_names and not plain.startswith("fc.")
            assert decay[id(p)] == (ALPHA if is_held else 0.01 if p.ndim >= 2 else 0.0), name
            assert is_held == (name in session.pretrained)
        assert {name.rpartition(".")[2] for name in session.pretrained} == {"weight", "bias"}


def test_a_head_that_the_weights_give_is_held_unless_it_is_replaced(tmp_path: Path, pretrained: dict) -> None:
    torch.manual_seed(1)
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "start.safetensors")
    for head in ("timm", "probe", "zero"):
        config = recipe(pretrained, model={"head": head, "freeze": 1})
        with process_group(config.train) as process, open_session(config, process) as session:
            assert ("net.fc.weight" in session.pretrained) == (head == "timm")
            frozen = [p for p in session.step.parameters() if not p.requires_grad]
            assert frozen
            moved = {id(p) for group in session.optimizer.param_groups for p in group["params"]}
            assert not moved & {id(p) for p in frozen}


STEPS = {
    "plain": {},
    "grad_accum_steps": {"train": {"grad_accum_steps": 2}},
    "clip": {"optim": {"clip_grad": 0.01}},
    "sam": {"optim": {"sam": {}}},
    "ema": {"ema": {"decay": 0.5, "warmup": False}},
    "fp16": {"train": {"precision": "fp16"}},
    "layer decay": {"optim": {"layer_decay": 0.5, "head_lr_scale": 3.0}},
    "frozen statistics, recomputed": {"train": {"grad_checkpointing": True}, "model": {"batch_norm": "frozen"}},
}


def values(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().double().clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("kind", STEPS)
def test_the_steps_of_a_run_are_the_formula(pretrained: dict, kind: str) -> None:
    """From the gradients that the optimizer is given (clipped, unscaled, uphill, the sum of all parts): the penalty is beside
    these, as weight decay is, and in no clip."""
    config = recipe(pretrained, **STEPS[kind])
    with process_group(config.train) as process, open_session(config, process) as session:
        start = values(session.step)
        expected, moving, averaged = dict(start), {}, values(session.step.net)
        quiet, batches = Events(Path(), Log(), active=False), session.loader.epoch(0)
        for step in range(4):
            loop.optimizer_step(session, batches, quiet)
            session.progress.step += 1
            rate = {id(p): group["lr"] for group in session.optimizer.param_groups for p in group["params"]}
            slopes = {name: p.grad.double() for name, p in session.step.named_parameters() if p.grad is not None}
            if kind == "clip":
                assert math.sqrt(sum(g.square().sum() for g in slopes.values())) == pytest.approx(0.01, rel=1e-3)
            for name, slope in slopes.items():
                p, w = session.step.get_parameter(name), expected[name]
                decay = ALPHA * (w - start[name]) if name in session.pretrained else 0.01 * w * (w.ndim >= 2)
                moving[name] = 0.9 * moving.get(name, 0.0) + slope + decay
                expected[name] = w - rate[id(p)] * (slope + decay + 0.9 * moving[name])
                torch.testing.assert_close(p.detach().double(), expected[name], rtol=2e-5, atol=2e-6)
            share = 0.5 if step > 1 else 1.0  # nothing is behind the first ones
            for name in averaged if session.ema is not None else ():
                averaged[name] = (1 - share) * averaged[name] + share * expected[f"net.{name}"]
                value = session.ema.module.get_parameter(name).double()
                torch.testing.assert_close(value.detach(), averaged[name], rtol=2e-5, atol=2e-6)


def distance(run: Path) -> float:
    start, end = (load_file(run / "ckpt" / name / "net.safetensors") for name in ("start", "last"))
    body = [key for key in start if not key.startswith("fc.") and not key.endswith(("mean", "var", "tracked"))]
    return math.sqrt(sum(float((start[key] - end[key]).square().sum()) for key in body))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_stronger_the_nearer_to_the_start(tmp_path: Path, pretrained: dict, name: str) -> None:
    far = [
        distance(loop.train(recipe(pretrained, optim={"name": name, "lr": 0.01, "l2_sp": alpha}), tmp_path / str(alpha)))
        for alpha in (0.0, 1.0, 20.0)
    ]
    assert far[0] > 1.02 * far[1] > 1.04 * far[2]


MORE = {"ema": {"decay": 0.9}, "techniques": {"acb": {}}, "model": {"head": "zero"}, "checkpoint": {"keep": 0}}


def test_a_run_that_goes_on_is_drawn_to_where_it_began(tmp_path: Path, pretrained: dict) -> None:
    loop.train(recipe(pretrained, **MORE), tmp_path / "whole")
    for steps in (3, 7):
        loop.train(recipe(pretrained, **MORE, train={"max_steps": steps}), tmp_path / "parts")
    (tmp_path / "start.safetensors").unlink()  # it is not needed any more
    loop.train(recipe(pretrained, **MORE), tmp_path / "parts")
    assert ended(tmp_path / "parts") == ended(tmp_path / "whole")


def ended(run: Path) -> dict[str, bytes]:
    return {name: (run / "ckpt" / "last" / f"{name}.safetensors").read_bytes() for name in ("net", "branches", "ema")}


@pytest.mark.parametrize("damage", ["gone", "a bit", "another's"])
def test_without_its_start_it_does_not_go_on(tmp_path: Path, pretrained: dict, damage: str) -> None:
    run, start = tmp_path / "run", tmp_path / "run" / "ckpt" / "start"
    loop.train(recipe(pretrained, train={"max_steps": 3}), run)
    if damage == "a bit":
        content = bytearray((start / "net.safetensors").read_bytes())
        content[-1] ^= 1
        (start / "net.safetensors").write_bytes(content)
        message = r"ckpt/start: net\.safetensors: its SHA-256 is another\. Put a copy of it there\. To go on from its weights"
    else:
        start.rename(tmp_path / "away")
        message = "optim.l2_sp draws the weights to those that this run began with, and .*ckpt/start: it is not there"
    if damage == "another's":
        wider = {"backbone": "test_efficientnet", "weights": "none"}
        other = loop.train(recipe(pretrained, train={"max_steps": 1}, optim={"l2_sp": 0}, model=wider), tmp_path / "other")
        (other / "ckpt" / "start").rename(start)
        message = "ckpt/start is of a run of other settings"
    before = {path: path.read_bytes() for path in (run / "ckpt").rglob("*.*") if path.is_file()}
    with pytest.raises(FgvcError, match=message):
        loop.train(recipe(pretrained), run)
    assert {path: path.read_bytes() for path in (run / "ckpt").rglob("*.*") if path.is_file()} == before


@pytest.mark.slow
def test_two_processes_go_on_as_if_they_had_not_stopped(tmp_path: Path, pretrained: dict) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(dump(recipe(pretrained, train={"epochs": 1}, ema={"decay": 0.9})))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fgvc", "train"]

    def train(out: str, *more: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [*launch, str(file), *more, "--out", str(tmp_path / out)]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
        assert process.returncode == 0, process.stderr[-3000:]

    train("whole")
    train("parts", "train.max_steps=3")
    train("parts")
    assert ended(tmp_path / "parts") == ended(tmp_path / "whole")


def test_random_weights_are_no_start_to_stay_near(pretrained: dict) -> None:
    with pytest.raises(FgvcError, match=r"optim\.l2_sp: random weights are no place to stay near"):
        recipe(pretrained, model={"weights": "none"})


def test_a_dry_run_has_it_too(pretrained: dict) -> None:
    assert api.forecast(recipe(pretrained, train={"max_steps": 1})).steps == 1
