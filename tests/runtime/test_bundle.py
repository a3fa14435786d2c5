import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from fgvc.config.calibration import Calibration
from fgvc.config.images import Preprocess
from fgvc.errors import FgvcError
from fgvc.runtime import bundle as bundles
from fgvc.runtime.bundle import MANIFEST, load_bundle, refuse_target, write_bundle

PREPROCESS = Preprocess(size=(32, 48), resize="pad")


def files(**changed: Any) -> dict[str, Any]:
    return {
        "model.onnx": b"\x08\x0agraph",
        "labels.json": ["Häher", "Meise"],
        "preprocess.json": PREPROCESS,
        "contract.json": {"num_classes": 2},
        "metrics.json": {"val": {"top1": 0.5}},
    } | changed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle", files=files())
    return tmp_path / "bundle"


def seal(folder: Path, **added: str) -> None:
    """Write a manifest that fits what lies there now, as a forger would."""
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != MANIFEST}
    tree = {"format": 1, "files": dict(sorted((hashes | added).items()))}
    (folder / MANIFEST).write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n")


def test_what_is_written_is_read(folder: Path) -> None:
    loaded = load_bundle(folder)
    assert loaded.labels == ("Häher", "Meise")
    assert loaded.preprocess == PREPROCESS
    assert loaded.metrics == {"val": {"top1": 0.5}}
    assert loaded.contract == {"num_classes": 2}
    assert loaded.model.read_bytes() == b"\x08\x0agraph"
    assert loaded.explain_model is None
    assert sorted(p.name for p in folder.parent.iterdir()) == ["bundle"]
    manifest = json.loads((folder / MANIFEST).read_text())["files"]
    others = [path for path in folder.iterdir() if path.name != MANIFEST]
    assert manifest == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in others}


