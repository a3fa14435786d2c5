"""Mistakes that the author of a technique can make: each is an error that names the technique, the hook and the way out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm import create_model
from torch import Tensor, nn
from typing_extensions import override

from fgvc.config.technique import Mixing, TechniqueSettings
from fgvc.errors import FgvcError
from fgvc.runs.step import StepModule
from fgvc.techniques.api import Batch, Output, Technique, View
from fgvc.techniques.plan import Context, Plan
from fgvc.techniques.registry import build_technique

SIDE = 32


class Blank(Technique):
    """A technique whose hooks are those that a test gives it."""

    def __init__(self, **hooks: Callable[..., Any]) -> None:
        self.weights = {"term": 1.0}
        self._hooks = hooks

    def _do(self, name: str, *arguments: Any, otherwise: Any = None) -> Any:
        return self._hooks[name](*arguments) if name in self._hooks else otherwise

    @override
    def setup(self, plan: Plan) -> None:
        self._do("setup", self, plan)

    @override
    def on_batch(self, batch: Batch, ctx: Context) -> Batch:
        return self._do("on_batch", batch, ctx, otherwise=batch)

    @override
    def views(self, batch: Batch, ctx: Context) -> list[View]:
        return self._do("views", batch, ctx, otherwise=[])

    @override
    def losses(self, outputs: Mapping[str, Output], ctx: Context) -> dict[str, Tensor]:
        return self._do("losses", outputs, ctx, otherwise={})


def batch(images: int = 4) -> Batch:
    x, y = torch.randn(images, 3, SIDE, SIDE), torch.arange(images) % 3
    geometry = torch.eye(3)[:2].repeat(images, 1, 1)
    return Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=y, geometry=geometry)


def step_of(technique: Technique) -> StepModule:
    step = StepModule(create_model("test_resnet", num_classes=3), {"blank": technique}, size=(SIDE, SIDE)).train()
    step.attach_hooks()
    return step


def run(technique: Technique) -> dict[str, Tensor]:
    step, data = step_of(technique), batch()
    return step(data, step.draw(data, 0.0, seed=0, step=0))[0]


class Helper:
    """Holds a module for a technique."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


def keep(**values: Any) -> Callable[[Technique, Plan], None]:
    return lambda technique, plan: vars(technique).update(values)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (nn.Linear(2, 2), "self.head.weight"),
        ([nn.ReLU(), nn.Linear(2, 2)], r"self.head\[1\].weight"),
        ({"a": nn.Linear(2, 2)}, r"self.head\['a'\].weight"),
        (Helper(nn.BatchNorm2d(2, affine=False)), "self.head.module.running_mean"),
        (nn.Parameter(torch.zeros(1)), "self.head is"),
        (torch.zeros(1, requires_grad=True), "self.head is"),
    ],
)
def test_a_weight_that_is_kept_in_the_technique_is_refused(value: object, name: str) -> None:
    with pytest.raises(
        FgvcError, match=rf"techniques\.blank: {name}.*not trained, moved or saved.*plan\.add.*ctx\.branches"
    ):
        step_of(Blank(setup=keep(head=value)))


def test_a_weight_that_a_later_hook_keeps_is_refused() -> None:
    technique = Blank()

    def losses(outputs: Mapping[str, Output], ctx: Context) -> dict[str, Tensor]:
        technique.head = nn.Linear(3, 1)  # type: ignore[attr-defined]
        return {"term": technique.head(outputs["main"].logits).mean()}

    technique._hooks["losses"] = losses
    with pytest.raises(FgvcError, match=r"techniques\.blank: self\.head\.weight"):
        run(technique)


def test_a_weight_of_its_class_is_refused_and_a_tensor_of_a_step_is_not() -> None:
    shared = type("Shared", (Technique,), {"heads": [nn.Linear(2, 2)]})
    with pytest.raises(FgvcError, match=r"techniques\.blank: self\.heads\[0\]\.weight"):
        step_of(shared())
    technique = Blank()

    def views(data: Batch, ctx: Context) -> list[View]:
        vars(technique)["delta"] = torch.zeros_like(data.x, requires_grad=True)  # as an adversary keeps it
        return []

    technique._hooks["views"] = views
    run(technique)


