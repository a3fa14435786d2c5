"""What was given to the wrong verb is told what it is, with the verbs for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fgvc.cli.app import main
from fgvc.io.places import is_data, what_it_is


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("run/config.yaml", "run/ckpt/x", "bundle/manifest.json", "bundle/model.onnx", "leaves/a/1.jpg", "leaves/b/2.PNG",
                 "net.safetensors", "split/train/a/1.jpg", "split/train/b/2.jpg", "flat/1.jpg", "other/readme.md"):  # fmt: skip
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("run", "; it is a run of fgvc: `fgvc eval run`"), ("bundle", "; it is a bundle: `fgvc predict bundle IMAGES`"),
        ("leaves", "; it is a folder of classes (a, b): `fgvc train leaves`"), ("split", "; it is a folder of classes (a, b)"),
        ("flat", "; it is a folder of images"), ("flat/1.jpg", "; it is a picture"), ("run/config.yaml", "; it is a recipe"),
        ("net.safetensors", "; it is a file of weights: `fgvc train IMAGES model.weights=net.safetensors`"),
        ("bundle/model.onnx", "; it is a network's file: `fgvc inspect bundle/model.onnx`"),
    ],
)  # fmt: skip
def test_runs_bundles_and_data_sets_are_recognised(places: Path, place: str, words: str) -> None:
    assert what_it_is(Path(place)).startswith(words)


def test_other_folders_are_not_described(places: Path) -> None:
    assert [what_it_is(Path(name)) for name in ("other", "empty", "none", "other/readme.md")] == [""] * 4
    assert [is_data(Path(name)) for name in ("leaves", "empty", "run", "bundle", "none", "flat/1.jpg")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("eval leaves", "leaves: not a run of fgvc (no config.yaml); it is a folder of classes"),
        ("eval bundle", "bundle: not a run of fgvc (no config.yaml); it is a bundle"),
        ("predict run flat", "run: not a bundle; it is a run of fgvc"),
        ("predict leaves flat", "leaves: not a bundle; it is a folder of classes"),
        ("train run", "run: is no recipe; it is a run of fgvc"),
        ("train bundle", "bundle: is no recipe; it is a bundle"),
        ("train any/plain leaves", "override 'leaves': write it as section.key=value; did you mean data.root=leaves?"),
        ("train any/plain data.root=bundle", "bundle: data.root is no set of images; it is a bundle"),
        ("train flat/1.jpg", "flat/1.jpg: the recipe is not UTF-8 text (byte 0); it is a picture"),
        ("export bundle -o out", "bundle: not a run of fgvc (no config.yaml); it is a bundle"),
        ("verify leaves", "leaves: not a bundle; it is a folder of classes"),
        ("inspect leaves", "leaves: not an ONNX file, or cut short (IsADirectoryError); it is a folder of classes"),
        ("init run my.yaml", "run: is no recipe; it is a run of fgvc"),
        ("init leaves my.yaml", "leaves: is no recipe but images: fgvc init --data leaves my.yaml"),
    ],
)
def test_a_verb_names_another_kind_of_folder(
    places: Path, command: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (places / "flat/1.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
