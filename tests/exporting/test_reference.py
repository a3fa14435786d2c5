"""The independent plain model's graph is kept for the next export, and never believed where anything has changed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from fgvc.exporting import reference
from fgvc.exporting.onnx import Interface, serialised
from fgvc.exporting.reference import CACHED_GRAPHS, cached_plain, independent_plain

WANTED: dict[str, Any] = {
    "backbone": "test_resnet",
    "num_classes": 3,
    "kwargs": {},
    "interface": Interface(size=(32, 32)),
    "exporter": "torchscript",
}


REQUEST = reference._request(**WANTED)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fgvc" / "plain"


def test_the_second_time_it_is_the_same_from_the_cache(
    folder: Path, new_python: Callable[[], AbstractContextManager[None]]
) -> None:
    with new_python():
        proto, positions, state = cached_plain(**WANTED)
        assert state == "fresh"
        again, others, state = cached_plain(**WANTED)
        assert state == "cached"
    fresh, expected = independent_plain(**WANTED)  # by another process
    assert serialised(again) == serialised(proto) == serialised(fresh)
    assert others == positions == expected


@pytest.mark.parametrize("change", ["classes", "versions", "sources"])
def test_what_shapes_a_graph_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    cached_plain(**WANTED)
    request = WANTED
    if change == "classes":
        request = WANTED | {"num_classes": 4}
    elif change == "versions":
        monkeypatch.setattr(reference, "versions", lambda: {"torch": "another"})
    else:
        monkeypatch.setattr(reference, "_sources", lambda: "another")
    assert cached_plain(**request)[2] == "fresh"


@pytest.mark.parametrize("name", ["0.onnx", "1.onnx", "sha256.json"])
@pytest.mark.parametrize("damage", ["flipped", "gone", "cut"])
def test_what_is_damaged_is_made_anew(folder: Path, name: str, damage: str) -> None:
    cached_plain(**WANTED)
    (entry,) = folder.iterdir()
    content = bytearray((entry / name).read_bytes())
    if damage == "gone":
        (entry / name).unlink()
    elif damage == "cut":
        (entry / name).write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        (entry / name).write_bytes(content)
    assert cached_plain(**WANTED)[2] == "fresh"
    assert cached_plain(**WANTED)[2] == "cached"


def test_a_few_are_kept_and_a_place_that_cannot_be_written_is_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn_graphs = reference._two_draws(REQUEST)
    monkeypatch.setattr(reference, "_two_draws", lambda request: drawn_graphs)
    for classes in range(CACHED_GRAPHS + 3):
        cached_plain(**WANTED | {"num_classes": classes})
    assert len(list(folder.iterdir())) == CACHED_GRAPHS
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cached_plain(**WANTED)[2] == "fresh"