def test_equal_contents_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "again", files=dict(reversed(files().items())))
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_is_detected_and_its_file_named(folder: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    flipped = bytearray(content)
    flipped[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(flipped)
    try:
        with pytest.raises(FgvcError) as caught:
            load_bundle(folder)
        # A flip in the manifest may show as the file that it then speaks of wrongly.
        assert path.name in str(caught.value) or path.name == MANIFEST
    finally:
        path.write_bytes(content)
    load_bundle(folder)


def test_extra_and_missing_files_are_named(folder: Path) -> None:
    (folder / "notes.txt").write_text("hello")
    with pytest.raises(FgvcError, match=r"notes\.txt: not in the manifest"):
        load_bundle(folder)
    (folder / "notes.txt").unlink()
    (folder / "labels.json").unlink()
    with pytest.raises(FgvcError, match=r"labels\.json: missing"):
        load_bundle(folder)


@pytest.mark.parametrize("name", ["../labels.json", "/etc/passwd", "a/b", "..", ".hidden", "", "a\\b", MANIFEST, "x\n"])
def test_names_that_lead_elsewhere_are_refused(folder: Path, name: str) -> None:
    seal(folder, **{name: "0" * 64})
    with pytest.raises(FgvcError, match="is not the name of a file in a bundle"):
        load_bundle(folder)


def test_links_folders_and_case_clashes_are_refused(folder: Path, tmp_path: Path) -> None:
    seal(folder, **{"MODEL.onnx": "0" * 64})
    with pytest.raises(FgvcError, match="differ in case only"):
        load_bundle(folder)
    seal(folder)
    outside = tmp_path / "labels.json"
    (folder / "labels.json").rename(outside)
    (folder / "labels.json").symlink_to(outside)
    with pytest.raises(FgvcError, match=r"labels\.json: not a plain file"):
        load_bundle(folder)
    (folder / "labels.json").unlink()
    (folder / "labels.json").mkdir()
    with pytest.raises(FgvcError, match=r"labels\.json: not a plain file"):
        load_bundle(folder)
    (folder / MANIFEST).rename(tmp_path / MANIFEST)
    (folder / MANIFEST).symlink_to(tmp_path / MANIFEST)
    with pytest.raises(FgvcError, match=r"manifest\.json: not a plain file"):
        load_bundle(folder)


def test_a_bundle_may_be_reached_through_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(folder)
    assert load_bundle(tmp_path / "current").labels == ("Häher", "Meise")


def test_weights_outside_the_file_are_refused(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../secret")
    write_bundle(tmp_path / "b", files=files(**{"model.onnx": tensor.SerializeToString()}))
    with pytest.raises(FgvcError, match=r"model\.onnx: keeps weights in another file"):
        load_bundle(tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("labels.json", [], "expected a list of class names"),
        ("labels.json", ["a", 2], "expected a list of class names"),
        ("labels.json", {"a": 1}, "expected a JSON list"),
        ("labels.json", ["a", "b", "c"], "3 names for 2 classes"),
        ("labels.json", b"\xff\xfe", "not valid JSON"),
        ("preprocess.json", {"size": [32, 32], "resise": "pad"}, "did you mean 'resize'"),
        ("contract.json", b"[" * 100_000, "not valid JSON"),
    ],
)
def test_contents_that_make_no_sense_are_named(tmp_path: Path, name: str, value: Any, message: str) -> None:
    write_bundle(tmp_path / "b", files=files(**{name: value}))
    with pytest.raises(FgvcError, match=message) as caught:
        load_bundle(tmp_path / "b")
    assert name in str(caught.value)


def test_what_is_no_bundle_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(FgvcError, match="no such bundle"):
        load_bundle(tmp_path / "nowhere")
    with pytest.raises(FgvcError, match=r"manifest\.json: missing"):
        load_bundle(tmp_path)


def test_only_a_bundle_is_ever_replaced_and_only_if_asked(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FgvcError, match="--overwrite"):
        write_bundle(folder, files=files())
    write_bundle(folder, files=files(**{"labels.json": ["a", "b"], "explain.onnx": b"x"}), overwrite=True)
    assert load_bundle(folder).labels == ("a", "b")
    assert load_bundle(folder).explain_model == folder / "explain.onnx"
    (tmp_path / "photos").mkdir()
    write_bundle(tmp_path / "photos", files=files())  # empty: nothing is lost
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    for overwrite in (False, True):
        with pytest.raises(FgvcError, match="something else than a bundle"):
            write_bundle(tmp_path / "photos", files=files(), overwrite=overwrite)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FgvcError, match="is not a folder"):
        refuse_target(tmp_path / "file", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "file", "photos"]


def test_a_full_disk_leaves_the_old_bundle_and_nothing_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(bundles.os, "fsync", full)
        with pytest.raises(FgvcError, match="No space left"):
            write_bundle(folder, files=files(**{"labels.json": ["a", "b"]}), overwrite=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]

    rename = os.rename

    def busy(source: Path, target: Path) -> None:
        if Path(target) == folder and ".old." not in str(source):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(bundles.os, "rename", busy)
        with pytest.raises(FgvcError, match="busy"):
            write_bundle(folder, files=files(**{"labels.json": ["a", "b"]}), overwrite=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_files_that_a_bundle_does_not_have_or_can_not_hold(tmp_path: Path) -> None:
    with pytest.raises(FgvcError, match=r"no file 'weights\.pt'"):
        write_bundle(tmp_path / "b", files=files(**{"weights.pt": b""}))
    with pytest.raises(FgvcError, match=r"needs model\.onnx"):
        write_bundle(tmp_path / "b", files={k: v for k, v in files().items() if k != "model.onnx"})
    with pytest.raises(FgvcError, match=r"metrics\.json: can't be written as JSON"):
        write_bundle(tmp_path / "b", files=files(**{"metrics.json": {"top1": float("nan")}}))
    assert list(tmp_path.iterdir()) == []


CALIBRATION = {
    "temperature": 2.0, "threshold": 0.25, "keep": 0.95, "fitted_on": "val", "images": 80, "nll_before": 1.0,
    "nll_after": 0.9, "ece_before": 0.2, "ece_after": 0.1, "kept": 0.95, "coverage": 0.9, "accuracy": 0.8,
}  # fmt: skip


def test_calibration_is_read_where_the_bundle_has_one(folder: Path, tmp_path: Path) -> None:
    assert load_bundle(folder).calibration is None
    write_bundle(tmp_path / "c", files=files(**{"calibration.json": Calibration(**CALIBRATION)}))
    loaded = load_bundle(tmp_path / "c").calibration
    assert loaded == Calibration(**CALIBRATION)
    assert loaded is not None
    assert (loaded.temperature, loaded.threshold) == (2.0, 0.25)
    older = json.dumps(CALIBRATION).encode()  # of a version that kept no note
    write_bundle(tmp_path / "older", files=files(**{"calibration.json": older}))
    assert load_bundle(tmp_path / "older").calibration == loaded
    assert loaded.note == ""


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(CALIBRATION | {"temperature": 0}),
        json.dumps(CALIBRATION | {"temperature": -1.5}),
        json.dumps(CALIBRATION | {"temperature": float("nan")}),
        json.dumps(CALIBRATION | {"temperature": float("inf")}),
        json.dumps(CALIBRATION | {"threshold": 1.5}),
        json.dumps(CALIBRATION | {"threshold": float("nan")}),
        json.dumps(CALIBRATION | {"threshold": "high"}),
        json.dumps(CALIBRATION | {"bias": 1}),
        json.dumps({k: v for k, v in CALIBRATION.items() if k != "temperature"}),
        "[]",
        "{",
    ],
)
def test_a_damaged_calibration_is_refused_by_name(folder: Path, text: str) -> None:
    (folder / "calibration.json").write_text(text)
    seal(folder)
    with pytest.raises(FgvcError, match=r"calibration\.json"):
        load_bundle(folder)
