"""What `fgvc localize` wrote, as a table for people."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fgvc.errors import FgvcError
from fgvc.report.localization import COLUMNS, MEASURES, localisation, table
from fgvc.runs.loaded import LoadedRun
from fgvc.runs.measured import read_measured


def numbers(**changes: Any) -> dict[str, Any]:
    """Each measure of each map another number."""
    boxes = {
        of: {"images": 16, "tau": 0.25} | {key: (10 * at + place) / 1000 for at, key in enumerate(MEASURES)}
        for place, of in enumerate(("true", "predicted", "centre"))
    }
    parts = {"visible": 99, "map": [0.5, 0.75], "centre": [0.25, 0.375], "uniform": [0.1, 0.2]}
    tree = {
        "images": 17,
        "top1": 0.75,
        "left_out": 1,
        "silent": 2,
        "chosen_from": "val",
        "boxes": boxes,
        "parts": parts,
    }
    return tree | changes


def test_every_measure_stands_in_its_row_and_every_map_in_its_column() -> None:
    measures = table("test.ema.gradcam", numbers())
    assert (measures.title, measures.about) == ("test, ema, gradcam", "17 images, top-1 75.00 %, 16 boxes, 99 parts")
    rows = dict(measures.rows)
    assert rows["GT-known Loc"] == ("0.0", "0.1", "0.2", "")
    assert rows["MaxBoxAccV2 (oracle)"] == ("8.0", "8.1", "8.2", "")
    assert rows["parts in the top 20 %"] == ("75.0", "", "37.5", "20.0")
    assert {len(cells) for cells in rows.values()} == {len(COLUMNS)}
    notes = "; ".join(measures.notes)
    assert "the threshold that was chosen on val (0.25; BoxAccV2: one an IoU)" in notes
    assert "these very images" not in notes
    assert "left out: 1 images" in notes
    assert "2 maps are empty" in notes
    assert "these very images" in "; ".join(table("val.ema.gradcam", numbers()).notes)


def test_a_table_without_parts() -> None:
    measures = table("val.last.cam", numbers(parts=None, left_out=0, silent=0))
    assert measures.about.endswith("16 boxes, no parts")
    assert not any(label.startswith("parts") for label, _ in measures.rows)
    assert measures.notes[-1] == "the data name no parts that can be seen: no coverage"


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    run = cast("LoadedRun", SimpleNamespace(folder=tmp_path, measured=lambda file: read_measured(tmp_path, file)))
    assert localisation(run) is None
    whole = {"val.last.cam": numbers()}
    (tmp_path / "localisation.json").write_text(json.dumps(whole))
    assert localisation(run) == [table("val.last.cam", numbers())]
    broken = [{"val": numbers()}, {"val.last.cam": numbers(boxes=1)}, {"val.last.cam": numbers(top1=None)}]
    for text in ("{", "[1]", '{"val": 1}', "\x00", '{"val.last.cam": {}}', *map(json.dumps, broken)):
        (tmp_path / "localisation.json").write_text(text)
        with pytest.raises(FgvcError, match=r"localisation\.json: not as fgvc wrote it"):
            localisation(run)
