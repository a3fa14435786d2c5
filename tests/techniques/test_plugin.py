"""An installed package adds a technique: examples/technique_plugin is installed, trained with, exported and proved."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from fgvc.config import techniques
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.config.technique import TechniqueSettings
from fgvc.data.recipe import resolve_data
from fgvc.errors import FgvcError
from fgvc.runs.folder import read_run
from fgvc.techniques.api import Technique
from fgvc.techniques.registry import build_technique

ROOT = Path(__file__).parents[2]
RUN = """
import json, sys
from pathlib import Path
from types import SimpleNamespace

import torch
from fgvc_confidence_penalty.settings import ConfidencePenaltySettings
from fgvc_confidence_penalty.technique import ConfidencePenalty

from fgvc import api
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe

out = Path(sys.argv[1])
z = torch.tensor([[0., 0., 0.], [50., 0., 0.]])
print(ConfidencePenalty(ConfidencePenaltySettings()).losses({"main": SimpleNamespace(logits=z)}, None)["penalty"].item())
for name in ("with", "without"):
    api.train(validate(Recipe, json.loads((out / f"{name}.json").read_text()), where="test"), out / name)
api.export(out / "with", out / "bundle")
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
        "image": {"size": 32},
        "model": {"backbone": "test_resnet"},
        "train": {"max_steps": 2, "batch_size": 8, "workers": 0, "device": "cpu"},
        "techniques": {"mixup": {}},
        "export": {"exporter": "torchscript"},
    }


@pytest.fixture(scope="module")
def ran(installed: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What one process left, `with` and `without` the technique in the recipe, and what it printed."""
    out, tree = tmp_path_factory.mktemp("ran"), plain(colours)
    (out / "without.json").write_text(json.dumps(tree))
    (out / "with.json").write_text(json.dumps(tree | {"techniques": {"confidence_penalty": {"beta": 0.5}, "mixup": {}}}))
    done = python(installed, "-c", RUN, str(out))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_it_trains_exports_and_leaves_nothing(ran: tuple[Path, str]) -> None:
    assert "confidence_penalty.penalty" in (ran[0] / "with/metrics.csv").read_text()
    contract = json.loads((ran[0] / "bundle/contract.json").read_text())
    assert contract["proofs"]["structural"]["equal"] is True


def test_the_run_records_its_version(ran: tuple[Path, str]) -> None:
    project = tomllib.loads((ROOT / "examples/technique_plugin/pyproject.toml").read_text())["project"]
    assert json.loads((ran[0] / "with/env.json").read_text())[project["name"]] == project["version"]


def test_its_term_is_log_k_less_the_entropy(ran: tuple[Path, str]) -> None:
    assert float(ran[1].splitlines()[0]) == pytest.approx(math.log(3) / 2, rel=1e-6)


def test_a_package_that_is_installed_and_not_used_leaves_no_trace(ran: tuple[Path, str], colours: Path) -> None:
    assert "confidence_penalty" not in (ran[0] / "without/config.yaml").read_text()
    assert read_run(ran[0] / "without") == resolve_data(validate(Recipe, plain(colours), where="here")).resolved(validated=True)


def test_recipes_know_it_and_its_mistakes(installed: Path) -> None:
    schema = json.loads(python(installed, "-m", "fgvc", "recipes", "--schema").stdout)
    assert "confidence_penalty" in schema["$defs"]["Techniques"]["properties"]
    wrong = python(installed, "-m", "fgvc", "train", "demo/plain", "data.root=x", "techniques.confidence_penalty.betta=1")
    assert wrong.returncode == 2
    assert "did you mean 'beta'?" in wrong.stderr


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mixup", "fgvc.techniques.mixup.settings:MixupSettings", "there is a technique of that name already"),
        ("other", "fgvc.techniques.mixup.settings:MixupSettings", "its kind is 'mixup'; give both one name"),
        ("other", "fgvc.techniques.mixup.technique:Mixup", "is no TechniqueSettings"),
        ("other", "fgvc.nowhere:Settings", "can't be imported"),
        ("other", "fgvc.techniques.mixup.settings:Nothing", "can't be imported"),
    ],
)
def test_an_entry_point_that_is_none_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setattr(techniques, "entry_points", lambda group: [EntryPoint(name, value, group)])
    with pytest.raises(FgvcError, match=rf"entry point {name} .*{message}"):
        techniques.settings_by_kind.__wrapped__()


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