def test_a_module_without_weights_an_added_one_and_the_nets_own_may_be_kept() -> None:
    def setup(technique: Blank, plan: Plan) -> None:
        head = nn.Linear(3, 1)
        plan.add("head", head)
        vars(technique).update(pool=nn.AvgPool2d(2), head=head, last=plan.module("fc"), mean=torch.zeros(3))

    assert "branches.blank.head.weight" in step_of(Blank(setup=setup)).added


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda net: net.add_module("finder", nn.Conv2d(1, 1, 1)), r"finder \(Conv2d\) is new"),
        (lambda net: setattr(net.layer1[0], "act1", nn.Tanh()), r"layer1\.0\.act1 \(Tanh\) is another one"),
        (lambda net: setattr(net, "fc", nn.Linear(net.fc.in_features, 3)), r"fc \(Linear\) is another one"),
        (
            lambda net: setattr(net.fc, "weight", nn.Parameter(torch.zeros(3, 2))),
            r"fc\.weight \(Parameter\) is another one",
        ),
        (lambda net: net.fc.register_forward_hook(lambda *_: None), r"fc: forward hook \d+ \(function\) is new"),
        (lambda net: setattr(net.fc, "forward", lambda x: x), r"fc: forward \(function\) is new"),
        (lambda net: nn.utils.parametrizations.weight_norm(net.fc), r"fc\.parametrizations"),
    ],
)
def test_a_setup_that_changes_the_net_itself_is_refused(change: Callable[[nn.Module], Any], what: str) -> None:
    def setup(technique: Blank, plan: Plan) -> None:
        change(plan.module(""))

    with pytest.raises(FgvcError, match=rf"techniques\.blank: its setup changed the network itself.*{what}.*plan\.add"):
        step_of(Blank(setup=setup))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("head", "head"), r"plan\.add\('head'\): there is a module of that name already"),
        (("a.b",), r"plan\.add\('a\.b'\): .*can't contain"),
    ],
)
def test_a_name_of_a_module_is_given_once_and_without_dots(names: tuple[str, ...], message: str) -> None:
    def setup(technique: Blank, plan: Plan) -> None:
        for name in names:
            plan.add(name, nn.Linear(3, 1))

    with pytest.raises(FgvcError, match=rf"techniques\.blank: {message}"):
        step_of(Blank(setup=setup))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda b: None, r"its views are None; return a list of View"),
        (lambda b: [b.x], r"one of its views is a Tensor .*; make it by View"),
        (lambda b: [View("v", b.x[0], b.target)], r"the view 'blank\.v' has images a Tensor \(3, 32, 32\)"),
        (lambda b: [View("v", b.x, b.labels)], r"has the target a Tensor \(4,\) of int64; a target is a list of pairs"),
        (lambda b: [View("v", b.x[:2], b.target)], r"a target is a list of pairs \(labels \(2,\)"),
        (lambda b: [View("v", b.x, [(b.labels, 0.5)])], r"a target is a list of pairs"),
        (lambda b: [View("v", b.x, b.target, weight=((0.0, 1.0),))], r"value_at\(weight, ctx\.progress\)"),
        (lambda b: [View("v", b.x, b.target, weight=-1)], r"weight -1; give a number of at least 0"),
        (lambda b: [View("v", b.x, b.target), View("v", b.x, b.target)], r"the view 'blank\.v' is there twice; give each a name"),
        (lambda b: [View("v", b.x[..., :16], b.target)], r"images of \(32, 16\) pixels and shares the forward"),
    ],
)
def test_a_view_that_can_not_be_is_refused_where_it_is_made(make: Callable[[Batch], Any], message: str) -> None:
    with pytest.raises(FgvcError, match=rf"techniques\.blank.*{message}"):
        run(Blank(views=lambda b, ctx: make(b)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: None, r"on_batch returned None; return a Batch"),
        (lambda b: Batch(b.x[:2], b.target, b.x_clean, b.labels, b.index, b.geometry), r"on_batch returned images"),
        (lambda b: Batch(b.x, b.labels, b.x_clean, b.labels, b.index, b.geometry), r"on_batch has the target"),
    ],
)
def test_a_batch_that_can_not_be_is_refused(change: Callable[[Batch], Any], message: str) -> None:
    with pytest.raises(FgvcError, match=rf"techniques\.blank: {message}"):
        run(Blank(on_batch=lambda b, ctx: change(b)))


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (None, r"losses returned None; return a dictionary"),
        ({"term": 0.5}, r"the loss term 'term' is 0\.5; give a tensor"),
        ({"term": torch.zeros(2)}, r"has shape \(2,\)"),
        ({"tern": torch.zeros(())}, r"'tern' is neither in `weights` nor in `measures`"),
    ],
)
def test_terms_that_can_not_be_are_refused(terms: object, message: str) -> None:
    with pytest.raises(FgvcError, match=rf"techniques\.blank: .*{message}"):
        run(Blank(losses=lambda outputs, ctx: terms))


def test_a_view_of_weight_0_has_no_output_and_asking_for_it_says_so() -> None:
    view = {"weight": 0.0}
    technique = Blank(
        views=lambda b, ctx: [View("blurred", b.x, b.target, **view)],
        losses=lambda outputs, ctx: {"term": outputs["blank.blurred"].logits.mean()},
    )
    message = r"techniques\.blank, hook losses: no view 'blank\.blurred'; there are main; a view of weight 0"
    with pytest.raises(FgvcError, match=message):
        run(technique)
    view["weight"] = 0.5
    assert "blank.term" in run(technique)


