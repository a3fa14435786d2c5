"""Parts of a set by their classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fgvc.config.data import CubData
from fgvc.data.labels import first_classes, reordered
from fgvc.data.sources.read import read_source
from fgvc.errors import FgvcError


def test_the_first_classes_keep_their_images_boxes_and_splits(boxed: Path) -> None:
    whole = read_source(CubData(root=boxed, val_fraction=0.25))
    some = first_classes(whole, 2)
    assert some.classes == whole.classes[:2]
    rows = [row for row in range(len(whole)) if whole.labels[row] < 2]
    assert len(some) == len(rows) == 48
    assert whole.boxes is not None
    assert some.boxes is not None
    for at, row in enumerate(rows):
        assert some.paths[at] == whole.paths[row]
        assert (some.labels[at], some.splits[at]) == (whole.labels[row], whole.splits[row])
        assert np.array_equal(some.boxes[at], whole.boxes[row])


def test_more_classes_than_there_are_is_refused(boxed: Path) -> None:
    with pytest.raises(FgvcError, match="data.first_classes: 4, and the data have 3"):
        first_classes(read_source(CubData(root=boxed)), 4)


@pytest.mark.parametrize("form", ["json", "txt"])
def test_a_deployed_order_is_a_list_or_a_bundles_labels(boxed: Path, tmp_path: Path, form: str) -> None:
    whole = read_source(CubData(root=boxed))
    names = list(whole.classes[::-1])
    path = tmp_path / f"labels.{form}"
    path.write_text(json.dumps(names) if form == "json" else "\n".join(names))
    turned = reordered(whole, path)
    assert turned.classes == tuple(names)
    for row in range(len(whole)):
        assert turned.classes[turned.labels[row]] == whole.classes[whole.labels[row]]
    for wrong, message in (
        ([*names, names[0]], f"given twice: {names[0]}"),
        (names[1:], "1 missing"),
        ([], "expected"),
    ):
        path.write_text(json.dumps(wrong) if form == "json" else "\n".join(wrong))
        with pytest.raises(FgvcError, match=f"deploy.labels: .*{message}"):
            reordered(whole, path)
    with pytest.raises(FgvcError, match="deploy.labels: .*nothing"):
        reordered(whole, tmp_path / f"nothing.{form}")
