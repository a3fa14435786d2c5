"""The step against plain cross-entropy, and its attachments against a technique that touches every one of them."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import ClassVar

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from fgvc.errors import FgvcError
from fgvc.models.backbone import freeze
from fgvc.models.loss import Criterion
from fgvc.runs.step import StepModule
from fgvc.techniques.api import Batch, Draws, Technique, View
from fgvc.techniques.dcl.settings import DclSettings
from fgvc.techniques.mixup.settings import MixupSettings
from fgvc.techniques.plan import Attachments, Plan
from fgvc.techniques.registry import build_technique

SIZE, CLASSES = (32, 32), 5
NO_DRAWS = Draws(0.0)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=CLASSES)


def batch(size: int = 4) -> Batch:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(size, 3, *SIZE, generator=rng)
    y = torch.arange(size) % CLASSES
    return Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=y, geometry=torch.zeros(size, 2, 3))


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.named_buffers()}


class Probe(Technique):
    """A technique that uses every hook; `weights` and `view_weight` switch its parts."""

    def __init__(self, **options: object) -> None:
        self.o = SimpleNamespace(early=None, late=None, gate=None, hook=None, term=0.0, view_weight=1.0, **{})
        self.o.__dict__.update(options)
        self.weights = {"norm": self.o.term}
        self.recorded: dict = {}

    def setup(self, plan) -> None:
        plan.add("scale", nn.Linear(1, 1))
        if self.o.hook:
            plan.hook(self.o.hook)
        if self.o.gate:
            plan.gate(plan.stage(-1), lambda f, ctx: f * ctx.draw)

    def draw(self, rng, batch):
        return 0.5

    def views(self, batch, ctx):
        return (
            [View("flip", batch.x_clean.flip(3), batch.target, **self.o.early, weight=self.o.view_weight)]
            if self.o.early
            else []
        )

    def views_after(self, batch, outputs, ctx):
        if not self.o.late:
            return []
        self.recorded["logits"] = outputs["main"].logits.detach()
        return [View("dark", batch.x_clean * 0.5, batch.target, weight=self.o.view_weight, **self.o.late)]

    def losses(self, outputs, ctx):
        self.recorded["outputs"] = outputs
        return {"norm": ctx.branches["scale"](outputs["main"].features.mean().view(1, 1)).sum()}


def run(step: StepModule, draws: Draws = NO_DRAWS, views=None):
    step.attach_hooks()
    step.train()
    losses, new_views = step(batch(), draws, views)
    losses["loss"].backward()
    for handle in step._handles:
        handle.remove()
    return losses, new_views


def plain(smoothing: float = 0.1):
    model = net().train()
    loss = F.cross_entropy(model(batch().x), batch().labels, label_smoothing=smoothing)
    loss.backward()
    return model, loss


@pytest.mark.parametrize(
    "techniques",
    [{}, {"probe": Probe()}, {"probe": Probe(early={"bn": "shared"}, late={"bn": "own"}, view_weight=0.0)}],
    ids=["none", "term of weight 0", "views of weight 0"],
)
def test_with_all_weights_zero_the_step_is_plain_cross_entropy_bit_for_bit(techniques) -> None:
    model, loss = plain()
    step = StepModule(net(), techniques, size=SIZE, criterion=Criterion(label_smoothing=0.1))
    losses, _ = run(step)
    assert torch.equal(losses["loss"], loss)
    for (name, a), b in zip(model.named_parameters(), step.net.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for name, value in buffers(model).items():
        assert torch.equal(value, step.net.get_buffer(name)), name


@pytest.mark.parametrize("which", ["early", "late"])
def test_a_view_of_its_own_leaves_the_clean_forward_and_the_running_statistics_alone(which: str) -> None:
    model, _ = plain()
    probe = Probe(**{which: {"bn": "own"}})
    step = StepModule(net(), {"probe": probe}, size=SIZE, criterion=Criterion(label_smoothing=0.1))
    losses, views = run(step)
    assert [v.name for v in views] == ["main", "probe.flip" if which == "early" else "probe.dark"]
    for name, value in buffers(model).items():
        assert torch.equal(value, step.net.get_buffer(name)), name
    twin = net().train()
    main = F.cross_entropy(twin(views[0].x), batch().labels, label_smoothing=0.1)
    second = F.cross_entropy(twin(views[1].x), batch().labels, label_smoothing=0.1)
    torch.testing.assert_close(losses["base"], (main + second) / 2)


def test_a_shared_view_shares_the_statistics_and_weighs_as_it_says() -> None:
    step = StepModule(net(), {"probe": Probe(early={"bn": "shared"}, view_weight=3.0)}, size=SIZE)
    losses, views = run(step)
    twin = net().train()
    z = twin(torch.cat([views[0].x, views[1].x]))
    first, second = F.cross_entropy(z[:4], batch().labels), F.cross_entropy(z[4:], batch().labels)
    torch.testing.assert_close(losses["base"], (first + 3 * second) / 4)
    torch.testing.assert_close(buffers(step.net), buffers(twin))


def test_a_late_view_may_not_share_the_clean_forward() -> None:
    with pytest.raises(FgvcError, match="can't share"):
        run(StepModule(net(), {"probe": Probe(late={"bn": "shared"})}, size=SIZE))


def test_a_late_view_sees_the_outputs_of_the_clean_one() -> None:
    probe = Probe(late={"bn": "own"})
    run(StepModule(net(), {"probe": probe}, size=SIZE))
    torch.testing.assert_close(probe.recorded["logits"], net().train()(batch().x).detach())


def test_a_second_call_with_the_views_of_the_first_makes_none_anew() -> None:
    probe = Probe(early={"bn": "own"}, late={"bn": "own"})
    step = StepModule(net(), {"probe": probe}, size=SIZE)
    losses, views = run(step)
    probe.o.early = probe.o.late = None
    again, same = run(step, views=views)
    assert [v.name for v in same] == [v.name for v in views]
    torch.testing.assert_close(again["loss"], losses["loss"])


def test_a_gate_acts_in_training_on_gated_views_only() -> None:
    probe = Probe(gate=True, early={"bn": "shared", "gated": False})
    step = StepModule(net(), {"probe": probe}, size=SIZE)
    free = StepModule(net(), {"probe": Probe(early={"bn": "shared"})}, size=SIZE)
    probe.weights["norm"] = free.techniques["probe"].weights["norm"] = 1e-6
    run(step, Draws(0.0, {"probe": 0.5}))
    run(free)
    gated, ungated = probe.recorded["outputs"], free.techniques["probe"].recorded["outputs"]
    torch.testing.assert_close(gated["main"].features, 0.5 * ungated["main"].features)
    torch.testing.assert_close(gated["probe.flip"].features, ungated["probe.flip"].features)
    step.attach_hooks()
    step.eval()
    untouched = copy.deepcopy(step.net)
    for module in untouched.modules():
        module._forward_hooks.clear()
    assert torch.equal(step.net(batch().x), untouched(batch().x))


def test_a_tap_records_what_its_module_gave() -> None:
    probe = Probe(hook="layer2", term=1.0)
    run(StepModule(net(), {"probe": probe}, size=SIZE))
    outputs = []
    twin = net().train()
    twin.layer2.register_forward_hook(lambda m, a, out: outputs.append(out))
    twin(batch().x)
    torch.testing.assert_close(probe.recorded["outputs"]["main"].hooked["layer2"], outputs[0])


def test_a_tap_that_does_not_fire_is_an_error() -> None:
    model = net()
    model.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(FgvcError, match="'spare' did not fire"):
        run(StepModule(model, {"probe": Probe(hook="spare")}, size=SIZE))


def test_a_term_is_weighted_and_its_branch_learns() -> None:
    probe = Probe(term=2.0)
    step = StepModule(net(), {"probe": probe}, size=SIZE)
    losses, _ = run(step)
    torch.testing.assert_close(losses["loss"], losses["base"] + 2 * losses["probe.norm"])
    assert step.branches["probe"]["scale"].bias.grad.item() == 2.0


def test_a_term_without_a_weight_is_an_error() -> None:
    probe = Probe(term=1.0)
    probe.losses = lambda outputs, ctx: {"other": torch.zeros(())}
    with pytest.raises(FgvcError, match="'other' is neither"):
        run(StepModule(net(), {"probe": probe}, size=SIZE))


def test_mixup_is_its_formula_in_float64() -> None:
    share, order = torch.tensor([0.3, 0.3, 0.3, 0.3], dtype=torch.float64), torch.tensor([2, 0, 3, 1])
    step = StepModule(
        net().double(), {"mixup": build_technique(MixupSettings())}, size=SIZE, criterion=Criterion(label_smoothing=0.1)
    )
    data = batch()
    data.x = data.x_clean = data.x.double()
    step.train()
    losses, _ = step(data, Draws(0.0, {"mixup": (share, order)}))
    z = net().double().train()(0.3 * data.x + 0.7 * data.x[order])
    y = data.labels
    expected = 0.3 * F.cross_entropy(z, y, label_smoothing=0.1) + 0.7 * F.cross_entropy(
        z, y[order], label_smoothing=0.1
    )
    # the step computes every loss in float32 at least; from float64 logits that costs 1e-7
    torch.testing.assert_close(losses["loss"].double(), expected, rtol=1e-6, atol=1e-6)


def test_weight_of_every_view_zero_is_impossible_for_the_main_one() -> None:
    _, views = run(StepModule(net(), {}, size=SIZE))
    assert views[0].weight == 1.0


@pytest.mark.parametrize(
    ("name", "stages", "kwargs", "rests"),
    [
        ("test_resnet", 2, {}, "layer1.0.conv1.weight"),
        ("test_efficientnet", 1, {}, "conv_stem.weight"),
        ("test_vit", 2, {"img_size": 32}, "cls_token"),
        ("test_convnext", 1, {}, "stages.0.blocks.0.gamma"),
    ],
)
def test_frozen_stages_keep_their_weights_and_statistics(name: str, stages: int, kwargs: dict, rests: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES, **kwargs)
    step = StepModule(model, {}, size=SIZE, frozen=freeze(model, stages))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    step.train()
    optimizer = torch.optim.SGD([p for p in step.parameters() if p.requires_grad], lr=0.1)
    step(batch(), NO_DRAWS)[0]["loss"].backward()
    optimizer.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    names = list(before)
    last = [k for k in names if k.startswith(str(model.feature_info[stages - 1]["module"]) + ".")][-1]
    after = f"{model.feature_info[stages]['module']}."
    assert any(key.startswith(after) for key in moved)
    assert rests in before
    assert not moved & set(names[: names.index(last) + 1])
    with pytest.raises(FgvcError, match="leave at least one"):
        freeze(model, len(model.feature_info))


def test_what_a_technique_draws_does_not_depend_on_the_others() -> None:
    def draws_of(*kinds: str, step: int = 3) -> dict:
        techniques = {"mixup": build_technique(MixupSettings()), "dcl": build_technique(DclSettings(grid=2))}
        chosen = {kind: techniques[kind] for kind in kinds}
        return StepModule(net(), chosen, size=SIZE).draw(batch(), 0.0, seed=1, step=step).of

    both = draws_of("mixup", "dcl")
    assert torch.equal(draws_of("dcl")["dcl"], both["dcl"])
    assert all(torch.equal(a, b) for a, b in zip(draws_of("mixup")["mixup"], both["mixup"], strict=True))
    assert not torch.equal(draws_of("dcl", step=4)["dcl"], both["dcl"])


def test_l1_is_the_sum_of_the_weights_and_pulls_them_to_zero() -> None:
    step = StepModule(net(), {}, size=SIZE, l1=0.01)
    losses, _ = run(step)
    expected = sum(p.detach().double().abs().sum() for p in step.net.parameters() if p.ndim >= 2)
    assert float(losses["l1"].detach()) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(losses["loss"], losses["base"] + 0.01 * losses["l1"])
    twin, _ = plain(smoothing=0.0)
    for (name, p), q in zip(twin.named_parameters(), step.net.parameters(), strict=True):
        pull = 0.01 * p.detach().sign() if p.ndim >= 2 else torch.zeros_like(p)
        torch.testing.assert_close(q.grad, p.grad + pull, msg=name)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
@pytest.mark.parametrize("view", [None, "shared", "own"])
def test_recomputed_activations_change_neither_gradients_nor_statistics(name: str, view: str | None) -> None:
    def step_and_losses(grad_checkpointing: bool) -> tuple[StepModule, dict]:
        torch.manual_seed(0)
        kwargs = {"img_size": 32} if name == "test_vit" else {}
        model = timm.create_model(name, num_classes=CLASSES, drop_rate=0.2, **kwargs)
        hook = Plan("probe", Attachments(model, SIZE)).stage(0)
        probe = Probe(early={"bn": view} if view else None, gate=True, hook=hook)
        step = StepModule(model, {"probe": probe}, size=SIZE, grad_checkpointing=grad_checkpointing)
        torch.manual_seed(1)
        losses = None
        for _ in range(2):
            losses, _ = run(step, Draws(0.0, {"probe": torch.tensor(0.5)}))
        return step, losses

    (plainly, expected), (again, again_losses) = step_and_losses(False), step_and_losses(True)
    torch.testing.assert_close(again_losses["loss"], expected["loss"])
    for (key, p), q in zip(plainly.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=lambda text, key=key: f"{key}: {text}")
    for key, value in buffers(plainly.net).items():
        if "num_batches_tracked" not in key:
            torch.testing.assert_close(again.net.get_buffer(key), value, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    ("early", "late"),
    [
        ({"bn": "shared", "gated": False}, None),
        ({"bn": "own", "gated": False}, None),
        (None, {"bn": "own", "gated": False}),
        ({"bn": "own", "gated": False}, {"bn": "own"}),
        ({"bn": "own"}, {"bn": "own", "gated": False}),
    ],
)
def test_recomputed_gates_know_their_views(early: dict | None, late: dict | None) -> None:
    """Views of one size, gated and not: in the backward each gate is asked for the views that it was asked for before."""

    def gradients(grad_checkpointing: bool) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        probe = Probe(early=early, late=late, gate=True)
        step = StepModule(net(), {"probe": probe}, size=SIZE, grad_checkpointing=grad_checkpointing)
        draws = Draws(0.0, {"probe": torch.tensor(0.5)})  # a tensor is saved, so the gate itself is recomputed
        return run(step, draws)[0], [p.grad for p in step.net.parameters()]

    (losses, again), (expected, plainly) = gradients(True), gradients(False)
    torch.testing.assert_close(losses["loss"], expected["loss"])
    for ours, theirs in zip(again, plainly, strict=True):
        torch.testing.assert_close(ours, theirs)


class Measuring(Technique):
    """Minimises nothing."""

    measures = ("norm",)

    def losses(self, outputs, ctx):
        return {"norm": outputs["main"].logits.norm()}


def test_what_is_only_measured_is_reported_and_not_minimised() -> None:
    losses, _ = run(StepModule(net(), {"measuring": Measuring()}, size=SIZE))
    assert losses["measuring.norm"] > 0
    assert torch.equal(losses["loss"], losses["base"])


def test_a_term_that_is_no_scalar_and_a_module_that_is_not_there_are_named() -> None:
    class Rows(Measuring):
        weights: ClassVar = {"rows": 1.0}

        def losses(self, outputs, ctx):
            return {"rows": outputs["main"].logits.norm(dim=1)}

    class Elsewhere(Technique):
        def setup(self, plan) -> None:
            plan.hook("layer9")

    with pytest.raises(FgvcError, match=r"techniques\.rows: the loss term 'rows' has shape \(\d+,\); give a scalar"):
        run(StepModule(net(), {"rows": Rows()}, size=SIZE))
    with pytest.raises(FgvcError, match=r"techniques\.elsewhere: this backbone has no module 'layer9'"):
        StepModule(net(), {"elsewhere": Elsewhere()}, size=SIZE)
