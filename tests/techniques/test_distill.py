"""Distillation in the step, with teachers that are made by hand and remember what they were asked."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.config.loading import dump
from fgvc.config.recipe import Recipe
from fgvc.config.teachers import AnyTeacher
from fgvc.config.template import commented
from fgvc.data.recipe import load_recipe
from fgvc.errors import FgvcError
from fgvc.runs.step import StepModule
from fgvc.techniques.api import Batch, EpochStart
from fgvc.techniques.cutout.settings import CutoutSettings
from fgvc.techniques.distill.losses import attention, decoupled, divergence, hint, softened
from fgvc.techniques.distill.settings import DistillSettings
from fgvc.techniques.mixup.settings import MixupSettings
from fgvc.techniques.plan import Attachments
from fgvc.techniques.registry import build_technique
from fgvc.techniques.teacher import Teacher, TeacherOutput, teacher_output

CLASSES, SIZE = 5, (64, 64)
RUN, OTHER = {"kind": "run", "path": "a"}, {"kind": "run", "path": "b", "weight": 3.0}


def net(seed: int = 0, name: str = "test_resnet") -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=CLASSES)


def batch(size: int = 4, *, render: int | None = None) -> Batch:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(size, 3, *SIZE, generator=rng)
    y = (torch.arange(size) * 2) % CLASSES
    finer = None if render is None else torch.randn(size, 3, render, render, generator=rng)
    geometry = torch.arange(6.0).view(1, 2, 3) + torch.arange(size).view(-1, 1, 1)
    return Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=y, geometry=geometry, render=finer)


class Desk:
    """Opens teachers of known answers: linear in the mean colours of the image, with or without a map of its cells."""

    def __init__(self, *, size: tuple[int, int] | None = None, channels: int | None = 3) -> None:
        self.size, self.channels = size, channels
        self.inputs: list[Tensor] = []
        self.identities = [f"teacher {number}" for number in range(9)]
        self.opened = 0

    def __call__(self, settings: AnyTeacher, attachments: Attachments) -> Teacher:
        self.opened += 1
        identity = self.identities[self.opened]
        return Teacher(
            name=f"{settings.kind} {self.opened}",
            forward=partial(self.answer, self.opened),
            size=self.size,
            channels=self.channels,
            convert=lambda x: x,
            identity=lambda: identity,
        )

    def answer(self, seed: int, x: Tensor) -> TeacherOutput:
        self.inputs.append(x)
        weight = torch.randn(3, CLASSES, generator=torch.Generator().manual_seed(seed))
        features = None if self.channels is None else F.avg_pool2d(x, 8) * seed
        return TeacherOutput(40 * x.mean((2, 3)) @ weight, features)


def run_step(desk: Desk | None, data: Batch, *more: object, **settings: object) -> tuple[StepModule, dict[str, Tensor]]:
    settings = {"teachers": [RUN]} | settings
    techniques = {config.kind: build_technique(config) for config in (*more, DistillSettings(**settings))}
    step = StepModule(net(), techniques, size=SIZE, opener=desk).train()
    return step, step(data, step.draw(data, 0.0, seed=1, step=2))[0]


def logits(data: Batch) -> Tensor:
    return net().train()(data.x).detach()


@pytest.mark.parametrize("method", ["kd", "dkd"])
def test_the_term_is_of_the_main_view_and_its_teachers(method: str) -> None:
    desk, data = Desk(), batch()
    step, losses = run_step(desk, data, teachers=[RUN, OTHER], method=method, kd=0.25, temperature=3.0, alpha=2, beta=5)
    theirs = [desk.answer(seed, data.x).logits for seed in (1, 2)]
    q = (theirs[0] / 3).softmax(1) / 4 + (theirs[1] / 3).softmax(1) * 3 / 4
    log_p = (logits(data) / 3).log_softmax(1)
    kl = {"kd": divergence(log_p, q.log()), "dkd": decoupled(log_p, q.log(), data.labels, alpha=2, beta=5)}
    torch.testing.assert_close(losses["distill.kd"], 9 * kl[method], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["loss"], losses["base"] + 0.25 * losses["distill.kd"])
    assert float(losses["distill.teacher_accuracy"]) == float((q.argmax(1) == data.labels).float().mean())
    assert set(losses) == {"base", "loss", "distill.kd", "distill.teacher_accuracy"}
    losses["distill.kd"].backward()
    assert step.net.fc.weight.grad.abs().max() > 0


def test_attention_and_hints_are_means_over_the_teachers_that_have_features() -> None:
    desk, data = Desk(), batch()
    answer = desk.answer
    desk.answer = lambda seed, x: TeacherOutput(answer(seed, x).logits, None) if seed == 2 else answer(seed, x)

    def some(settings: AnyTeacher, attachments: Attachments) -> Teacher:
        desk.channels = None if desk.opened == 1 else 3
        return desk(settings, attachments)

    step, losses = run_step(some, data, teachers=[RUN, OTHER, RUN], kd=0, attention=0.5, hints=100)
    f = net().train().forward_features(data.x).detach()
    theirs = [answer(seed, data.x).features for seed in (1, 3)]
    branch = step.branches["distill"]
    assert set(dict(branch.named_children())) == {"hint0", "hint2"}
    expected = torch.stack([attention(f, t) for t in theirs]).mean()
    torch.testing.assert_close(losses["distill.attention"].detach(), expected, rtol=1e-4, atol=1e-5)
    hints = torch.stack([hint(branch[f"hint{n}"], f, t) for n, t in ((0, theirs[0]), (2, theirs[1]))]).mean()
    torch.testing.assert_close(losses["distill.hints"], hints, rtol=1e-4, atol=1e-5)
    assert "distill.kd" not in losses
    losses["loss"].backward()
    assert all(p.grad.abs().max() > 0 for p in branch.parameters())


def test_a_larger_teacher_sees_the_render_and_asks_for_it() -> None:
    desk, data = Desk(size=(100, 90)), batch(render=104)
    step, _ = run_step(desk, data)
    expected = F.interpolate(data.render, (100, 90), mode="bicubic", antialias=True)
    torch.testing.assert_close(desk.inputs[0], expected, rtol=0, atol=0)
    assert step.attachments.render == 104 / 64  # in whole eights
    small, _ = run_step(Desk(size=(32, 32)), batch())
    assert small.attachments.render == 1


def test_mixed_pixels_are_the_teachers_too_and_dkd_falls_back_to_kd() -> None:
    desk, data = Desk(size=(96, 96)), batch(render=96)
    techniques = {"mixup": build_technique(MixupSettings(alpha=1.0))}
    techniques["distill"] = build_technique(DistillSettings(teachers=[RUN], method="dkd", beta=3))
    step = StepModule(net(), techniques, size=SIZE, opener=desk).train()
    losses, views = step(data, step.draw(data, 0.0, seed=1, step=2))
    mixed = views[0].x
    assert not torch.equal(mixed, data.x)
    torch.testing.assert_close(desk.inputs[0], F.interpolate(mixed, (96, 96), mode="bicubic", antialias=True))
    teacher_logits = desk.answer(1, desk.inputs[0]).logits
    log_p = softened([net().train()(mixed).detach()], 4.0)
    torch.testing.assert_close(losses["distill.kd"], 16 * divergence(log_p, softened([teacher_logits], 4.0)))


def test_erased_pixels_are_the_teachers_too() -> None:
    desk, data = Desk(), batch()
    run_step(desk, data, CutoutSettings(probability=1.0))
    assert desk.inputs[0] is not data.x
    assert not torch.equal(desk.inputs[0], data.x)


def test_the_second_pass_on_the_same_views_needs_no_other_answer() -> None:
    desk, data = Desk(size=(96, 96)), batch(render=96)
    step = StepModule(net(), {"distill": build_technique(DistillSettings(teachers=[RUN]))}, size=SIZE, opener=desk).train()
    draws = step.draw(data, 0.0, seed=0, step=0)
    first, views = step(data, draws)
    second, _ = step(data, draws, views)
    assert torch.equal(first["distill.kd"], second["distill.kd"])
    assert len(desk.inputs) == 1
    other = batch(render=96)
    other.render = -other.render
    step(other, step.draw(other, 0.0, seed=0, step=1))
    assert torch.equal(desk.inputs[1], -desk.inputs[0])  # nothing is remembered from one step to the next


def test_the_moving_average_teaches() -> None:
    average, data = net(seed=7).eval(), batch()
    before = copy.deepcopy(average.state_dict())

    def opener(settings: AnyTeacher, attachments: Attachments) -> Teacher:
        answer = lambda x: teacher_output(attachments.average[0], x, maps=True)  # noqa: E731
        return Teacher(name="ema", forward=answer, size=None, channels=1, convert=lambda x: x)

    techniques = {"distill": build_technique(DistillSettings(attention=1.0))}
    step = StepModule(net(), techniques, size=SIZE, opener=opener).train()
    step.set_average(average)
    losses, _ = step(data, step.draw(data, 0.0, seed=0, step=0))
    with torch.no_grad():
        expected = 16 * divergence(softened([logits(data)], 4.0), softened([average(data.x)], 4.0))
        maps = attention(net().train().forward_features(data.x), average.forward_features(data.x))
    torch.testing.assert_close(losses["distill.kd"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["distill.attention"], maps, rtol=1e-4, atol=1e-5)
    losses["loss"].backward()
    assert all(p.grad is None for p in average.parameters())
    assert all(torch.equal(value, before[key]) for key, value in average.state_dict().items())


def test_the_teacher_is_no_part_of_the_step() -> None:
    desk = Desk()
    step, _ = run_step(desk, batch())
    plain = StepModule(net(), {}, size=SIZE)
    assert step.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in step.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert len(list(step.modules())) == len(list(plain.modules()))


def test_a_net_that_is_only_rebuilt_needs_no_teacher() -> None:
    step, losses = run_step(None, batch(), hints=1.0, attention=1.0)
    assert set(losses) == {"base", "loss"}
    assert not len(step.branches)


def test_terms_of_weight_zero_ask_nobody() -> None:
    desk = Desk()
    _, losses = run_step(desk, batch(), kd=((0.0, 0.0), (1.0, 1.0)))
    assert set(losses) == {"base", "loss"}
    assert not desk.inputs


@pytest.mark.parametrize("term", ["attention", "hints"])
def test_a_teacher_without_features_is_refused_by_name(term: str) -> None:
    with pytest.raises(
        FgvcError, match=rf"techniques\.distill\.{term}: run 1 gives logits, no features; set {term} to 0"
    ):
        run_step(Desk(channels=None), batch(), **{term: [[0, 0], [1, 1]]})


def test_in_half_precision_the_terms_are_float32() -> None:
    data = batch()
    with torch.autocast("cpu", torch.bfloat16):
        _, losses = run_step(Desk(), data, hints=1.0, attention=1.0)
    assert all(losses[f"distill.{name}"].dtype == torch.float32 for name in ("kd", "hints", "attention"))
    assert all(torch.isfinite(value) for value in losses.values())


def epoch(folder: Path, *, number: int = 0, replays: str | None = "images") -> EpochStart:
    facts = SimpleNamespace(number=number, folder=folder, images=10, first=lambda do: do(), messages=[])
    facts.replays, facts.say = (lambda: replays), facts.messages.append
    return facts  # type: ignore[return-value]


def with_cache(desk: Desk, folder: Path, start: EpochStart, data: Batch, **settings: object) -> Tensor:
    config = DistillSettings(**{"teachers": [RUN], "cache": folder} | settings)
    step = StepModule(net(), {"distill": build_technique(config)}, size=SIZE, opener=desk).train()
    step.techniques["distill"].before_epoch(start)
    return step(data, step.draw(data, 0.0, seed=0, step=0))[0]["distill.kd"]


def test_a_second_run_reads_what_the_first_one_kept_and_asks_nobody(tmp_path: Path) -> None:
    first, second = Desk(), Desk()
    first_loss = with_cache(first, tmp_path, epoch(tmp_path), batch())
    read = with_cache(second, tmp_path, epoch(tmp_path), batch())
    assert (len(first.inputs), len(second.inputs)) == (1, 0)
    assert torch.equal(first_loss, read)
    # Whatever is made of the logits, and however many teachers there are.
    with_cache(third := Desk(), tmp_path, epoch(tmp_path), batch(), method="dkd", temperature=2.0)
    assert not third.inputs
    with_cache(fourth := Desk(), tmp_path, epoch(tmp_path), batch(), teachers=[RUN, OTHER])
    assert len(fourth.inputs) == 1


@pytest.mark.parametrize("other", ["teacher", "images", "epoch", "crop", "unknown", "features"])
def test_what_was_kept_for_something_else_is_not_read(tmp_path: Path, other: str) -> None:
    with_cache(Desk(), tmp_path, epoch(tmp_path), batch())
    desk, data, start, settings = Desk(), batch(), epoch(tmp_path), {}
    if other == "teacher":
        desk.identities[1] = "another"
    elif other == "images":
        start = epoch(tmp_path, replays="others")
    elif other == "epoch":
        start = epoch(tmp_path, number=1)
    elif other == "crop":
        data.geometry = data.geometry + 1
    elif other == "unknown":
        start = epoch(tmp_path, replays=None)
    else:
        settings = {"attention": 1.0}
    with_cache(desk, tmp_path, start, data, **settings)
    assert len(desk.inputs) == 1
    assert len(start.messages) == (other == "unknown")


def test_mixed_images_are_neither_kept_nor_read(tmp_path: Path) -> None:
    desk, data = Desk(), batch()
    techniques = {
        "mixup": build_technique(MixupSettings(alpha=1.0)),
        "distill": build_technique(DistillSettings(teachers=[RUN], cache=tmp_path)),
    }
    step = StepModule(net(), techniques, size=SIZE, opener=desk).train()
    techniques["distill"].before_epoch(epoch(tmp_path))
    for _ in range(2):
        step(data, step.draw(data, 0.0, seed=1, step=2))
    assert len(desk.inputs) == 2
    with_cache(desk, tmp_path, epoch(tmp_path), batch())
    assert len(desk.inputs) == 3


def test_a_recipe_with_teachers_can_be_written_out_and_read_back(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("data: {kind: folder, root: x}\nmodel: {backbone: test_resnet}\nema: {}\n")
    for settings in ("{}", "{teachers: [{kind: bundle, path: b}, {kind: ema, weight: 2}]}"):
        recipe = load_recipe(tmp_path / "my.yaml", [f"techniques.distill={settings}"])
        (tmp_path / "given.yaml").write_text(dump(recipe))
        (tmp_path / "own.yaml").write_text(commented(Recipe, tmp_path / "given.yaml"))
        assert load_recipe(tmp_path / "own.yaml") == recipe
    (tmp_path / "my.yaml").write_text((tmp_path / "my.yaml").read_text() + "techniques: {distill: {kd: 2}}\n")
    (tmp_path / "own.yaml").write_text(commented(Recipe, tmp_path / "my.yaml"))
    assert load_recipe(tmp_path / "own.yaml") == load_recipe(tmp_path / "my.yaml")
