"""The command line from a recipe to a prediction, as a user meets it."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from fgvc import api
from fgvc.cli.app import main
from fgvc.config.shipped import recipe_file, run_name
from fgvc.errors import FgvcError
from fgvc.models.backbone import plain_model
from fgvc.runtime.bundle import write_bundle
from fgvc.training import trainer
from tests.serving.small import serving
from tests.trained import Once, copied

VERBS = (
    "recipes", "init", "data", "train", "interpolate", "eval", "explain", "localize", "report", "compare", "export", "verify",
    "triton", "predict", "serve",
)  # fmt: skip


@dataclass
class Printed:
    stdout: str
    stderr: str


@pytest.fixture
def fgvc(capfd: pytest.CaptureFixture[str]) -> Callable[..., Printed]:
    """The command line in this process: a new one would import torch each time."""

    def run(*arguments: object, code: int = 0) -> Printed:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        printed = Printed(*capfd.readouterr())
        assert (ended.value.code or 0) == code, f"exit {ended.value.code}\n{printed.stdout}\n{printed.stderr}"
        return printed

    return run


@pytest.fixture(scope="module")
def recipe(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "own.yaml"
    tree = {
        "data": {"kind": "folder", "root": str(colours)},
        "image": {"size": 32},
        "model": {"backbone": "test_efficientnet"},
        "train": {"epochs": 8, "batch_size": 8, "workers": 0, "device": "cpu"},
        "optim": {"lr": 0.05, "warmup_epochs": 0.5},
        "techniques": {"mixup": {}, "acb": {}},
        "ema": {"decay": 0.9},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def run_and_bundle(recipe: Path, once: Once, painted: Callable[[], AbstractContextManager[None]]) -> Path:
    """`run`, scored on test, and its `bundle`, by the exporter that is the default; made once for both workers."""

    def fill(place: Path) -> None:
        with painted():
            trainer.train(api.load_recipe(recipe), place / "run")
        api.evaluate(place / "run", "test")
        api.export(place / "run", place / "bundle")

    return once.made("command line", fill)


@pytest.fixture(scope="module")
def run(run_and_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(run_and_bundle / "run", tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def bundle(run_and_bundle: Path) -> Path:
    return run_and_bundle / "bundle"


def test_help_is_light(fgvc: Callable[..., Printed]) -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom fgvc.cli.app import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'timm', 'onnx', 'onnxruntime', 'albumentations', 'matplotlib', 'cv2', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    output = fgvc("--help").stdout
    assert all(verb in output for verb in VERBS)


def test_version_is_that_of_the_installed_package(fgvc: Callable[..., Printed]) -> None:
    assert fgvc("--version").stdout == f"fgvc {version('fgvc')}\n"


def test_recipes_and_init(fgvc: Callable[..., Printed], tmp_path: Path) -> None:
    assert "cub50/plain" in fgvc("recipes").stdout
    schema = json.loads(fgvc("recipes", "--schema").stdout)
    assert "mixup" in json.dumps(schema["$defs"]["Techniques"]["properties"])
    fgvc("init", "cub50/plain", tmp_path / "my.yaml")
    assert "# root: REQUIRED" in (tmp_path / "my.yaml").read_text()
    assert run_name(recipe_file("cub50/plain")) == "cub50-plain"
    assert run_name(tmp_path / "my.yaml") == "my"
    assert "exists already" in fgvc("init", "cub50/plain", tmp_path / "my.yaml", code=2).stderr
    assert "cub50/plain" in fgvc("init", "cub50/plian", tmp_path / "other.yaml", code=2).stderr


def test_a_run_holds_what_others_rely_on(run: Path) -> None:
    names = {p.relative_to(run).as_posix() for p in run.rglob("*")}
    expected = {
        "config.yaml",
        "env.json",
        "events.jsonl",
        "metrics.csv",
        "plots/curves.png",
        "plots/confusion.png",
        "ckpt/last",
        "ckpt/best",
    }
    assert expected <= names
    assert (run / "ckpt/last/net.safetensors").is_file()
    assert "val_top1" in (run / "metrics.csv").read_text().splitlines()[0]
    assert json.loads((run / "env.json").read_text())["torch"]


def test_a_finished_run_is_not_overwritten_by_accident(fgvc: Callable[..., Printed], recipe: Path, run: Path) -> None:
    before = (run / "events.jsonl").read_bytes()
    again = fgvc("train", recipe, "--out", run)  # as after a kill in its last moment
    assert "this run is finished" in again.stderr
    assert again.stdout.strip() == str(run)
    assert "other settings" in fgvc("train", recipe, "optim.lr=0.01", "--out", run, code=2).stderr
    message = fgvc("train", recipe, "--out", run, "--resume", "never", code=2).stderr
    assert "--overwrite" in message
    assert (run / "events.jsonl").read_bytes() == before


def test_a_dry_run_says_what_a_step_costs_and_writes_nothing(
    fgvc: Callable[..., Printed], recipe: Path, tmp_path: Path
) -> None:
    output = fgvc("train", recipe, "--dry-run", "--out", tmp_path / "run").stdout
    for expected in ("forwards per step", "peak memory", "all steps", "acb: "):
        assert expected in output
    assert not (tmp_path / "run").exists()


def test_data_check(fgvc: Callable[..., Printed], recipe: Path) -> None:
    output = fgvc("data", "check", recipe).stdout
    assert "train" in output
    assert output.strip().endswith("ok")


def test_data_check_with_everything(fgvc: Callable[..., Printed], recipe: Path, colours: Path, tmp_path: Path) -> None:
    """A folder with a leak, a damaged file and a label that is wrong; features of a random net tell colours apart."""
    root = tmp_path / "colours"
    shutil.copytree(colours, root)
    shutil.copy(root / "train/red/00.png", root / "test/red/again.png")
    shutil.move(root / "train/red/01.png", root / "train/blue/moved.png")
    (root / "test/blue/00.png").write_bytes(b"")
    weights = tmp_path / "trained.safetensors"
    torch.manual_seed(0)
    save_file(plain_model("test_efficientnet", 3).state_dict(), weights)
    page, table = tmp_path / "check.html", tmp_path / "check.csv"
    command = ("data", "check", recipe, f"data.root={root}", f"model.weights={weights}", "--suspects")
    printed = fgvc(*command, "--out", page, "--csv", table, code=1)
    assert "suspect: train/blue/moved.png (train): blue " in printed.stdout
    assert printed.stdout.splitlines()[-2:] == [str(page), str(table)]
    assert page.read_text(encoding="utf-8").count("<img") >= 3
    lines = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    assert {(line["finding"], line["path"]) for line in lines} >= {
        ("unreadable", "test/blue/00.png"),
        ("duplicate", "train/red/00.png"),
        ("duplicate", "test/red/again.png"),
        ("suspect", "train/blue/moved.png"),
    }
    fgvc(*command[:-1], "--fail-on", "never")
    shutil.rmtree(root / "val")
    (root / "test/red/again.png").unlink()
    mended = ("data", "check", recipe, f"data.root={root}", "data.val_fraction=0", "data.max_unreadable=1")
    fgvc(*mended)
    fgvc(*mended, "--fail-on", "warning", code=1)
    assert "random weights" in fgvc("data", "check", recipe, "--suspects", code=2).stderr
    assert "is a folder" in fgvc("data", "check", recipe, "--out", tmp_path, code=2).stderr


def test_eval(fgvc: Callable[..., Printed], run: Path) -> None:
    output = fgvc("eval", run, "--split", "test").stdout
    assert "top-1" in output
    assert 0.5 < json.loads((run / "metrics.json").read_text())["test.best"]["top1"] <= 1
    last = fgvc("eval", run, "--split", "val", "--select", "last")
    assert "last" in last.stdout
    assert last.stderr.splitlines()[-1] == f"next: fgvc eval {run} --split test --select last"
    last = fgvc("eval", run, "--split", "test", "--select", "last")
    assert last.stderr.splitlines()[-1] == f"next: fgvc export {run} -o {run}-bundle --select last"


def test_export_verify_predict(
    fgvc: Callable[..., Printed], run: Path, bundle: Path, colours: Path, tmp_path: Path
) -> None:
    names = {p.name for p in bundle.iterdir()}
    assert {
        "model.onnx",
        "labels.json",
        "preprocess.json",
        "contract.json",
        "metrics.json",
        "manifest.json",
        "explain.onnx",
    } == names
    assert json.loads((bundle / "metrics.json").read_text())["test"]["images"] == 12
    output = fgvc("verify", bundle).stdout
    assert "FAIL" not in output
    assert "ok   independent plain" in output
    assert output.splitlines()[-1].endswith("checks passed, 0 failed")
    rows = [
        json.loads(line)
        for line in fgvc("predict", bundle, colours / "test", "--json", "--top-k", 2).stdout.splitlines()
    ]
    assert len(rows) == 12
    right = [Path(row["path"]).parent.name == row["predictions"][0]["label"] for row in rows]
    assert sum(right) / 12 == pytest.approx(json.loads((bundle / "metrics.json").read_text())["test"]["top1"])
    assert all(len(row["predictions"]) == 2 for row in rows)


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_what_is_served_is_what_is_predicted(
    fgvc: Callable[..., Printed], bundle: Path, colours: Path, tmp_path: Path
) -> None:
    lines = fgvc("predict", bundle, colours / "test", "--json", "--top-k", 2).stdout
    with serving(tmp_path, f"colours={bundle}") as server, server.client() as client:
        for row in map(json.loads, lines.splitlines()):
            content = Path(row["path"]).read_bytes()
            answer = client.post("/v1/classify?top_k=2", content=content).json()
            assert [one["label"] for one in answer["predictions"]] == [one["label"] for one in row["predictions"]]
            for served, predicted in zip(answer["predictions"], row["predictions"], strict=True):
                assert served["probability"] == pytest.approx(predicted["probability"], abs=1e-4)
            assert answer["rejected"] == row["rejected"]
        heat = client.post("/v1/explain", content=content)
        assert (heat.status_code, heat.headers["content-type"]) == (200, "image/png")


def test_a_report_certifies_the_weights_of_the_bundle_and_no_others(
    fgvc: Callable[..., Printed], run: Path, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report.html"
    assert fgvc("report", run, "--bundle", bundle, "--images", 1, "--out", out).stdout == f"{out}\n"
    page, contract = out.read_text(encoding="utf-8"), json.loads((bundle / "contract.json").read_text())
    assert contract["sha256"] in page
    assert f"{contract['proofs']['behavioural']['worst']:.1e}" in page
    out.unlink()
    last = ("--select", "last")
    assert "not these weights" in fgvc("report", run, "--bundle", bundle, *last, "--out", out, code=2).stderr
    assert not out.exists()
    fgvc("report", run, "--out", out)
    assert "No bundle was given" in out.read_text(encoding="utf-8")


def test_predict_names_what_it_can_not_read(
    fgvc: Callable[..., Printed], bundle: Path, colours: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    good = next((colours / "test").rglob("*.png"))
    printed = fgvc("predict", bundle, tmp_path / "bad.jpg", good, code=1)
    assert "bad.jpg: not an image" in printed.stderr
    assert str(good) in printed.stdout
    assert "no such file" in fgvc("predict", bundle, tmp_path / "none.jpg", code=2).stderr


def test_predict_imports_nothing_of_training(bundle: Path, colours: Path) -> None:
    image = next((colours / "test").rglob("*.png"))
    code = (
        "import sys\nfrom pathlib import Path\nfrom fgvc.runtime.predict import predict_files\n"
        f"assert predict_files(Path({str(bundle)!r}), [Path({str(image)!r})]) == 0\n"
        "heavy = {'torch', 'torchvision', 'timm', 'albumentations', 'cv2', 'matplotlib', 'onnx'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_export_against_a_deployed_file(fgvc: Callable[..., Printed], run: Path, bundle: Path, tmp_path: Path) -> None:
    fgvc("export", run, "-o", tmp_path / "again", "--against", bundle / "model.onnx")
    same = fgvc("verify", tmp_path / "again" / "model.onnx", "--against", bundle / "model.onnx")
    assert "a drop-in replacement" in same.stdout
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (bundle / "model.onnx").read_bytes(), (
        "the same bytes"
    )


def fed(bundle: Path, **changed: object) -> str:
    return json.dumps(json.loads((bundle / "preprocess.json").read_text()) | changed)


def turned_bundle(bundle: Path, folder: Path, **changed: object) -> Path:
    """The same model in a stack with the labels turned round, or fed otherwise."""
    names = ("model.onnx", "labels.json", "preprocess.json", "contract.json", "metrics.json")
    files = {name: (bundle / name).read_bytes() for name in names}
    labels = json.loads(files["labels.json"])
    changed_files = (
        {"preprocess.json": fed(bundle, **changed)} if changed else {"labels.json": json.dumps(labels[::-1])}
    )
    write_bundle(folder, files=files | {name: text.encode() for name, text in changed_files.items()})
    return folder


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, "labels: 2 of 3 outputs"),
        ({"channel_order": "bgr"}, "channel_order: rgb against bgr"),
        ({"mean": [0.5, 0.5, 0.5]}, "mean of R, G, B: "),
        ({"resize": "squash"}, "resize: crop against squash"),
    ],
)
def test_export_against_a_stack_that_feeds_or_reads_otherwise_is_refused_before_any_work(
    fgvc: Callable[..., Printed],
    run: Path,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, object],
    message: str,
) -> None:
    monkeypatch.setattr("fgvc.api.shipping.load_run", lambda *_: pytest.fail("the net was opened"))
    other = turned_bundle(bundle, tmp_path / "other", **changed)
    lone = tmp_path / "lone" / "deployed.onnx"
    lone.parent.mkdir()
    shutil.copy(bundle / "model.onnx", lone)
    (tmp_path / "labels.txt").write_text("\n".join(json.loads((other / "labels.json").read_text())))
    stated = [
        (other,),
        (other / "model.onnx",),
        (lone, "--labels", tmp_path / "labels.txt", "--preprocess", other / "preprocess.json"),
        (lone, "--preprocess" if changed else "--labels", other / ("preprocess.json" if changed else "labels.json")),
    ]
    for against in stated:
        refused = fgvc("export", run, "-o", tmp_path / "new", "--against", *against, code=2).stderr
        assert "is not a drop-in for" in refused
        assert message in refused
        assert not (tmp_path / "new").exists()


def test_what_is_stated_of_a_deployed_stack_in_part_or_twice_is_refused(
    fgvc: Callable[..., Printed], run: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fgvc.api.shipping.load_run", lambda *_: pytest.fail("the net was opened"))
    shutil.copy(bundle / "model.onnx", tmp_path / "lone.onnx")
    (tmp_path / "part.json").write_text(json.dumps({"size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}))
    export = ("export", run, "-o", tmp_path / "new")
    against = ("--against", tmp_path / "lone.onnx")
    message = fgvc(*export, *against, "--preprocess", tmp_path / "part.json", code=2).stderr
    assert "says nothing of resize, crop_pct, interpolation, channel_order, input_range, fill" in message
    own = fgvc(*export, "--against", bundle, "--labels", bundle / "labels.json", code=2).stderr
    assert "has its own" in own
    assert "--against" in fgvc(*export, "--labels", bundle / "labels.json", code=2).stderr
    assert "no such bundle or .onnx" in fgvc(*export, "--against", tmp_path / "nothing.onnx", code=2).stderr


def test_a_lone_deployed_file_proves_nothing_of_what_is_around_it(
    fgvc: Callable[..., Printed], run: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its answers about the run's images do not tell either: what so small a net's say depends on the processor."""

    def silent(*args: object, **options: object) -> None:
        raise FgvcError("these images do not tell")

    monkeypatch.setattr("fgvc.evaluation.lone_file.search_file", silent)
    scripted = api.export(run, tmp_path / "scripted", exporter="torchscript").bundle  # a file by the exporter that takes no time
    shutil.copy(scripted / "model.onnx", tmp_path / "lone.onnx")
    export = ("export", run, "-o", tmp_path / "new", "--against", tmp_path / "lone.onnx")
    output = fgvc(*export).stdout
    assert "drop-in replacement" not in output
    assert sum("not proved: " in line and "blue, green, red" in line for line in output.splitlines()) == 1
    record = json.loads((tmp_path / "new" / "contract.json").read_text())["deployed"]
    assert record == {"preprocess": "not known", "labels": "not known"}
    page = tmp_path / "report.html"
    fgvc("report", run, "--bundle", tmp_path / "new", "--images", 1, "--out", page)
    assert "not proved: its preprocessing and the order of its labels only assumed" in page.read_text(encoding="utf-8")

    stated = ("--labels", bundle / "labels.json", "--preprocess", bundle / "preprocess.json", "--overwrite")
    output = fgvc(*export, *stated).stdout
    assert "a drop-in replacement of" in output
    assert "not proved" not in output
    record = json.loads((tmp_path / "new" / "contract.json").read_text())["deployed"]
    assert record == {"preprocess": "the same", "labels": "the same"}
    fgvc("report", run, "--bundle", tmp_path / "new", "--images", 1, "--out", page)
    assert "graph, preprocessing and labels are the same" in page.read_text(encoding="utf-8")
    assert fgvc("verify", tmp_path / "new").stdout


