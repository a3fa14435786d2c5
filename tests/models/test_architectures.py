"""The tested list of benchmarks/architectures.py: what its table says is tried again. The whole of it in `make test-all`."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from fgvc.config.conflicts import whole_label_conflicts
from fgvc.config.exporting import Export
from fgvc.config.techniques import Techniques, settings_by_kind
from fgvc.exporting.prove import PlainBackbone
from fgvc.models.backbone import plain_model
from fgvc.reparam.plain import strip
from fgvc.runs.build import build_net
from fgvc.techniques.settings import ConvSelection

ROOT = Path(__file__).parents[2]
PATH = ROOT / "benchmarks" / "architectures.py"


def script(path: Path = PATH) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ARCHITECTURES = script()
FEW = ["resnet18d", "legacy_seresnet18", "repvgg_a0", "mobilenetv3_small_100", "resnet18_deform"]
# Those of other families than the matrix of tests/exporting/test_matrix.py has.
OTHERS = ["skresnet18", "cspdarknet53", "mobileone_s0", "repvit_m1", "swin_tiny_patch4_window7_224"]


def answers(backbone: str) -> dict[str, str]:
    with (ROOT / "docs" / "results" / "architectures.csv").open(newline="", encoding="utf-8") as file:
        return {row["technique"]: row["result"] for row in csv.DictReader(file) if row["backbone"] == backbone}


def together(backbone: str) -> list[str]:
    """Techniques that apply, of which no two exclude each other: the first come are served.

    Of those that give convolutions branches only one, as their defaults all take every convolution: the backbones take
    turns.
    """
    applies = [kind for kind in settings_by_kind() if answers(backbone).get(kind) == "yes"]
    branched = [kind for kind in applies if issubclass(settings_by_kind()[kind], ConvSelection)]
    turn = list(ARCHITECTURES.BACKBONES).index(backbone)
    others = {kind for at, kind in enumerate(branched) if at != turn % len(branched)}
    chosen: list[str] = []
    for kind in applies:
        more = [*chosen, kind]
        if kind not in others and not whole_label_conflicts(Techniques(**{one: {} for one in more})):
            chosen = more
    return chosen


def all_at_once(backbone: str) -> None:
    """One step with all that goes together is finite and moves the backbone; then the plain net is left, exactly."""
    kwargs = ARCHITECTURES.BACKBONES[backbone][1]
    torch.manual_seed(0)
    kinds = together(backbone)
    assert len(kinds) >= 5
    step = (built := build_net(ARCHITECTURES.recipe(backbone, kwargs, *kinds), ARCHITECTURES.CLASSES)).step
    assert set(step.techniques) == set(kinds)
    assert ARCHITECTURES.step_of(built)["loss"] > 0
    assert any(p.grad is not None and p.grad.any() for p in step.net.parameters())
    recipe = {"backbone": backbone, "num_classes": ARCHITECTURES.CLASSES, "kwargs": kwargs}
    net = step.net.eval()
    exact = strip(net, **recipe, dtype=torch.float64)
    assert list(exact.state_dict()) == list(plain_model(*recipe.values()).state_dict())
    x = torch.randn(2, 3, ARCHITECTURES.SIZE, ARCHITECTURES.SIZE, dtype=torch.float64)
    with torch.no_grad():
        z = net.double()(x)
        assert (exact(x) - z).abs().max() <= 1e-9 * z.abs().max()


@pytest.mark.parametrize("backbone", FEW)
def test_all_that_applies_goes_together_and_strips(backbone: str) -> None:
    all_at_once(backbone)


@pytest.mark.parametrize("backbone", FEW[:2])
def test_the_plain_net_runs_in_onnxruntime(backbone: str) -> None:
    apart, nodes = ARCHITECTURES.onnx_of(backbone, {})
    assert 0 < apart <= ARCHITECTURES.TOLERANCE
    assert nodes > 20


def test_what_fails_is_not_called_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ARCHITECTURES.tried("resnet18", "no_such_technique")[0] == "no"
    monkeypatch.setattr(ARCHITECTURES, "step_of", lambda built: built.step.net.fc.weight.data.fill_(float("nan")))
    result, detail = ARCHITECTURES.tried("resnet18", "mixup")
    assert (result, "not finite" in detail) == ("failed", True)
    monkeypatch.setattr(ARCHITECTURES, "step_of", lambda built: built.nonsense)
    assert ARCHITECTURES.tried("resnet18", "mixup")[0] == "failed"


def test_the_table_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        "backbone,family,technique,result,detail",
        "a,A,ONNX,yes,3e-07; 49 nodes",
        "a,A,x,no,too small",
        "a,A,y,yes,3 of 4 grafted",
        "b,B,ONNX,no,no such op",
        "b,B,x,no,too small",
    ]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    monkeypatch.syspath_prepend(ROOT / "docs")  # the script's folder, as when it is run
    assert script(ROOT / "docs" / "tables.py").matrix(tmp_path / "t.csv") == (
        "| backbone | family | ONNX | x | y |\n| --- | --- | --- | --- | --- |\n"
        "| a | A | 3e-07 | no (1) | ✓ |\n| b | B | no (2) | no (1) |  |\n\n1. too small\n2. no such op\n"
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backbone", ARCHITECTURES.BACKBONES)
def test_the_table_is_true(backbone: str) -> None:
    table = answers(backbone)
    assert set(table) == {ARCHITECTURES.ONNX, *settings_by_kind()}, "run benchmarks/architectures.py, then docs/tables.py"
    assert set(table.values()) <= {"yes", "no"}
    tried = {kind: ARCHITECTURES.tried(backbone, kind) for kind in table}
    assert {kind: result for kind, (result, _) in tried.items()} == table, tried
    if backbone not in FEW:
        all_at_once(backbone)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backbone", OTHERS)
def test_the_graph_is_the_independent_plain_one(backbone: str) -> None:
    kwargs, size = ARCHITECTURES.BACKBONES[backbone][1], ARCHITECTURES.SIZE
    torch.manual_seed(0)
    kinds = [kind for kind in ("mixup", "acb") if answers(backbone)[kind] == "yes"]
    built = build_net(ARCHITECTURES.recipe(backbone, kwargs, *kinds), ARCHITECTURES.CLASSES)
    ARCHITECTURES.step_of(built)
    with torch.no_grad():
        for parameter in built.step.net.parameters():
            parameter.sub_(0.01 * torch.randn_like(parameter) * parameter.std(unbiased=False).clamp_min(0.1))
    images = np.random.default_rng(0).normal(size=(8, 3, size, size)).astype(np.float32)
    recipe = {"backbone": backbone, "num_classes": ARCHITECTURES.CLASSES, "kwargs": kwargs, "size": (size, size)}
    proven = PlainBackbone(**recipe, export=Export()).prove(built.step.net.eval(), [images])
    assert proven.structural.passed
    assert proven.numeric.passed
    assert proven.behavioural.passed
