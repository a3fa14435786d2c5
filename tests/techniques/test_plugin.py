"""An installed package adds techniques: examples/technique_plugin is installed, trained with, exported and proved; the page that
walks through it shows its code, and all that a technique is given."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import subprocess
import sys
import tomllib
from dataclasses import fields
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from pydantic import Field, create_model
from safetensors.torch import load_file

from fgvc.config import techniques
from fgvc.config.loading import dump, load, validate
from fgvc.config.recipe import Recipe
from fgvc.config.section import Section
from fgvc.config.technique import Requires, TechniqueSettings
from fgvc.config.template import commented
from fgvc.data.recipe import resolve_data
from fgvc.errors import FgvcError
from fgvc.runs.environment import environment
from fgvc.runs.folder import read_run
from fgvc.techniques.api import HOOKS, Batch, EpochStart, Output, Technique, View
from fgvc.techniques.mixing import mixed_target
from fgvc.techniques.plan import Context, Plan
from fgvc.techniques.registry import build_technique

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/techniques.md").read_text()
RUN = """
import json, sys
from pathlib import Path
from types import SimpleNamespace

import torch
from fgvc_box_blur.settings import BoxBlurSettings
from fgvc_box_blur.technique import BLURRED, BoxBlur
from fgvc_confidence_penalty.settings import ConfidencePenaltySettings
from fgvc_confidence_penalty.technique import ConfidencePenalty

from fgvc import api
from fgvc.training import trainer
from fgvc.config.loading import dump, validate
from fgvc.config.recipe import Recipe

out = Path(sys.argv[1])
z = torch.tensor([[0., 0., 0.], [50., 0., 0.]])
print(ConfidencePenalty(ConfidencePenaltySettings()).losses({"main": SimpleNamespace(logits=z)}, None)["penalty"].item())
for name in ("with", "without"):
    trainer.train(validate(Recipe, json.loads((out / f"{name}.json").read_text()), where="test"), out / name)
api.export(out / "with", out / "bundle")

x, y = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
batch = SimpleNamespace(x_clean=x, labels=y)
drawn, head = torch.tensor([[0.0, 0.0], [0.999, 0.5]]), {"finder": lambda z: z}
ctx = SimpleNamespace(
    draw=drawn, progress=0.0, state={}, show=lambda *maps: None, branches=head, grid=lambda features: features
)
technique = BoxBlur(BoxBlurSettings())
(view,) = technique.views(batch, ctx)
changed = (view.x != x).any(1)
sides = [[int(v) for where in changed[at].nonzero().unbind(1) for v in (where.min(), where.max())] for at in (0, 1)]
cells = torch.nn.functional.avg_pool2d(changed[:, None].float(), 4)
terms = technique.losses({BLURRED: SimpleNamespace(features=100 * (cells - 0.5))}, ctx)
(unclassified,) = BoxBlur(BoxBlurSettings(view=0)).views(batch, ctx)
print(json.dumps({
    "sides": sides, "target": [labels.tolist() for labels, _ in view.target], "weight": view.weight,
    "terms": {name: term.item() for name, term in terms.items()},
    "unclassified": [unclassified.weight, unclassified.classifies],
    "off": [len(BoxBlur(BoxBlurSettings(view=0, where=0)).views(batch, ctx)), len(technique.losses({}, ctx))],
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    how = ["--no-index", "--no-deps", "--no-build-isolation", "--quiet", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *how, str(ROOT / "examples/technique_plugin")], check=True)
    return target


def python(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(installed), str(ROOT)])
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path}
    )


def plain(colours: Path) -> dict:
    return {
        "data": {"kind": "folder", "root": str(colours)},
        "image": {"size": 64},
        "model": {"backbone": "test_resnet"},
        "train": {"max_steps": 2, "batch_size": 8, "workers": 0, "device": "cpu"},
        "techniques": {"mixup": {}},
        "export": {"exporter": "torchscript"},
    }


