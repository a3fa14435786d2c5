"""`fgvc explain` of runs and bundles: what is written, and what it says when it can't."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fgvc import api
from fgvc.cli.app import main
from fgvc.config.calibration import Calibration
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.errors import FgvcError
from fgvc.exporting.onnx import explain_model, export_onnx, serialised
from fgvc.images.decode import decode
from fgvc.images.overlay import overlay
from fgvc.images.preprocess import fit, preprocess
from fgvc.images.sheet import GUTTER, TILE, Cell
from fgvc.models.backbone import deployed
from fgvc.report import explain as explaining
from fgvc.runs import weights as run_weights
from fgvc.runs.loaded import load_run
from fgvc.runtime import explain as drawing
from fgvc.runtime.bundle import OPTIONAL, REQUIRED, write_bundle
from fgvc.runtime.engine import Engine
from fgvc.runtime.explain import Explanation, positive
from fgvc.training import trainer
from tests.serving import small

METHODS = ("cam", "gradcam", "scorecam")


def trained(colours: Path, out: Path, backbone: str = "test_resnet", size: tuple[int, int] = (64, 48)) -> Path:
    tree = {
        "data": {"kind": "folder", "root": str(colours)},
        "image": {"size": list(size)},
        "model": {"backbone": backbone},
        "train": {"epochs": 1, "max_steps": 3, "batch_size": 8, "workers": 0, "device": "cpu"},
        "optim": {"lr": 0.02},
    }
    return trainer.train(validate(Recipe, tree, where="test"), out)


@pytest.fixture(scope="module")
def run(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(colours, tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(scope="module")
def bundle(run: Path) -> Path:
    """What an export without proofs would write: those are tested elsewhere, and slow."""
    loaded = load_run(run)
    plain, size = deployed(loaded.step.net), loaded.preprocess.size
    maps, _ = explain_model(plain, size=size)
    assert maps is not None
    files = {
        name: serialised(export_onnx(net, size=size, exporter="torchscript", opset=20, output_names=outputs))
        for name, net, outputs in (
            ("model.onnx", plain, ("logits",)),
            ("explain.onnx", maps, ("logits", "maps")),
        )
    }
    facts = {"labels.json": list(loaded.classes), "preprocess.json": loaded.preprocess, "metrics.json": {}}
    write_bundle(run.parent / "bundle", files={**files, **facts, "contract.json": {"num_classes": 3}})
    return run.parent / "bundle"


@pytest.fixture
def pictures(tmp_path: Path, colours: Path) -> Path:
    """Two pictures of one name in two folders, a third, and one that is none."""
    for folder in ("a", "b"):
        (tmp_path / "pictures" / folder).mkdir(parents=True)
    test = sorted((colours / "test").rglob("*.png"))
    decode(test[0]).save(tmp_path / "pictures/a/leaf.png")
    decode(test[5]).resize((90, 40)).save(tmp_path / "pictures/b/leaf.png")
    decode(test[9]).save(tmp_path / "pictures/b/other.png")
    (tmp_path / "pictures/b/broken.png").write_bytes(b"not a picture")
    return tmp_path / "pictures"


def fgvc(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def test_a_run_side_by_side_with_another(
    run: Path, pictures: Path, colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = trained(colours, tmp_path / "second", "test_efficientnet")
    out = tmp_path / "out"
    words = ["--method", "cam", "--method", "Grad-CAM", "--method", "scorecam", "--channels", 3, "--batch", 2]
    assert fgvc("explain", run, pictures, "--out", out, "--against", second, *words) == 1, "one is broken"
    captured = capsys.readouterr()
    assert [line.split("\t")[0] for line in captured.out.splitlines()] == [
        str(pictures / name) for name in ("a/leaf.png", "b/leaf.png", "b/other.png")
    ]
    assert "broken.png: not an image" in captured.err
    assert captured.err.count("scorecam: 3 forwards an image, for the 3 most active of") == 2
    names = {"leaf", "leaf-2", "other"}
    for folder in (*METHODS, *(f"{method}-against" for method in METHODS)):
        assert {path.stem for path in (out / "overlays" / folder).iterdir()} == names
    assert {path.name for path in (out / "panels").iterdir()} == {f"{name}.png" for name in names}
    panel = decode(out / "panels/leaf.png")
    assert panel.width == 4 * (TILE + GUTTER) + GUTTER, "the picture and three maps"
    assert panel.height > 2 * 64, "a row for each run"
    with np.load(out / "maps/leaf-2.npz", allow_pickle=False) as arrays:
        assert str(arrays["path"]) == str(pictures / "b/leaf.png")
        assert tuple(arrays["methods"]) == METHODS
        assert arrays["maps"].shape == arrays["against_maps"].shape == (3, 64, 48)
        assert arrays["maps"].dtype == arrays["raw_cam"].dtype == np.float32
        assert arrays["maps"].min() == 0
        assert arrays["maps"].max() <= 1 + 1e-6
        loaded = load_run(run)
        picture = decode(pictures / "b/leaf.png")
        x = torch.from_numpy(preprocess(picture, loaded.preprocess))[None]
        with torch.no_grad():
            p = loaded.step.net(x).softmax(1)[0].numpy()
            a = loaded.step.net.forward_features(x)[0]
        np.testing.assert_allclose(arrays["p"], p, atol=1e-6)
        assert arrays["label"] == p.argmax()
        weight = loaded.step.net.get_classifier().weight[int(p.argmax())].detach()
        np.testing.assert_allclose(arrays["raw_cam"], torch.einsum("chw,c->hw", a, weight).numpy(), atol=1e-4)
        expected = overlay(Image.fromarray(fit(picture, loaded.preprocess)), arrays["maps"][1])
        np.testing.assert_array_equal(np.asarray(decode(out / "overlays/gradcam/leaf-2.png")), np.asarray(expected))


def test_the_same_command_writes_the_same_bytes(run: Path, pictures: Path, tmp_path: Path) -> None:
    written = []
    for name in ("once", "again"):
        api.explain(run, [pictures / "a"], tmp_path / name, methods=["smoothgradcam++", "sscam"], channels=2)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        written.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files})
    assert len(written[0]) == 4
    assert written[0] == written[1]


def test_a_named_class(run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = load_run(run).classes
    for label in labels:
        assert api.explain(run, [pictures / "a"], tmp_path / label, target=label) == 0
        with np.load(tmp_path / label / "maps/leaf.npz", allow_pickle=False) as arrays:
            assert arrays["classes"][arrays["label"]] == label
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[1].rsplit(" ", 2)[0] for line in lines] == list(labels)
    with pytest.raises(FgvcError, match=rf"first has no class '{labels[0]}x'; near: {labels[0]}"):
        api.explain(run, [pictures], tmp_path / "none", target=f"{labels[0]}x")
    assert not (tmp_path / "none").exists()


def test_a_bundle_says_what_its_run_says_without_torch(run: Path, bundle: Path, pictures: Path, tmp_path: Path) -> None:
    arguments = ["explain", str(bundle), str(pictures), "--out", str(tmp_path / "b")]
    line = f"from fgvc.cli.app import main; main({arguments!r})"
    heavy = "import sys; heavy = {'torch', 'torchvision', 'timm', 'albumentations', 'cv2', 'matplotlib'}"
    code = f"{heavy}\ntry:\n    {line}\nexcept SystemExit as e:\n    assert e.code == 1\nassert not heavy & set(sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert "broken.png: not an image" in process.stderr
    assert len(process.stdout.splitlines()) == 3
    api.explain(run, [pictures], tmp_path / "r", methods=["cam"])
    for name in ("leaf", "leaf-2", "other"):
        with np.load(tmp_path / f"b/maps/{name}.npz") as ours, np.load(tmp_path / f"r/maps/{name}.npz") as theirs:
            assert set(ours.files) == set(theirs.files)
            np.testing.assert_allclose(ours["raw_cam"], theirs["raw_cam"], atol=1e-4)
            np.testing.assert_allclose(ours["maps"], theirs["maps"], atol=1e-3)
            assert ours["label"] == theirs["label"]
            assert ours["maps"].shape == (1, 64, 48)
    engine = Engine(api.load_bundle(bundle))
    (best,) = engine.classify([decode(pictures / "b/other.png")], top_k=1)[0].predictions
    with np.load(tmp_path / "b/maps/other.npz") as arrays:
        assert arrays["p"][arrays["label"]] == pytest.approx(best.probability, abs=1e-5)


def test_a_run_beside_its_bundle(run: Path, bundle: Path, pictures: Path, tmp_path: Path) -> None:
    assert api.explain(run, [pictures / "a"], tmp_path / "out", methods=["cam"], against=bundle) == 0
    with np.load(tmp_path / "out/maps/leaf.npz") as arrays:
        np.testing.assert_allclose(arrays["maps"], arrays["against_maps"], atol=1e-3)
    with pytest.raises(FgvcError, match="bundle: a bundle holds class activation maps alone"):
        api.explain(run, [pictures], tmp_path / "other", against=bundle)


def test_bundles_refuse_by_name_what_they_have_not(
    bundle: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "out")
    assert fgvc("explain", bundle, pictures, *out, "--method", "gradcam") == 2
    assert "gradcam: a bundle holds class activation maps alone" in capsys.readouterr().err
    assert fgvc("explain", bundle, pictures, *out, "--select", "last") == 2
    assert "--select, --device and --channels go with a run" in capsys.readouterr().err
    files = {name: (bundle / name).read_bytes() for name in (*REQUIRED, *OPTIONAL) if (bundle / name).exists()}
    del files["explain.onnx"]
    write_bundle(tmp_path / "bare", files=files)
    assert fgvc("explain", tmp_path / "bare", pictures, *out) == 2
    assert "bare: has no explain.onnx" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_maps_of_one_cell_are_refused(
    run: Path, pictures: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = trained(colours, tmp_path / "single", size=(32, 32))
    with pytest.raises(FgvcError, match=r"single: no class maps: the feature map is a single cell"):
        api.explain(single, [pictures], tmp_path / "out")
    monkeypatch.setattr(small, "SIZE", 1)
    shipped = small.save_bundle(tmp_path / "shipped")
    with pytest.raises(FgvcError, match=r"shipped: no class maps: the feature map is a single cell"):
        api.explain(run, [pictures], tmp_path / "out", methods=["cam"], against=shipped)
    assert fgvc("explain", shipped, pictures, "--out", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()
    page = api.report([single], tmp_path / "report.html", images=1).read_text(encoding="utf-8")
    assert "Pictures alone: no class maps: the feature map is a single cell" in page
    flat, sloping = np.full((2, 3), -1.0, np.float32), np.float32([[-2, -1, 0], [0, 1, 4]])
    assert not positive(flat, (8, 9)).any()
    large = positive(sloping, (8, 9))
    assert (large.min(), large.max(), large[0, 0], large[-1, -1]) == (0, 1, 0, 1)


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list[list[Cell]]:
    """The cells of each panel."""
    cells: list[list[Cell]] = []
    whole = drawing.save_sheet

    def noted(rows: list[list[Cell]], path: Path, **options: Any) -> Path:
        cells.append([cell for row in rows for cell in row])
        return whole(rows, path, **options)

    monkeypatch.setattr(drawing, "save_sheet", noted)
    return cells


def test_an_empty_map_is_said_and_why(
    run: Path, pictures: Path, tmp_path: Path, panels: list[list[Cell]], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    raws = [np.full((2, 2), -1.0), np.zeros((2, 2)), np.full((2, 2), 3.0), np.full((2, 2), np.nan)]
    whys = [
        "nothing speaks for the class",
        "no channel counts, or every one is flat",
        "it is the same everywhere",
        "it is not",
    ]

    def look(own: Any, x: np.ndarray, label: int | None) -> list[Explanation]:
        p, size = np.array([0.2, 0.5, 0.3]), x.shape[2:]
        return [Explanation(1, p, {"cam": np.zeros(size, np.float32)}, {"cam": np.float32(raw)}) for raw in raws[: len(x)]]

    monkeypatch.setattr(explaining.RunExplainer, "__call__", look)
    files = [pictures / "a" / "leaf.png", pictures / "b" / "leaf.png"]
    for first in (0, 2):
        raws[:2], whys[:2] = raws[first : first + 2], whys[first : first + 2]
        assert api.explain(run, files, tmp_path / f"out{first}", methods=["cam"]) == 0
        messages = [line for line in capsys.readouterr().err.splitlines() if "empty map" in line]
        for file, line, panel, why in zip(files, messages, panels[-2:], whys, strict=False):
            assert line.startswith(f"{file}: ")
            assert "cam of green: an empty map: " + why in line
            assert f"(empty: {why}" in panel[-1].caption


def test_a_run_is_explained_without_its_data(run: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "moved")
    recipe = tmp_path / "moved/config.yaml"
    recipe.write_text(re.sub("root: .*", f"root: {tmp_path / 'nowhere'}", recipe.read_text()))
    assert api.explain(tmp_path / "moved", [pictures / "a"], tmp_path / "out") == 0
    api.explain(run, [pictures / "a"], tmp_path / "same")
    with np.load(tmp_path / "out/maps/leaf.npz") as ours, np.load(tmp_path / "same/maps/leaf.npz") as theirs:
        for key in ours.files:
            np.testing.assert_array_equal(ours[key], theirs[key])


def test_results_of_two_commands_are_never_mixed(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ("explain", run, pictures / "a", "--out", out)
    assert fgvc(*words, "--method", "cam") == 0
    assert fgvc(*words) == 2
    assert "out: holds results already; choose another --out, or give --overwrite" in capsys.readouterr().err
    assert fgvc("explain", run, pictures / "a", "--target", "none", "--out", out, "--overwrite") == 2
    assert (out / "overlays/cam/leaf.png").is_file(), "nothing is lost for a command that can't be done"
    assert fgvc(*words, "--overwrite") == 0
    assert [path.name for path in (out / "overlays").iterdir()] == ["gradcam"]
    (out / "notes.txt").touch()
    assert fgvc(*words, "--overwrite") == 2
    assert "holds notes.txt, which is no result of explain" in capsys.readouterr().err


def test_a_place_that_can_not_be_written_is_refused_before_the_work(
    run: Path, bundle: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("fgvc.report.explain.load_run", lambda *_: pytest.fail("it was opened"))
    monkeypatch.setattr("fgvc.runtime.explain.load_bundle", lambda *_: pytest.fail("it was opened"))
    for place in (run, bundle):
        for out in (tmp_path / "file", tmp_path / "file/below/it", tmp_path / ("x" * 300)):
            assert fgvc("explain", place, pictures, "--out", out) == 2
    assert fgvc("report", run, "--out", tmp_path / "file/page.html") == 2


def test_names_of_files_that_do_not_fit(
    run: Path, colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 255 bytes, which is all that a file system takes; not UTF-8; with a line break."""
    picture = sorted((colours / "test").rglob("*.png"))[0].read_bytes()
    (tmp_path / "in").mkdir()
    for name in (b"x" * 251, b"caf\xe9", b"two\nlines\tand"):
        (tmp_path / "in" / os.fsdecode(name + b".png")).write_bytes(picture)
    assert fgvc("explain", run, tmp_path / "in", "--out", tmp_path / "out") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("\t") for line in lines] == [3, 3, 3]
    assert {path.stem for path in (tmp_path / "out/panels").iterdir()} == {"x" * 200, "caf\ufffd", "two\nlines\tand"}
    with np.load(tmp_path / "out/maps/caf\ufffd.npz") as arrays:
        assert os.fsencode(str(arrays["path"])) == os.fsencode(tmp_path / "in") + b"/caf\xe9.png"
    assert fgvc("explain", run, tmp_path / ("x" * 300), "--out", tmp_path / "none") == 2
    assert "File name too long" in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart(run: Path, pictures: Path, tmp_path: Path, panels: list[list[Cell]]) -> None:
    for parent in ("a", "b"):
        shutil.copytree(run, tmp_path / parent / "run")
    api.explain(tmp_path / "a/run", [pictures / "a"], tmp_path / "out", against=tmp_path / "b/run")
    assert [cell.title for cell in panels[0]] == ["picture", "gradcam"] * 2
    assert [cell.caption.partition(":")[0] for cell in panels[0][::2]] == ["a/run", "b/run"]


