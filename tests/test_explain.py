"""`fgvc explain` of runs and bundles: what is written, and what it says when it can't."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fgvc import api
from fgvc.cli import main
from fgvc.config import validate
from fgvc.evaluate.subject import subject
from fgvc.image.decode import decode
from fgvc.image.overlay import overlay
from fgvc.image.preprocess import fit, preprocess
from fgvc.recipe import Recipe
from fgvc.serve.engine import Engine
from fgvc.serve.explain import _names, positive
from fgvc.types import FgvcError

METHODS = ("cam", "gradcam", "scorecam")


def trained(colours: Path, out: Path, backbone: str = "test_resnet", size: tuple[int, int] = (64, 48)) -> Path:
    tree = {
        "data": {"kind": "folder", "root": str(colours)},
        "image": {"size": list(size)},
        "model": {"backbone": backbone},
        "train": {"epochs": 1, "max_steps": 3, "batch_size": 8, "workers": 0, "device": "cpu"},
        "optim": {"lr": 0.02},
    }
    return api.train(validate(Recipe, tree, where="test"), out)


@pytest.fixture(scope="module")
def run(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(colours, tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(scope="module")
def bundle(run: Path) -> Path:
    return api.export(run, run.parent / "bundle").bundle


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
    said = capsys.readouterr()
    assert [line.split("\t")[0] for line in said.out.splitlines()] == [
        str(pictures / name) for name in ("a/leaf.png", "b/leaf.png", "b/other.png")
    ]
    assert "broken.png: not an image" in said.err
    assert said.err.count("scorecam: 3 forwards an image, for the 3 most active of") == 2
    names = {"leaf", "leaf-2", "other"}
    for folder in (*METHODS, *(f"{method}-against" for method in METHODS)):
        assert {path.stem for path in (out / "overlays" / folder).iterdir()} == names
    assert {path.name for path in (out / "panels").iterdir()} == {f"{name}.png" for name in names}
    panel = decode(out / "panels/leaf.png")
    assert panel.width == 4 * (160 + 6) + 6, "the picture and three maps"
    assert panel.height > 2 * 64, "a row for each run"
    with np.load(out / "maps/leaf-2.npz", allow_pickle=False) as found:
        assert str(found["path"]) == str(pictures / "b/leaf.png")
        assert tuple(found["methods"]) == METHODS
        assert found["maps"].shape == found["against_maps"].shape == (3, 64, 48)
        assert found["maps"].dtype == found["raw_cam"].dtype == np.float32
        assert found["maps"].min() == 0
        assert found["maps"].max() <= 1 + 1e-6
        seen = subject(run)
        picture = decode(pictures / "b/leaf.png")
        x = torch.from_numpy(preprocess(picture, seen.preprocess))[None]
        with torch.no_grad():
            p = seen.step.net(x).softmax(1)[0].numpy()
            a = seen.step.net.forward_features(x)[0]
        np.testing.assert_allclose(found["p"], p, atol=1e-6)
        assert found["label"] == p.argmax()
        weight = seen.step.net.get_classifier().weight[int(p.argmax())].detach()
        np.testing.assert_allclose(found["raw_cam"], torch.einsum("chw,c->hw", a, weight).numpy(), atol=1e-4)
        drawn = overlay(Image.fromarray(fit(picture, seen.preprocess)), found["maps"][1])
        np.testing.assert_array_equal(np.asarray(decode(out / "overlays/gradcam/leaf-2.png")), np.asarray(drawn))


def test_the_same_command_writes_the_same_bytes(run: Path, pictures: Path, tmp_path: Path) -> None:
    written = []
    for name in ("once", "again"):
        api.explain(run, [pictures / "a"], tmp_path / name, methods=["smoothgradcam++", "sscam"], channels=2)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        written.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files})
    assert len(written[0]) == 4
    assert written[0] == written[1]


def test_a_named_class(run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = subject(run).classes
    for label in labels:
        assert api.explain(run, [pictures / "a"], tmp_path / label, target=label) == 0
        with np.load(tmp_path / label / "maps/leaf.npz", allow_pickle=False) as found:
            assert found["classes"][found["label"]] == label
    said = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[1].rsplit(" ", 2)[0] for line in said] == list(labels)
    with pytest.raises(FgvcError, match=rf"first has no class '{labels[0]}x'; near: {labels[0]}"):
        api.explain(run, [pictures], tmp_path / "none", target=f"{labels[0]}x")
    assert not (tmp_path / "none").exists()


def test_a_bundle_says_what_its_run_says_without_torch(run: Path, bundle: Path, pictures: Path, tmp_path: Path) -> None:
    line = f"from fgvc.cli import main; main(['explain', {str(bundle)!r}, {str(pictures)!r}, '--out', {str(tmp_path / 'b')!r}])"
    heavy = "import sys; heavy = {'torch', 'torchvision', 'timm', 'albumentations', 'cv2', 'matplotlib'}"
    code = f"{heavy}\ntry:\n    {line}\nexcept SystemExit as e:\n    assert e.code == 1\nassert not heavy & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "broken.png: not an image" in done.stderr
    assert len(done.stdout.splitlines()) == 3
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
    with np.load(tmp_path / "b/maps/other.npz") as found:
        assert found["p"][found["label"]] == pytest.approx(best.probability, abs=1e-5)


def test_a_run_beside_its_bundle(run: Path, bundle: Path, pictures: Path, tmp_path: Path) -> None:
    assert api.explain(run, [pictures / "a"], tmp_path / "out", methods=["cam"], against=bundle) == 0
    with np.load(tmp_path / "out/maps/leaf.npz") as found:
        np.testing.assert_allclose(found["maps"], found["against_maps"], atol=1e-3)
    with pytest.raises(FgvcError, match="bundle: a bundle holds class activation maps alone"):
        api.explain(run, [pictures], tmp_path / "out", against=bundle)


def test_bundles_refuse_by_name_what_they_have_not(
    bundle: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "out")
    assert fgvc("explain", bundle, pictures, *out, "--method", "gradcam") == 2
    assert "gradcam: a bundle holds class activation maps alone" in capsys.readouterr().err
    assert fgvc("explain", bundle, pictures, *out, "--select", "last") == 2
    assert "--select, --device and --channels go with a run" in capsys.readouterr().err
    from fgvc.export.bundle import OPTIONAL, REQUIRED, write_bundle

    files = {name: (bundle / name).read_bytes() for name in (*REQUIRED, *OPTIONAL) if (bundle / name).exists()}
    del files["explain.onnx"]
    write_bundle(tmp_path / "bare", files=files)
    assert fgvc("explain", tmp_path / "bare", pictures, *out) == 2
    assert "bare: has no explain.onnx" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_maps_that_can_say_nothing(run: Path, pictures: Path, colours: Path, tmp_path: Path) -> None:
    single = trained(colours, tmp_path / "single", size=(32, 32))
    with pytest.raises(FgvcError, match=r"single: no class maps: the feature map is a single cell"):
        api.explain(single, [pictures], tmp_path / "out")
    flat, sloping = np.full((2, 3), -1.0, np.float32), np.float32([[-2, -1, 0], [0, 1, 4]])
    assert not positive(flat, (8, 9)).any()
    large = positive(sloping, (8, 9))
    assert (large.min(), large.max(), large[0, 0], large[-1, -1]) == (0, 1, 0, 1)


def test_what_is_not_there(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        ([run, tmp_path / "none.png"], "none.png: no such file or folder"),
        ([run, tmp_path], "no picture below this folder"),
        ([tmp_path / "norun", tmp_path], "norun"),
    ):
        assert fgvc("explain", *words, "--out", tmp_path / "out") == 2
        assert said in capsys.readouterr().err
    assert fgvc("explain", run, run, "--out", tmp_path / "out", "--method", "fullgrad") == 2
    assert "fullgrad: it adds up the biases" in capsys.readouterr().err


def test_names_never_collide() -> None:
    files = [Path(name) for name in ("a/x.jpg", "b/x.jpg", "a/X.png", "a/x-2.jpg", "c/x.jpg", "y.jpg")]
    found = _names(files)
    assert found == ["x", "x-2", "X-3", "x-2-2", "x-4", "y"]
    assert len({name.casefold() for name in found}) == len(files)
