"""Names that users gave, where they have to fit: on a line, as the name of a file, beside another of the same name."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from fgvc.types import FgvcError

LONGEST = 200  # bytes of a result's name: file systems take 255, with what is put before and behind
BREAKING = ("Cc", "Cs", "Zl", "Zp")  # Unicode's control characters, halves of characters, and ends of lines


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
