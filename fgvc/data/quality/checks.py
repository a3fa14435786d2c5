"""Check of a set before training: reads every image once and reports faults; changes nothing."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fgvc.config.data import SPLITS, Split
from fgvc.data.index import ImageIndex
from fgvc.data.quality.colour import Colours, Normalisation, colours, doubts, is_grey, moments
from fgvc.data.quality.duplicates import (
    LIKENESS,
    Fingerprint,
    Fingerprints,
    alike,
    equal,
    fingerprint,
    gathered,
    groups,
    joined,
    links,
)
from fgvc.data.quality.stored import StoredFacts, judge, levels_of, misplaced
from fgvc.data.quality.suspects import Suspects
from fgvc.data.splits import group_codes, straddling
from fgvc.errors import ImageError
from fgvc.images.damage import damage
from fgvc.images.decode import Picture
from fgvc.io.display import Display, table
from fgvc.io.names import some
from fgvc.io.tables import as_csv

TINY = 32  # pixels of the shorter side
IMBALANCE = 10.0  # largest class over smallest class of the train split, from which there is a warning

COLUMNS = ("finding", "number", "path", "split", "label", "suggested", "score", "detail")  # of the findings

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Report(Display):
    """Findings on a set; rows are those of the index. `errors` spoil a result, `warnings` may not matter."""

    index: ImageIndex
    counts: np.ndarray  # (3,K) int64: images by split and class
    imbalance: float  # largest class over smallest class in train; inf where a class has none
    missing: dict[str, tuple[str, ...]]  # by split that has images: the classes that have none in it
    unreadable: tuple[tuple[int, str], ...]  # row, reason
    tiny: tuple[int, ...]
    sizes: np.ndarray  # (N,2) int32: width, height in pixels, upright; 0 where unreadable
    duplicates: Rows  # rows of files that are equal byte for byte
    near: Rows  # rows that show the same picture, not all of them equal byte for byte; many rows may be a chain
    near_leaks: Rows  # pairs that show the same picture in two splits; for each row the most similar
    near_conflicts: Rows  # such pairs with two labels
    straddling: tuple[str, ...]  # groups with rows in several splits
    colours: Colours
    stored: StoredFacts
    suspects: Suspects | None = None  # None: not computed
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there are no errors."""
        return not self.errors

    @property
    def leaks(self) -> Rows:
        """The duplicates that lie in several splits."""
        return self._several(self.duplicates, self.index.splits)

    @property
    def conflicts(self) -> Rows:
        """The duplicates with several labels."""
        return self._several(self.duplicates, self.index.labels)

    def shown(self, rows: tuple[int, ...], count: int) -> list[int]:
        """At most `count` rows of a group: one of each split and label first, since the first rows may all have the same."""
        repeats = Counter[tuple[int, int]]()
        ranked = []
        for row in rows:
            kind = int(self.index.splits[row]), int(self.index.labels[row])
            ranked.append((repeats[kind], row))
            repeats[kind] += 1
        return [row for _, row in sorted(ranked)[:count]]

    @property
    def families(self) -> NDArray[np.int64]:
        """Numbers (N,) of the groups of rows that belong together: by the data's groups, or as copies of one picture."""
        named = [links(group_codes(self.index.groups))] if self.index.groups is not None else []
        same = [np.array([(rows[0], row) for row in rows[1:]], np.int64) for rows in (*self.duplicates, *self.near)]
        return joined(len(self.index), *named, *same)

    def _several(self, groups: Rows, column: np.ndarray) -> Rows:
        return tuple(rows for rows in groups if len(set(column[list(rows)].tolist())) > 1)

    @property
    def facts(self) -> Mapping[str, object]:
        images = f"{len(self.index)} images of {len(self.index.classes)} classes"
        return {"": self.index.root, "has": images, "errors": len(self.errors), "warnings": len(self.warnings)}

    def _repr_html_(self) -> str:
        findings = [*(("error", text) for text in self.errors), *(("warning", text) for text in self.warnings)]
        return table([("data", self.index.recognised), *list(self.facts.items())[1:], *findings])


def no_split(split: Split) -> str:
    """The warning of a split that has no image."""
    return f"there is no {split} split"