@pytest.mark.parametrize("hook", ["setup", "on_batch", "views", "losses"])
def test_an_error_in_a_hook_names_the_technique_and_the_hook(hook: str) -> None:
    def broken(*_: Any) -> Any:
        return {}["nothing"]

    with pytest.raises(KeyError) as caught:
        run(Blank(**{hook: broken}))
    assert caught.value.__notes__ == [f"in techniques.blank, hook {hook}"]


def test_an_error_in_a_gate_names_the_technique_and_the_module() -> None:
    def setup(technique: Blank, plan: Plan) -> None:
        plan.gate("layer1", lambda f, ctx: torch.cat([f, f[:, :, :1]], dim=3))  # of other heights

    with pytest.raises(RuntimeError) as caught:
        run(Blank(setup=setup))
    assert caught.value.__notes__ == ["in techniques.blank, gate at layer1"]


@pytest.mark.parametrize(
    ("gate", "what"), [(lambda f, ctx: None, "None"), (lambda f, ctx: f[:, :1], r"a Tensor \(4, 1, ")]
)
def test_a_gate_that_returns_another_shape_is_refused(gate: Callable[..., Any], what: str) -> None:
    def setup(technique: Blank, plan: Plan) -> None:
        plan.gate("layer1", gate)

    with pytest.raises(FgvcError, match=rf"techniques\.blank: its gate at layer1 returned {what}.* for a Tensor \(4, "):
        run(Blank(setup=setup))


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("measures", "accuracy", r"`measures` is 'accuracy'; give a tuple of names"),
        ("weights", ["term"], r"`weights` is \['term'\]; give a dictionary"),
        ("weights", {"term": None}, r"the weight of 'term' is None; give a number, or a Scheduled setting"),
    ],
)
def test_descriptions_of_terms_are_checked(attribute: str, value: object, message: str) -> None:
    technique = Blank()
    setattr(technique, attribute, value)
    with pytest.raises(FgvcError, match=rf"techniques\.blank: {message}"):
        step_of(technique)


@pytest.mark.parametrize(
    ("hook", "arguments", "result", "message"),
    [
        ("on_sample", (np.zeros((2, 2, 3), np.uint8), 0), None, r"on_sample returned None; return the image"),
        ("on_sample", (np.zeros((2, 2, 3), np.uint8), 0), np.zeros((2, 2, 3)), r"returned a ndarray \(2, 2, 3\) of float64"),
        ("mixes", (0.5,), None, r"mixes returned None; return a share"),
        ("mixes", (0.5,), 1.5, r"mixes returned 1\.5; return a share"),
    ],
)
def test_results_of_on_sample_and_mixes_are_checked(
    hook: str, arguments: tuple[object, ...], result: object, message: str
) -> None:
    technique = type("Other", (Technique,), {hook: lambda technique, *_: result})()
    ((_, hook_),) = step_of(technique).hooks(hook)
    with pytest.raises(FgvcError, match=rf"techniques\.blank: .*{message}"):
        hook_(*arguments)


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (
            "class T(Technique):\n    def losess(self): ...",
            FgvcError,
            r"can't be imported: TypeError: T\.losess: .*losses\?.*made_\d+\.py, line 2\)",
        ),
        ("import nothing_of_that_name", FgvcError, r"can't be imported: ModuleNotFoundError.*line 2\)"),
        ("def T(settings): return 1", FgvcError, r"is no Technique \(fgvc\.techniques\.api\), but a int"),
        (
            "class T(Technique):\n    def __init__(self, settings): {}['a']",
            KeyError,
            r"in techniques\.made, made_\d+:T",
        ),
    ],
)
def test_a_class_that_can_not_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, error: type[Exception], message: str
) -> None:
    name = f"made_{len(code)}"
    (tmp_path / f"{name}.py").write_text(f"from fgvc.techniques.api import Technique\n{code}\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings = type("Settings", (TechniqueSettings,), {"technique": f"{name}:T"})(kind="made")
    with pytest.raises(error) as caught:
        build_technique(settings)
    assert re.search(message, "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])]))
    assert "techniques.made" in "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


def test_settings_of_a_mixer_need_a_class_that_says_when_it_mixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hook it would mix in every step, whatever its `probability`, and beside another one."""
    code = "from fgvc.techniques.api import Technique\nclass T(Technique):\n    def __init__(self, settings): ..."
    (tmp_path / "mixer_without.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    settings = type("Settings", (Mixing,), {"technique": "mixer_without:T"})(kind="made")
    with pytest.raises(FgvcError, match=r"techniques\.made: mixer_without:T has no hook `mixes`.*settings\.share\(progress\)"):
        build_technique(settings)
