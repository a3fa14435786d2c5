"""Names given by users: the nearest valid name, names that fit on a line or on the disk, and comparisons of class lists."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from fgvc.errors import FgvcError

LONGEST = 200  # bytes of a result's name: file systems take 255, with prefix and suffix
BREAKING = ("Cc", "Cs", "Zl", "Zp")  # Unicode's control characters, halves of characters, and ends of lines


def nearest(name: str, candidates: Iterable[str], count: int = 1) -> list[str]:
    """The `count` nearest of `candidates` by edit distance (optimal string alignment), nearest first, ignoring case.

    A candidate may be as many edits away as a third of the name's length, and two in any case.
    """
    farthest = max(2, len(name) // 3)
    close = [other for other in candidates if abs(len(other) - len(name)) <= farthest]
    ranked = sorted((_edits(name.lower(), other.lower()), other) for other in close)
    return [other for edits, other in ranked if edits <= farthest][:count]


def _edits(a: str, b: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours from `a` to `b` (optimal string alignment)."""
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != other)))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                row[j] = min(row[j], before[j - 2] + 1)
        before, last = last, row
    return last[-1]


def refuse_breaking(names: Iterable[str], *, where: Path) -> None:
    """Raise FgvcError for a class name that would break a line of a table, or can't be written as UTF-8."""
    for name in names:
        if any(unicodedata.category(character) in BREAKING for character in name):
            raise FgvcError(
                f"{where}: the class {name!r} has a line break, a tab or another control character in its name, or bytes that "
                "are not UTF-8: rename it"
            )


def one_line(path: Path | str) -> str:
    """A path as one line of text: control characters and bytes that are not UTF-8 are escaped as in Python."""
    return "".join(
        repr(character)[1:-1] if unicodedata.category(character) in BREAKING else character for character in str(path)
    )


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of the folders above them as make the names distinct."""
    paths = [folder.resolve().parts for folder in folders]
    names: list[str] = []
    for depth in range(1, max(map(len, paths), default=0) + 1):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def result_names(files: Sequence[Path]) -> list[str]:
    """A distinct name for each file's results: its name without suffix, numbered if taken, in UTF-8, of at most LONGEST bytes."""
    taken: set[str] = set()
    names = []
    for path in files:
        stem = os.fsencode(path.stem).decode(errors="replace").encode()[:LONGEST].decode(errors="ignore")
        name, number = stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def label_differences(ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
    """Differences between the class lists of two classifiers, in words, ours before theirs; empty if the lists are equal."""
    if tuple(ours) == tuple(theirs):
        return []
    only_ours, only_theirs = set(ours) - set(theirs), set(theirs) - set(ours)
    if only_ours or only_theirs or len(ours) != len(theirs):
        unshared = " against ".join(few(sorted(names)) or "none" for names in (only_ours, only_theirs))
        return [f"labels: {len(ours)} classes against {len(theirs)}; those that the other lacks: {unshared}"]
    moved = [k for k, (our, their) in enumerate(zip(ours, theirs, strict=True)) if our != their]
    remark = sort_order_remark(ours) or sort_order_remark(theirs)
    return [
        f"labels: {len(moved)} of {len(ours)} outputs mean another class, the first of them output {moved[0]}: "
        f"{ours[moved[0]]!r} against {theirs[moved[0]]!r}" + f" ({remark})" * bool(remark)
    ]


def sort_order_remark(names: Sequence[str]) -> str:
    """A remark on sorted names that other tools would sort in another order; empty for all others."""
    as_text, as_timm = sorted(names), sorted(names, key=natural_key)
    if as_text == as_timm or list(names) not in (as_text, as_timm):
        return ""
    start = max(0, next(k for k, (a, b) in enumerate(zip(as_text, as_timm, strict=True)) if a != b) - 1)
    text, timm = few(as_text[start:]), few(as_timm[start:])
    if list(names) == as_text:
        return f"class order sorted as text ({text}), as torchvision and Keras do; timm would count ({timm})"
    return f"class order sorted by number ({timm}), as timm does; torchvision and Keras would sort as text ({text})"


def natural_key(name: str) -> list[str | int]:
    """Sort key that puts 2 before 10 and ignores case, as timm sorts class folders (`timm.utils.misc.natural_key`)."""
    return [int(piece) if piece.isdecimal() else piece for piece in re.split(r"([0-9]+)", name.lower())]


def few(names: Sequence[str], limit: int = 5) -> str:
    """The first `limit` names, joined by commas."""
    return ", ".join(names[:limit]) + ", ..." * (len(names) > limit)


def some(names: Sequence[object], limit: int = 5) -> str:
    """The first `limit` names, joined by commas, and the number of the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(str(name) for name in names[:limit]) + more
