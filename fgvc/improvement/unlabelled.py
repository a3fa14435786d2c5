"""Images without labels that a teacher labels for its student; none is a copy of an image that chooses or judges."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fgvc.config.data import SPLITS
from fgvc.data.index import ImageIndex
from fgvc.data.quality.copies import near_copies
from fgvc.data.sources.columns import StringColumn
from fgvc.evaluation.calibration import confidence_of
from fgvc.improvement.images import COLUMNS, Divided
from fgvc.io.files import write_atomic
from fgvc.io.tables import as_csv
from fgvc.runs.loaded import load_run
from fgvc.runtime.predict import expand

MOST = 4  # times the images to learn from, of which a sample is drawn
SPARE = 2  # times that, which are looked at: some are copies, or can't be read
SURE = 0.5  # probability from which an answer is learned from


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlabelled:
    """Images of a folder that may be learned from."""

    paths: tuple[str, ...]  # absolute
    copies: int  # of images that choose or judge, left out
    unreadable: int
    unsampled: int  # beyond MOST

    def __str__(self) -> str:
        left = [
            f"{count} {what}"
            for count, what in (
                (self.copies, "near copies of images that choose or judge"), (self.unreadable, "unreadable"),
                (self.unsampled, f"beyond {MOST} times the images to learn from, drawn by chance"),
            )
            if count
        ]  # fmt: skip
        return f"{len(self.paths)} images without labels" + (f"; left out: {', '.join(left)}" if left else "")


def list_unlabelled(folder: Path, divided: Divided, *, seed: int) -> Unlabelled:
    """List the images of a folder that a teacher may name. Raises FgvcError where there are none."""
    listed = [str(path.absolute()) for path in expand([folder])]
    most = MOST * divided.counts["train"]
    drawn = np.random.default_rng(seed).permutation(len(listed))[: SPARE * most]  # which a field's camera may fill for years
    paths = [listed[row] for row in np.sort(drawn)]
    index = _joined(divided.index, paths)
    own = np.arange(len(divided.index), len(index))
    families, readable = near_copies(index, np.arange(len(index)))
    held_out = np.isin(divided.index.splits, [SPLITS.index("val"), SPLITS.index("test")])
    copied = np.isin(families[own], families[: len(held_out)][held_out])
    fine = np.flatnonzero(readable[own] & ~copied)
    kept = fine if len(fine) <= most else np.sort(np.random.default_rng(seed).choice(fine, most, replace=False))
    return Unlabelled(
        paths=tuple(paths[row] for row in kept), copies=int((copied & readable[own]).sum()),
        unreadable=int((~readable[own]).sum()), unsampled=len(listed) - len(paths) + len(fine) - len(kept),
    )  # fmt: skip


def _joined(index: ImageIndex, paths: Sequence[str]) -> ImageIndex:
    """An index with more images, of no class in particular, to learn from."""
    count = len(index) + len(paths)
    return replace(
        index, paths=_strings([*index.paths.tolist(), *paths]), labels=np.resize(index.labels, count),
        splits=np.resize(index.splits, count), groups=None, boxes=None, parts=None, part_names=(),
    )  # fmt: skip


def _strings(paths: Sequence[str]) -> np.ndarray:
    """Convert paths to numpy strings. Raises FgvcError for a name that is not UTF-8."""
    column = StringColumn()
    column.extend(paths)
    return column.array()


def write_named(paths: Sequence[str], teacher: Path, images: Path, out: Path) -> int:
    """Write `out`: the table `images` with those of `paths` that the run `teacher` names with a probability of SURE or more, to
    learn from. Returns how many."""
    run = load_run(teacher)
    index = replace(
        run.index, root=Path("/"), paths=_strings(paths), labels=np.zeros(len(paths), np.int32),
        splits=np.zeros(len(paths), np.int8), groups=None, boxes=None, parts=None, part_names=(),
    )  # fmt: skip
    answers = run.answers(np.arange(len(paths)), index=index)
    sure = confidence_of(answers.logits.astype(np.float64), 1.0, answers.ending) >= SURE
    rows = list(csv.DictReader(images.read_text(encoding="utf-8").splitlines()))
    named = zip(answers.rows[sure], answers.logits[sure].argmax(1), strict=True)
    rows += [{"path": paths[row], "label": run.classes[label], "split": "train"} for row, label in named]
    write_atomic(out, as_csv(rows, COLUMNS))
    return int(sure.sum())
