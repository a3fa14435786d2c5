"""What `fgvc localize` wrote into a run, as tables: whatever numbers there are, so that a new one needs no change here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgvc.train.run import measured

Tree = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """`columns`: empty where each row has one cell, without a name."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def localisation(run: Path) -> list[Table] | None:
    """The tables of `<run>/localisation.json`; None where there is no such file. Raises FgvcError where it is broken."""
    tree = measured(run, "localisation.json")
    return [table for key, numbers in tree.items() for table in _tables(key, numbers)] or None


def _tables(title: str, numbers: Tree) -> list[Table]:
    """The numbers of one part of the data: a table of its own for each tree among them."""
    title = title.replace(".", " · ")
    trees = {key: value for key, value in numbers.items() if isinstance(value, Mapping)}
    single = {key: value for key, value in numbers.items() if key not in trees and value is not None}
    found = [_table(title, single)] if single else []
    return found + [_table(f"{title}: {key}", tree) for key, tree in trees.items() if tree]


def _table(title: str, tree: Tree) -> Table:
    """A tree of trees has a column for each of these; any other has one cell a row."""
    if not all(isinstance(value, Mapping) for value in tree.values()):
        return Table(title, (), tuple((_words(key), (_said(value),)) for key, value in tree.items()))
    keys = dict.fromkeys(key for column in tree.values() for key in column)
    rows = tuple((_words(key), tuple(_said(column.get(key, "")) for column in tree.values())) for key in keys)
    return Table(title, tuple(map(_words, tree)), rows)


def _words(key: str) -> str:
    return key.replace("_", " ")


def _said(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_said, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