@pytest.fixture(scope="module")
def ran(installed: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that one process left, `with` and `without` the technique in the recipe, and what it printed."""
    out, tree = tmp_path_factory.mktemp("ran"), plain(colours)
    (out / "without.json").write_text(json.dumps(tree))
    on = {"confidence_penalty": {"beta": 0.5}, "box_blur": {}, "mixup": {}}
    (out / "with.json").write_text(json.dumps(tree | {"techniques": on}))
    process = python(installed, "-c", RUN, str(out))
    assert process.returncode == 0, process.stderr
    return out, process.stdout


def test_it_trains_exports_and_leaves_nothing(ran: tuple[Path, str]) -> None:
    assert "confidence_penalty.penalty" in (ran[0] / "with/metrics.csv").read_text()
    contract = json.loads((ran[0] / "bundle/contract.json").read_text())
    assert contract["proofs"]["structural"]["equal"] is True


def test_the_run_records_its_version(ran: tuple[Path, str]) -> None:
    project = tomllib.loads((ROOT / "examples/technique_plugin/pyproject.toml").read_text())["project"]
    assert json.loads((ran[0] / "with/env.json").read_text())[project["name"]] == project["version"]


def test_its_term_is_log_k_less_the_entropy(ran: tuple[Path, str]) -> None:
    assert float(ran[1].splitlines()[0]) == pytest.approx(math.log(3) / 2, rel=1e-6)


def test_the_blurred_box_is_where_it_was_drawn_and_a_perfect_head_has_no_loss(ran: tuple[Path, str]) -> None:
    facts = json.loads(ran[1].splitlines()[1])
    assert facts["sides"] == [[0, 7, 0, 7], [8, 15, 4, 11]]  # first and last row, first and last column
    assert (facts["target"], facts["weight"], facts["unclassified"]) == ([[0, 1]], 0.5, [1.0, False])
    assert facts["terms"]["accuracy"] == 1
    assert facts["terms"]["where"] < 1e-6
    assert facts["off"] == [0, 0]


def test_the_test_of_the_page_passes_and_the_wrong_share_fails_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples/technique_plugin")
    file = ROOT / "examples/technique_plugin/tests/test_resize_mix.py"
    test = runpy.run_path(str(file))["test_labels_have_the_shares_of_the_pixels"]
    test()
    swapped = "fgvc_resize_mix.technique.mixed_target"
    monkeypatch.setattr(swapped, lambda target, sources: mixed_target(target, [(of, 1 - share) for of, share in sources]))
    with pytest.raises(AssertionError):
        test()


def test_its_head_is_trained_and_logged_and_saved_beside_the_net(ran: tuple[Path, str]) -> None:
    columns = (ran[0] / "with/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"box_blur.where", "box_blur.accuracy"} <= set(columns)
    start, last = (load_file(ran[0] / f"with/ckpt/{slot}/branches.safetensors") for slot in ("start", "last"))
    heads = [name for name in start if name.startswith("box_blur.finder.")]
    assert len(heads) == 4
    assert all(not torch.equal(start[name], last[name]) for name in heads)


def test_the_page_shows_the_code_of_the_examples_and_of_fgvc() -> None:
    files = [*(ROOT / "examples/technique_plugin").rglob("*.py"), *(ROOT / "fgvc/techniques").rglob("settings.py")]
    code = "\n".join(file.read_text() for file in [*files, ROOT / "examples/technique_plugin/pyproject.toml"])
    blocks = re.findall(r"```(?:python|toml)\n(.*?)```", PAGE, re.DOTALL)
    parts = [part.strip("\n") for block in blocks for part in block.split("\n\n")]
    assert len(parts) > 15
    assert [part for part in parts if part not in code] == []


@pytest.mark.parametrize(
    ("kind", "start"),
    [(Plan, "`plan`"), (EpochStart, "`start`"), (Batch, "`batch`"), (View, "`View"), (Output, '`outputs["'), (Context, "`ctx`")],
)
def test_the_page_names_all_that_a_technique_is_given(kind: type, start: str) -> None:
    table = re.search(rf"^{re.escape(start)}.*?(?=\n\n[^|])", PAGE, re.DOTALL | re.MULTILINE)
    assert table is not None
    words = set(re.findall(r"\w+", " ".join(re.findall(r"^\| (.*?) \|", table[0], re.MULTILINE))))
    public = {key for key in {*vars(kind), *getattr(kind, "__annotations__", {})} if not key.startswith("_")}
    assert public - {"name"} <= words


def test_the_page_names_all_hooks() -> None:
    assert [hook for hook in HOOKS if f"`{hook}(" not in PAGE] == []


def test_the_page_names_all_requirements() -> None:
    assert [field.name for field in fields(Requires) if f"`{field.name}`" not in PAGE] == []


def test_a_package_that_is_installed_and_not_used_leaves_no_trace(ran: tuple[Path, str], colours: Path) -> None:
    assert "confidence_penalty" not in (ran[0] / "without/config.yaml").read_text()
    assert read_run(ran[0] / "without") == resolve_data(validate(Recipe, plain(colours), where="here")).resolved(validated=True)


def test_recipes_know_it_and_its_mistakes(installed: Path) -> None:
    schema = json.loads(python(installed, "-m", "fgvc", "recipes", "--schema").stdout)
    assert "confidence_penalty" in schema["$defs"]["Techniques"]["properties"]
    wrong = python(installed, "-m", "fgvc", "train", "demo/plain", "data.root=x", "techniques.confidence_penalty.betta=1")
    assert wrong.returncode == 2
    assert "did you mean 'beta'?" in wrong.stderr


def fake_package(monkeypatch: pytest.MonkeyPatch, name: str, *values: str) -> type[Section]:
    """`Techniques` with entry points of one name."""
    monkeypatch.setattr(techniques, "_points", lambda: {name: [EntryPoint(name, value, techniques.GROUP) for value in values]})
    monkeypatch.setattr(techniques, "_installed", techniques._installed.__wrapped__)
    return create_model("Faked", __base__=techniques._Recorded, **techniques._fields())


BROKEN = [
    ("mixup", "fgvc.techniques.mixup.settings:MixupSettings", "is a technique of fgvc itself; rename it in .* `kind`, or pip"),
    ("other", "fgvc.techniques.mixup.settings:MixupSettings", "its kind is 'mixup'; give both one name"),
    ("other", "fgvc.techniques.mixup.technique:Mixup", "is no TechniqueSettings"),
    ("other", "fgvc.nowhere:Settings", "can't be imported: ModuleNotFoundError"),
    ("other", "fgvc.techniques.mixup.settings:Nothing", "can't be imported: AttributeError"),
]


@pytest.mark.parametrize(("name", "value", "message"), BROKEN)
def test_an_entry_point_that_is_none_is_refused_by_name_where_a_recipe_names_it(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    model = fake_package(monkeypatch, name, value)
    with pytest.raises(FgvcError, match=rf"here:3: {name}: entry point {name} of fgvc\.techniques: .*{message}"):
        validate(model, {name: {}}, where="here", places={(name,): "here:3"})
    with pytest.raises(FgvcError, match=rf"entry point {name} .*{message}"):
        techniques.settings_by_kind.__wrapped__()


@pytest.mark.parametrize(("name", "value", "message"), BROKEN)
def test_an_entry_point_is_not_imported_where_no_recipe_names_it(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    model = fake_package(monkeypatch, name, value)
    monkeypatch.setattr(EntryPoint, "load", lambda point: pytest.fail("imported"))
    recipe = validate(model, {"cutout": {}, name: None}, where="here")
    assert list(techniques.enabled_techniques(recipe)) == ["cutout"]
    assert json.loads(recipe.model_dump_json())["cutout"]["kind"] == "cutout"


def test_one_name_in_two_packages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fake_package(monkeypatch, "other", "a:A", "b:B")
    with pytest.raises(FgvcError, match="other: entry point other of .* more than one package has a technique of that name"):
        validate(model, {"other": {}}, where="here")


def test_settings_that_import_torch_are_warned_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Heavy(TechniqueSettings):
        technique: ClassVar[str] = "heavy:Heavy"
        kind: Literal["heavy"] = "heavy"

    def load_heavy(point: EntryPoint) -> type[TechniqueSettings]:
        monkeypatch.setitem(sys.modules, "torch", torch)
        return Heavy

    model = fake_package(monkeypatch, "heavy", "heavy:Heavy")
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(EntryPoint, "load", load_heavy)
    assert isinstance(model(heavy={}).heavy, Heavy)
    assert "WARNING: entry point heavy of fgvc.techniques: heavy:Heavy imports torch" in capsys.readouterr().err
    validate(model, {"heavy": {}}, where="here")
    assert capsys.readouterr().err == ""  # torch is there by now


def test_settings_of_a_package_are_in_the_schema_and_in_a_recipe_that_is_written_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Inner(Section):
        depth: int = Field(3, ge=1, description="how deep")

    class Outer(TechniqueSettings):
        technique: ClassVar[str] = "outer:Outer"
        kind: Literal["outer"] = "outer"
        first: Inner = Inner()
        others: tuple[Inner, ...] = ()

    model = fake_package(monkeypatch, "outer", "outer:Outer")
    monkeypatch.setattr(EntryPoint, "load", lambda point: Outer)
    assert "how deep" in json.dumps(model.model_json_schema())
    (tmp_path / "mine.yaml").write_text("outer: {first: {depth: 5}}\n")
    written = commented(model, tmp_path / "mine.yaml")
    assert "depth: 5  # how deep" in written
    (tmp_path / "written.yaml").write_text(written)
    assert load(model, tmp_path / "written.yaml") == load(model, tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("cutout: {}\n")
    assert "# of the package fgvc.techniques\nouter: null" in commented(model, tmp_path / "mine.yaml")
    mistakes = {"first: {deep: 1}": r"outer\.first\.deep: unknown key", "others: [{depth: 0}]": r"outer\.others\.0\.depth"}
    for wrong, message in mistakes.items():
        (tmp_path / "mine.yaml").write_text(f"outer: {{{wrong}}}\n")
        with pytest.raises(FgvcError, match=rf"mine\.yaml:1: {message}"):
            load(model, tmp_path / "mine.yaml")


def test_a_recipe_that_needs_a_package_that_is_not_installed_says_so(colours: Path) -> None:
    for kind, hint in (("sharpen_all", "unknown key, or the package"), ("mixpu", r"did you mean 'mixup'\? If not, the package")):
        with pytest.raises(FgvcError, match=rf"techniques\.{kind}: .*{hint} that brings it is not installed"):
            validate(Recipe, plain(colours) | {"techniques": {kind: {}}}, where="here")


def test_a_run_whose_package_is_gone_names_the_package(tmp_path: Path, colours: Path) -> None:
    recipe = validate(Recipe, plain(colours), where="here")
    text = dump(recipe).replace("techniques:\n", "techniques:\n  cutblur: {factor: 4}\n")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(FgvcError, match=r"no technique 'cutblur': the package that brings it is not installed"):
        read_run(tmp_path)
    (tmp_path / "env.json").write_text(json.dumps(environment() | {"fgvc-cutblur": "0.1.0"}))
    with pytest.raises(FgvcError, match=r"no technique 'cutblur'; the run was made with fgvc-cutblur 0\.1\.0: install it"):
        read_run(tmp_path)


def test_a_hook_with_a_slip_in_its_name_is_an_error_when_the_class_is_made() -> None:
    with pytest.raises(TypeError, match=r"Slip\.view_after: no hook of a technique; did you mean views_after\?"):

        class Slip(Technique):
            def view_after(self, batch: object, outputs: object, ctx: object) -> list[object]:
                return []

    class Own(Technique):
        names = ("attributes", "are free")

        def _own(self) -> torch.Tensor:
            return torch.zeros(1)


def test_the_class_that_settings_name_must_be_there() -> None:
    class Lost(TechniqueSettings):
        technique: ClassVar[str] = "fgvc.nowhere:Lost"
        kind: str = "lost"

    with pytest.raises(FgvcError, match=r"techniques\.lost: fgvc\.nowhere:Lost can't be imported"):
        build_technique(Lost())