@dataclass(frozen=True, slots=True)
class _FileFacts:
    """Facts of one file, read once."""

    digest: bytes = b""  # 16 bytes of a readable image
    picture: Picture | None = None  # None: unreadable; without its pixels, which would not fit in memory
    levels: tuple[int, int] = (0, 0)  # as in StoredFacts
    damage: str = ""
    moments: NDArray[np.float64] = field(default_factory=lambda: np.full((2, 3), np.nan))
    fingerprint: Fingerprint | None = None
    reason: str = ""


def check(
    index: ImageIndex,
    *,
    max_unreadable: float = 0.05,
    expected: Normalisation | None = None,
    likeness: float = LIKENESS,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Decode every image in full, and compare all files byte for byte and all pictures with one another.

    `expected`: the network's normalisation, to compare colours with; `likeness`: the correlation, in [-1,1], from which two
    pictures are near copies. `progress(step, done, total)` is called while images are read, and while they are compared.
    """
    total = len(index)
    digests, sizes = np.zeros((total, 2), np.uint64), np.zeros((total, 2), np.int32)
    prints, image_moments, grey = Fingerprints.empty(total), np.full((total, 2, 3), np.nan), np.zeros(total, bool)
    stored = StoredFacts.empty(total)
    unreadable: list[tuple[int, str]] = []
    modes: Counter[str] = Counter()
    for row, facts in enumerate(_read_all(index, workers)):
        # An unreadable file is no duplicate: its row number stands for its content.
        digests[row] = np.frombuffer(facts.digest, np.uint64) if facts.digest else (row, 0)
        image_moments[row] = facts.moments
        if facts.fingerprint is None or facts.picture is None:
            unreadable.append((row, facts.reason))
        else:
            sizes[row] = facts.picture.size
            stored.put(row, facts.picture, facts.levels, facts.damage)
            prints.put(row, facts.fingerprint)
            grey[row] = is_grey(facts.fingerprint.thumb)
            modes[facts.picture.mode] += 1
        if progress:
            progress("reading", row + 1, total)
    counts = np.zeros((len(SPLITS), len(index.classes)), np.int64)
    np.add.at(counts, (index.splits, index.labels), 1)
    learned = counts[0][counts.any(axis=0)]  # without classes of a deployed file that have no images
    duplicates = equal(digests)
    near, across = _near(index, prints, np.flatnonzero(sizes[:, 0] > 0), duplicates, likeness, progress)
    report = Report(
        index=index,
        counts=counts,
        imbalance=float(learned.max() / learned.min()) if learned.min() else float("inf"),
        missing={
            split: tuple(index.classes[k] for k in np.flatnonzero(counts[s] == 0))
            for s, split in enumerate(SPLITS)
            if (counts[s] == 0).any() and (s == 0 or counts[s].any())
        },
        unreadable=tuple(unreadable),
        tiny=tuple(np.flatnonzero((sizes.min(axis=1) < TINY) & (sizes.min(axis=1) > 0)).tolist()),
        sizes=sizes,
        duplicates=duplicates,
        near=near,
        near_leaks=across[0],
        near_conflicts=across[1],
        straddling=() if index.groups is None else tuple(straddling(index.groups, index.splits)),
        colours=colours(image_moments, grey, train=index.splits == 0, modes=modes, expected=expected),
        stored=stored,
    )
    return _judge(report, max_unreadable)


def with_suspects(report: Report, suspects: Suspects) -> Report:
    """The report with the labels that a probe doubts, and warnings of them."""
    text = (
        f"about {suspects.wrong} labels look wrong; {len(suspects.listed)} images look more like another class than their own"
    )
    warnings = [text] if suspects.wrong else []
    if suspects.unjudged:
        warnings.append(f"{suspects.unjudged} labels were not judged: their classes are too small to hold an image out")
    return replace(report, suspects=suspects, warnings=(*report.warnings, *warnings))


def findings(report: Report) -> list[dict[str, object]]:
    """A row for every finding about an image, with COLUMNS. `number` joins the rows of one group of duplicates."""
    index = report.index
    lines: list[dict[str, object]] = []

    def add(finding: str, row: int, *, number: int | str = "", detail: str = "") -> dict[str, object]:
        label = index.classes[index.labels[row]]
        line = {"finding": finding, "number": number, "path": str(index.paths[row]), "split": SPLITS[index.splits[row]]}
        lines.append(line | {"label": label, "suggested": "", "score": "", "detail": detail})
        return lines[-1]

    for row, reason in report.unreadable:
        add("unreadable", row, detail=reason)
    for row, detail in sorted(report.stored.damage.items()):
        add("damaged", row, detail=detail)
    for row, detail in misplaced(index, report.stored).items():
        add("box", row, detail=detail)
    for row in report.tiny:
        add("tiny", row, detail=" x ".join(map(str, report.sizes[row])))
    kinds = [("duplicate", rows) for rows in report.duplicates] + [("near-duplicate", rows) for rows in report.near]
    for number, (finding, rows) in enumerate(kinds, 1):
        for row in rows:
            add(finding, row, number=number)
    for finding, several in (("flat", report.colours.flat), ("grey", report.colours.grey)):
        for row in several:
            add(finding, row)
    for suspect in report.suspects.listed if report.suspects else ():
        line = add("suspect", suspect.row)
        line |= {"suggested": index.classes[suspect.suggested], "score": f"{suspect.p_label:.4f}"}
        line["detail"] = f"{suspect.p_suggested:.4f} as suggested; not calibrated"
    return lines


CLEAN = ("path", "label", "split")  # of the list that is fit to learn from


def clean_rows(report: Report) -> tuple[NDArray[np.int64], dict[str, int]]:
    """The rows of a set that are fit to learn from, and how many of the others are left out for which reason.

    Left out are unreadable and damaged images, those of one colour, suspects, pictures that occur with several labels, and of
    copies and near copies in several splits those that are in train or, where there are none, in val: what is scored stays. Of
    files that are equal within a split the first stays. A class without a training image is left out as a whole."""
    index = report.index
    left: dict[int, str] = {}

    def leave(reason: str, rows: Iterable[int]) -> None:
        for row in rows:
            left.setdefault(int(row), reason)

    leave("unreadable", (row for row, _ in report.unreadable))
    leave("damaged", report.stored.damage)
    leave("of one colour", report.colours.flat)
    leave("suspects", (suspect.row for suspect in report.suspects.listed) if report.suspects else ())
    leave("with several labels", (row for rows in (*report.conflicts, *report.near_conflicts) for row in rows))
    for rows in (*report.duplicates, *report.near):
        kept = [row for row in rows if row not in left]
        last = max((index.splits[row] for row in kept), default=0)
        leave("copies across splits", (row for row in kept if index.splits[row] != last))
    for rows in report.duplicates:
        leave("equal files", [row for row in rows if row not in left][1:])
    mask = np.ones(len(index), bool)
    mask[list(left)] = False
    learned = np.bincount(index.labels[mask & (index.splits == 0)], minlength=len(index.classes)) > 0
    leave("of classes without a training image", np.flatnonzero(mask & ~learned[index.labels]))
    mask[list(left)] = False
    return np.flatnonzero(mask), dict(Counter(left.values()))


def clean_list(report: Report) -> str:
    """The clean rows as CSV text that `data.kind: csv` reads, with the same root; groups go with it."""
    index = report.index
    rows, _ = clean_rows(report)
    named = index.groups is not None
    lines = [
        {"path": str(index.paths[row]), "label": index.classes[index.labels[row]], "split": SPLITS[index.splits[row]]}
        | ({"group": str(index.groups[row])} if index.groups is not None else {})
        for row in rows.tolist()
    ]
    return as_csv(lines, (*CLEAN, "group") if named else CLEAN)


def _near(
    index: ImageIndex,
    prints: Fingerprints,
    readable: NDArray[np.int64],
    duplicates: Rows,
    likeness: float,
    progress: Callable[[str, int, int], None] | None,
) -> tuple[Rows, list[Rows]]:
    """Groups of rows that show the same picture, and the pairs of two splits and of two labels among them.

    Of files that are equal byte for byte one is compared; the others join its group afterwards."""
    first = {row: rows[0] for rows in duplicates for row in rows[1:]}
    rows = np.array([row for row in readable.tolist() if row not in first], np.int64)
    similar = alike(prints, rows, likeness=likeness, progress=partial(progress, "comparing") if progress else None)
    numbers, across = gathered(similar, len(index), index.splits, index.labels)
    numbers = joined(len(index), links(numbers), np.array(list(first.items()), np.int64).reshape(-1, 2))
    equal_files = set(duplicates)
    near = tuple(group for group in groups(numbers) if group not in equal_files)
    return near, [tuple(map(tuple, pairs.tolist())) for pairs in across]


def _read_all(index: ImageIndex, workers: int | None) -> Iterator[_FileFacts]:
    """Facts of all files in the order of rows; a bounded number of them is in memory."""
    window = 1024
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for start in range(0, len(index), window):
            rows = range(start, min(start + window, len(index)))
            yield from pool.map(lambda row: _read(index, row), rows)


def _read(index: ImageIndex, row: int) -> _FileFacts:
    try:
        content = index.content(row)
        picture = index.picture(row, content)
    except ImageError as error:
        return _FileFacts(reason=error.reason)
    return _FileFacts(
        digest=hashlib.sha256(content).digest()[:16],
        picture=replace(picture, image=Image.new("RGB", (1, 1))),
        levels=levels_of(picture),
        damage=damage(content),
        moments=moments(picture.image),
        fingerprint=fingerprint(picture.image),
    )


def _judge(report: Report, max_unreadable: float) -> Report:
    """The report with its errors and warnings in words."""
    index, total = report.index, len(report.index)
    errors: list[str] = []
    warnings: list[str] = list(index.warnings)
    absent = [name for name, count in zip(index.classes, report.counts.sum(axis=0), strict=True) if not count]
    if absent:  # outputs of a deployed file, which keep what it knows of them
        warnings.append(f"{len(absent)} classes have no image, and are not trained: {some(absent)}")
    for split, missing in report.missing.items():
        if names := [name for name in missing if name not in absent]:
            text = f"{len(names)} classes have no image in {split}: {some(names)}"
            (errors if split == "train" else warnings).append(text)
    for s, split in enumerate(SPLITS):
        if not report.counts[s].any() and split != "train":
            warnings.append(no_split(split))
    if report.unreadable:
        share = len(report.unreadable) / total
        listed = some([f"{index.paths[row]} ({reason})" for row, reason in report.unreadable])
        text = f"{len(report.unreadable)} of {total} files can't be read ({share:.2%}): {listed}"
        (errors if share > max_unreadable else warnings).append(text)
    _judge_copies(report, errors, warnings)
    if report.straddling:
        errors.append(f"{len(report.straddling)} groups have rows in more than one split: {some(report.straddling)}")
    if report.imbalance > IMBALANCE and np.isfinite(report.imbalance):
        warnings.append(f"the largest class has {report.imbalance:.3g} times the train images of the smallest")
    if report.tiny:
        listed = some([f"{index.paths[row]} ({' x '.join(map(str, report.sizes[row]))})" for row in report.tiny])
        warnings.append(f"{len(report.tiny)} images are smaller than {TINY} pixels: {listed}")
    if report.colours.flat:
        listed = some([_place(index, row) for row in report.colours.flat])
        warnings.append(f"{len(report.colours.flat)} images are of one colour and show nothing: {listed}")
    for error, text in judge(index, report.stored):
        (errors if error else warnings).append(text)
    warnings += doubts(report.colours, total)
    return replace(report, errors=tuple(errors), warnings=tuple(warnings))


def _judge_copies(report: Report, errors: list[str], warnings: list[str]) -> None:
    """Add the messages on copies: in two splits, or under two labels, they spoil a result, however they are stored."""

    def listed(groups: Rows, sign: str) -> str:
        return some([f" {sign} ".join(place(row) for row in report.shown(rows, 3)) for rows in groups], 3)

    def place(row: int) -> str:
        index = report.index
        return f"{index.paths[row]} ({SPLITS[index.splits[row]]}, {index.classes[index.labels[row]]})"

    leaks, conflicts = report.leaks, report.conflicts
    if leaks:
        errors.append(f"{len(leaks)} images lie in more than one split, which flatters scores: {listed(leaks, '=')}")
    if within := tuple(sorted(set(report.duplicates) - set(leaks))):
        warnings.append(f"{len(within)} images occur more than once within a split: {listed(within, '=')}")
    if conflicts:
        errors.append(f"{len(conflicts)} images occur under different labels: {listed(conflicts, '=')}")
    leaks, conflicts = report.near_leaks, report.near_conflicts
    if leaks:
        errors.append(f"{len(leaks)} pairs of near copies lie in two splits: {listed(leaks, '~')}")
    crossing = {row for pair in leaks for row in pair}
    if within := tuple(rows for rows in report.near if not crossing & set(rows)):
        warnings.append(f"{len(within)} pictures occur in near copies within a split: {listed(within, '~')}")
    if conflicts:
        errors.append(f"{len(conflicts)} pairs of near copies have different labels: {listed(conflicts, '~')}")


def _place(index: ImageIndex, row: int) -> str:
    return f"{index.paths[row]} ({SPLITS[index.splits[row]]})"
