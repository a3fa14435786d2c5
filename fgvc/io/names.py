"""Names given by users, made to fit: on a line, as the name of a file, beside another of the same name."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from fgvc.errors import FgvcError

LONGEST = 200  # bytes of a result's name: file systems take 255, with what is put before and behind
BREAKING = ("Cc", "Cs", "Zl", "Zp")  # Unicode's control characters, halves of characters, and ends of lines


def nearest(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """Those of `known` that are at most a third of the name's length of edits away (Levenshtein, a swap of neighbours one edit;
    two at least are allowed), nearest first, `count` at most. Capitals count as small letters."""
    farthest = max(2, len(name) // 3)
    away = {other: _edits(name.lower(), other.lower()) for other in known if abs(len(other) - len(name)) <= farthest}
    return sorted((other for other, edits in away.items() if edits <= farthest), key=lambda other: (away[other], other))[:count]


def _edits(a: str, b: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours from `a` to `b` (optimal string alignment)."""
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, own in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (own != other)))
            if i > 1 and j > 1 and own == b[j - 2] and a[i - 2] == other:
                row[j] = min(row[j], before[j - 2] + 1)
        before, last = last, row
    return last[-1]


def refuse_breaking(names: Iterable[str], *, where: Path) -> None:
    """Raise FgvcError for the name of a class that would not stay on its line of a table, or can't be written as UTF-8."""
    for name in names:
        if any(unicodedata.category(character) in BREAKING for character in name):
            raise FgvcError(
                f"{where}: the class {name!r} has a line break, a tab or another control character in its name, or bytes that "
                "are not UTF-8: rename it"
            )


def one_line(path: Path | str) -> str:
    """A path for people and for tables: what would end a line or a column, or is not UTF-8, as Python escapes it."""
    return "".join(
        repr(character)[1:-1] if unicodedata.category(character) in BREAKING else character for character in str(path)
    )


def told_apart(folders: Sequence[Path]) -> list[str]:
    """The folders' own names; with as much of the path before them as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    names: list[str] = []
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def result_names(files: Sequence[Path]) -> list[str]:
    """A name for the results of each file: its own without the suffix, with a number where that is taken, in UTF-8 and no longer
    than file systems take."""
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


def relabelled(ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
    """Where the outputs of two classifiers mean other classes, in words, ours before theirs; empty where all mean the same."""
    if tuple(ours) == tuple(theirs):
        return []
    mine, other = (set(a) - set(b) for a, b in ((ours, theirs), (theirs, ours)))
    if mine or other or len(ours) != len(theirs):
        apart = " against ".join(few(sorted(names)) or "none" for names in (mine, other))
        return [f"labels: {len(ours)} classes against {len(theirs)}; those that the other lacks: {apart}"]
    moved = [k for k, (one, another) in enumerate(zip(ours, theirs, strict=True)) if one != another]
    remark = sorting(ours) or sorting(theirs)
    return [
        f"labels: {len(moved)} of {len(ours)} outputs mean another class, the first of them output {moved[0]}: "
        f"{ours[moved[0]]!r} against {theirs[moved[0]]!r}" + f" ({remark})" * bool(remark)
    ]


def sorting(names: Sequence[str]) -> str:
    """A remark where these names are sorted, and other tools would have sorted them otherwise; else empty."""
    as_text, as_timm = sorted(names), sorted(names, key=by_number)
    if as_text == as_timm or list(names) not in (as_text, as_timm):
        return ""
    start = max(0, next(k for k, (one, other) in enumerate(zip(as_text, as_timm, strict=True)) if one != other) - 1)
    text, timm = few(as_text[start:]), few(as_timm[start:])
    if list(names) == as_text:
        return f"class order sorted as text ({text}), as torchvision and Keras do; timm would count ({timm})"
    return f"class order sorted by number ({timm}), as timm does; torchvision and Keras would sort as text ({text})"


def by_number(name: str) -> list[str | int]:
    """The key that sorts 2 before 10, as timm sorts the folders of classes: `timm.utils.misc.natural_key`. It ignores capitals,
    too."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name.lower())]


def few(names: Sequence[str], limit: int = 5) -> str:
    """The first of the names."""
    return ", ".join(names[:limit]) + ", ..." * (len(names) > limit)


def some(names: Sequence[object], limit: int = 5) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(str(name) for name in names[:limit]) + more
