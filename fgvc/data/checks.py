"""What is wrong with a set before any time is spent on it: every image is read once, and nothing is changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from fgvc.data.source import some
from fgvc.data.splits import straddling
from fgvc.image.decode import decode
from fgvc.types import SPLITS, ImageError, ImageIndex

TINY = 32  # pixels of the shorter side
IMBALANCE = 10.0  # largest class over smallest class of the train part from which a warning is given


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The findings; rows are those of the index. `errors` spoil a result, `warnings` are for people to weigh."""

    recognised: str
    classes: tuple[str, ...]
    counts: np.ndarray  # (3,K) int64: images by split and class
    imbalance: float  # largest class over smallest class in train; inf where a class has none
    missing: dict[str, tuple[str, ...]]  # by split that has images: the classes that have none in it
    unreadable: tuple[tuple[str, str], ...]  # path, reason
    tiny: tuple[tuple[str, int, int], ...]  # path, width, height
    duplicates: tuple[tuple[int, ...], ...]  # rows of files that are equal byte for byte
    leaks: tuple[tuple[int, ...], ...]  # the duplicates that lie in several splits
    conflicts: tuple[tuple[int, ...], ...]  # the duplicates with several labels
    straddling: tuple[str, ...]  # groups with rows in several splits
    errors: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.errors


@dataclass(frozen=True, slots=True)
class _Seen:
    """What reading one file gave."""

    digest: bytes = b""  # 16 bytes of a readable image
    size: tuple[int, int] | None = None  # width, height
    reason: str = ""


def check(
    index: ImageIndex,
    *,
    max_pixels: int = 50_000_000,
    max_unreadable: float = 0.05,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Decode every image in full and compare all files byte for byte. `progress(done, total)` is called per image."""
    total = len(index)
    digests = np.zeros((total, 2), np.uint64)
    unreadable: list[tuple[str, str]] = []
    tiny: list[tuple[str, int, int]] = []
    for row, seen in enumerate(_read_all(index, max_pixels, workers)):
        path = str(index.paths[row])
        # An unreadable file is nobody's duplicate: its row number stands for its content.
        digests[row] = np.frombuffer(seen.digest, np.uint64) if seen.digest else (row, 0)
        if seen.size is None:
            unreadable.append((path, seen.reason))
        elif min(seen.size) < TINY:
            tiny.append((path, *seen.size))
        if progress:
            progress(row + 1, total)
    counts = np.zeros((len(SPLITS), len(index.classes)), np.int64)
    np.add.at(counts, (index.splits, index.labels), 1)
    duplicates = _equal_rows(digests)
    report = Report(
        recognised=index.recognised,
        classes=index.classes,
        counts=counts,
        imbalance=float(counts[0].max() / counts[0].min()) if counts[0].min() else float("inf"),
        missing={
            split: tuple(index.classes[k] for k in np.flatnonzero(counts[s] == 0))
            for s, split in enumerate(SPLITS)
            if (counts[s] == 0).any() and (s == 0 or counts[s].any())
        },
        unreadable=tuple(unreadable),
        tiny=tuple(tiny),
        duplicates=duplicates,
        leaks=tuple(rows for rows in duplicates if len(set(index.splits[list(rows)].tolist())) > 1),
        conflicts=tuple(rows for rows in duplicates if len(set(index.labels[list(rows)].tolist())) > 1),
        straddling=() if index.groups is None else tuple(straddling(index.groups, index.splits)),
        errors=(),
        warnings=(),
    )
    return _judge(index, report, max_unreadable)


def _read_all(index: ImageIndex, max_pixels: int, workers: int | None) -> Iterator[_Seen]:
    """In the order of rows; a bounded number of files is under way."""
    window = 1024
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for start in range(0, len(index), window):
            rows = range(start, min(start + window, len(index)))
            yield from pool.map(lambda row: _read(index, row, max_pixels), rows)


def _read(index: ImageIndex, row: int, max_pixels: int) -> _Seen:
    try:
        content = index.path(row).read_bytes()
        return _Seen(hashlib.sha256(content).digest()[:16], size=decode(content, max_pixels=max_pixels).size)
    except ImageError as error:
        return _Seen(reason=error.reason)
    except OSError as error:
        return _Seen(reason=error.strerror or type(error).__name__)


def _equal_rows(digests: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Rows with equal digests (N,2), as ascending tuples of two and more."""
    if not len(digests):
        return ()
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    starts = np.flatnonzero(np.r_[True, (ordered[1:] != ordered[:-1]).any(axis=1)])
    ends = np.r_[starts[1:], len(order)]
    several = ends - starts > 1
    found = [tuple(order[a:b].tolist()) for a, b in zip(starts[several], ends[several], strict=True)]
    return tuple(sorted(found))


def _judge(index: ImageIndex, report: Report, max_unreadable: float) -> Report:
    """The report with its errors and warnings put in words."""
    errors: list[str] = []
    warnings: list[str] = []

    def pairs(found: tuple[tuple[int, ...], ...]) -> str:
        return some([" = ".join(f"{index.paths[r]} ({SPLITS[index.splits[r]]})" for r in rows) for rows in found], 3)

    for split, names in report.missing.items():
        text = f"{len(names)} classes have no image in {split}: {some(names)}"
        (errors if split == "train" else warnings).append(text)
    for s, split in enumerate(SPLITS):
        if not report.counts[s].any() and split != "train":
            warnings.append(f"there is no {split} part")
    if report.unreadable:
        share = len(report.unreadable) / len(index)
        listed = some([f"{path} ({reason})" for path, reason in report.unreadable])
        text = f"{len(report.unreadable)} of {len(index)} files can't be read ({share:.2%}): {listed}"
        (errors if share > max_unreadable else warnings).append(text)
    if report.leaks:
        errors.append(
            f"{len(report.leaks)} images lie in more than one split, which flatters scores: {pairs(report.leaks)}"
        )
    if within := tuple(sorted(set(report.duplicates) - set(report.leaks))):
        warnings.append(f"{len(within)} images occur more than once within a split: {pairs(within)}")
    if report.conflicts:
        errors.append(f"{len(report.conflicts)} images occur under different labels: {pairs(report.conflicts)}")
    if report.straddling:
        errors.append(f"{len(report.straddling)} groups have rows in more than one split: {some(report.straddling)}")
    if report.imbalance > IMBALANCE and np.isfinite(report.imbalance):
        warnings.append(f"the largest class has {report.imbalance:.3g} times the train images of the smallest")
    if report.tiny:
        listed = some([f"{path} ({w} x {h})" for path, w, h in report.tiny])
        warnings.append(f"{len(report.tiny)} images are smaller than {TINY} pixels: {listed}")
    return replace(report, errors=tuple(errors), warnings=tuple(warnings))