def test_a_panel_is_as_large_as_the_network_sees_and_names_the_true_class(
    run: Path, colours: Path, tmp_path: Path, panels: list[list[Cell]]
) -> None:
    """By the folder of classes above the picture; without one it says nothing."""
    labels = load_run(run).classes
    picture = sorted((colours / "test" / "red").iterdir())[0]
    shutil.copy(picture, tmp_path / picture.name)
    api.explain(run, [picture, tmp_path / picture.name], tmp_path / "out", methods=["cam"])
    answer = next(name for name in labels if panels[0][0].caption.startswith(f"{name} "))
    ending = "; right" if answer == "red" else "; wrong, it is red"
    assert panels[0][0].caption == panels[1][0].caption + ending
    height, width = load_run(run).preprocess.size
    assert panels[0][0].picture.size == panels[0][1].picture.size == (width, height)


def test_a_bundle_that_knows_none_of_these_says_so(
    tmp_path: Path, panels: list[list[Cell]], capsys: pytest.CaptureFixture[str]
) -> None:
    calibration = Calibration(
        fitted_on="val", images=99, temperature=1, threshold=0.9, nll_before=1, nll_after=1, ece_before=0, ece_after=0,
        keep=0.95, kept=1, coverage=1, accuracy=1,
    )  # fmt: skip
    strict = small.save_bundle(tmp_path / "held", calibration=calibration)
    for name, colour in (("grey", (128, 120, 128)), ("red", (255, 0, 0))):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"in/{name}.png")
    assert fgvc("explain", strict, tmp_path / "in", "--out", tmp_path / "out") == 0
    assert fgvc("predict", strict, tmp_path / "in") == 0
    lines = [line.split("\t")[:2] for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == lines[2:], "as `fgvc predict`"
    assert panels[0][0].caption == f"{lines[0][1]}, calibrated"
    assert panels[0][0].caption.startswith("none of these (red ")
    assert panels[1][0].caption == "red 100.0 %, calibrated"
    with np.load(tmp_path / "out/maps/grey.npz") as grey, np.load(tmp_path / "out/maps/red.npz") as red:
        assert (bool(grey["rejected"]), bool(red["rejected"])) == (True, False)
    assert fgvc("explain", strict, tmp_path / "in/grey.png", "--target", "green", "--out", tmp_path / "green") == 0
    assert capsys.readouterr().out.split("\t")[1].startswith("green ")


def test_logits_that_are_no_numbers_are_refused(
    run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_weights.selected_weights

    def broken(*arguments: Any) -> run_weights.TrainedWeights:
        trained = whole(*arguments)
        weights = {key: value * torch.nan for key, value in trained.weights.items()}
        return run_weights.TrainedWeights(weights, trained.state)

    monkeypatch.setattr("fgvc.runs.loaded.selected_weights", broken)
    with pytest.raises(FgvcError, match=r"first: gives logits that are no numbers"):
        api.explain(run, [pictures / "a"], tmp_path / "out")


@pytest.mark.parametrize("verb", ["explain", "predict"])
def test_photographs_are_in_memory_one_by_one(
    bundle: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    references: list[weakref.ref[Image.Image]] = []
    most = 0

    def watched(path: Path, **options: int) -> Image.Image:
        nonlocal most
        image = decode(path, **options)
        references.append(weakref.ref(image))
        most = max(most, sum(one() is not None for one in references))
        return image

    monkeypatch.setattr("fgvc.runtime.predict.decode", watched)
    out = ["--out", tmp_path / "out"] if verb == "explain" else []
    assert fgvc(verb, bundle, colours / "test", *out) == 0
    assert most <= 2, "the one that was read before may still have a name"


def test_missing_files_and_methods_are_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ([run, tmp_path / "none.png"], "none.png: no such file or folder"),
        ([run, tmp_path], "no picture below this folder"),
        ([tmp_path / "norun", run / "plots"], "norun"),
    ):
        assert fgvc("explain", *words, "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    assert fgvc("explain", run, run, "--out", tmp_path / "out", "--method", "fullgrad") == 2
    assert "fullgrad: it adds up the biases" in capsys.readouterr().err
