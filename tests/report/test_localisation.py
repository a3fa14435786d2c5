"""Whatever `fgvc localize` wrote becomes tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fgvc.report.localisation import Table, localisation
from fgvc.types import FgvcError


def test_trees_become_tables(tmp_path: Path) -> None:
    assert localisation(tmp_path) is None
    boxes = {"true": {"tau": 0.25, "max_box_acc": 0.123456}, "centre": {"tau": 0.5}}
    numbers = {"images": 17, "chosen_from": "val", "boxes": boxes, "parts": {"map": [0.5, 0.75]}, "none": None}
    (tmp_path / "localisation.json").write_text(json.dumps({"val.last.gradcam": numbers}))
    title = "val · last · gradcam"
    assert localisation(tmp_path) == [
        Table(title, (), (("images", ("17",)), ("chosen from", ("val",)))),
        Table(f"{title}: boxes", ("true", "centre"), (("tau", ("0.25", "0.5")), ("max box acc", ("0.1235", "")))),
        Table(f"{title}: parts", (), (("map", ("0.5, 0.75",)),)),
    ]


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    for text in ("{", "[1]", '{"val": 1}', "\x00"):
        (tmp_path / "localisation.json").write_text(text)
        with pytest.raises(FgvcError, match=r"localisation\.json"):
            localisation(tmp_path)
