"""What takes a name on the disk is whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fgvc.errors import FgvcError
from fgvc.io.files import as_json, replacing
from fgvc.io.tables import as_csv


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), replacing(path) as scratch:
        scratch.write_text("ha" + 99 * "\udc80", encoding="utf-8")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.png", "old")]
    with replacing(path) as scratch:
        assert scratch.suffix == ".png"
        scratch.write_text("new")
        assert path.read_text() == "old"
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.png", "new")]
    with pytest.raises(FgvcError, match=r"b/c\.png: can't write"), replacing(tmp_path / "b/c.png") as scratch:
        scratch.write_text("nowhere")


def test_where_there_is_no_number_json_has_null_and_a_table_nothing() -> None:
    values = [float("nan"), float("inf"), np.float32("-inf"), np.float64("nan"), 1.5, 2, True, "NaN", None]
    assert json.loads(as_json({"a": values})) == {"a": [None, None, None, None, 1.5, 2, True, "NaN", None]}
    assert as_csv([{"a": float("nan"), "b": np.float64("inf"), "c": 1.5}]) == "a,b,c\n,,1.5\n"