def test_a_bundle_of_another_preprocessing_certifies_no_run(
    fgvc: Callable[..., Printed], run: Path, bundle: Path, tmp_path: Path
) -> None:
    other = turned_bundle(bundle, tmp_path / "other", interpolation="nearest")
    message = fgvc("report", run, "--bundle", other, "--out", tmp_path / "r.html", code=2).stderr
    assert "not exported from it" in message
    assert "interpolation: nearest against" in message
    same = turned_bundle(bundle, tmp_path / "same", fill=[0, 0, 0])  # nothing pads
    fgvc("report", run, "--bundle", same, "--images", 1, "--out", tmp_path / "r.html")


def test_verify_says_where_two_files_differ(fgvc: Callable[..., Printed], bundle: Path, tmp_path: Path) -> None:
    printed = fgvc("verify", bundle / "explain.onnx", "--against", bundle / "model.onnx", code=1)
    assert "maps" in printed.stdout
    assert "NOT a drop-in" in printed.stdout
    flipped = bytearray((bundle / "model.onnx").read_bytes())

    shutil.copytree(bundle, tmp_path / "flipped")
    flipped[len(flipped) // 2] ^= 1
    (tmp_path / "flipped" / "model.onnx").write_bytes(flipped)
    assert "model.onnx" in fgvc("verify", tmp_path / "flipped", code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("train", "nothing.yaml"), "no such file"),
        (("eval", "nowhere"), "not a run"),
        (("export", "nowhere", "-o", "out"), "not a run"),
        (("verify", "nowhere"), "nowhere"),
        (("predict", "nowhere", "nowhere"), "no such"),
    ],
)
def test_mistakes_are_named(
    fgvc: Callable[..., Printed], arguments: tuple, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = fgvc(*arguments, code=2).stderr
    assert message.startswith("error: ")
    assert expected in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("export", "runs/a", "-o", "bundle", "select=last"), "select=last: did you mean --select last?"),
        (("eval", "runs/a", "train.device=cpu"), "train.device=cpu: did you mean --device cpu?"),
        (("init", "demo/plain", "my.yaml", "image.size=64"), "init takes no settings"),
    ],
)
def test_a_setting_for_a_verb_that_takes_none_is_told_where_it_goes(
    fgvc: Callable[..., Printed], arguments: tuple, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = " ".join(fgvc(*arguments, code=2).stderr.replace("│", " ").split())
    assert hint in message
    assert "Settings are given to `fgvc train`, or written into a recipe" in message
    assert not list(tmp_path.iterdir())
