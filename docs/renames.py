"""What had another name before the packages were laid out anew: print it, or put scripts, recipes and tables right.

    python docs/renames.py                 # old and new names, one a line
    python docs/renames.py FILE...         # rewrite in place

In Python files imports and dotted names are rewritten (docs/renames.csv: modules, and functions and classes that lie in another
module or are called otherwise). Keys of recipes (docs/renamed_keys.csv) are rewritten where they are written in full, as in
overrides (`optim.clip_norm=1`), and in YAML files where they are a key of their section.
"""

from __future__ import annotations

import ast
import csv
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml


def names(table: str = "renames.csv") -> dict[str, str]:
    with Path(__file__).with_name(table).open(encoding="utf-8", newline="") as stream:
        return {row["old"]: row["new"] for row in csv.DictReader(stream)}


def keys() -> dict[str, str]:
    return names("renamed_keys.csv")


def with_keys(text: str, new: Mapping[str, str], *, recipe: bool) -> str:
    """A text with today's keys. `recipe`: it is YAML, and its sections' own keys are rewritten, too."""
    text = re.sub(rf"\b({'|'.join(map(re.escape, new))})\b", lambda match: new[match[1]], text)
    if not recipe:
        return text
    marks: list[tuple[int, str, str]] = []  # where a key begins, what it is, what it becomes

    def walk(node: yaml.Node | None, section: str) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if (full := f"{section}.{key.value}") in new:
                marks.append((key.start_mark.index, key.value, new[full].partition(".")[2]))
            walk(value, str(key.value))

    for document in yaml.compose_all(text, Loader=yaml.SafeLoader):
        walk(document, "")
    for at, old, name in sorted(marks, reverse=True):
        text = text[:at] + text[at:].replace(old, name, 1)
    return text


def rewritten(text: str, new: Mapping[str, str]) -> str:
    """The text of a script with today's names. What imports under another name than before keeps the one that the script uses."""
    lines = text.split("\n")
    for node in sorted(ast.walk(ast.parse(text)), key=lambda node: -getattr(node, "lineno", 0)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fgvc":
            moved = [_moved(str(node.module), alias, new) for alias in node.names]
            if moved != [(node.module, alias.name, alias.asname) for alias in node.names]:
                pad = " " * node.col_offset
                lines[node.lineno - 1 : node.end_lineno] = [
                    f"{pad}from {module} import {name}" + (f" as {own}" if own else "") for module, name, own in moved
                ]
    # Longest first; a module that is a package now would match the names below it, which are new already.
    names = [re.escape(old) + (r"(?!\.)" if new[old].startswith(f"{old}.") else "") for old in sorted(new, key=len, reverse=True)]
    pattern = re.compile(rf"(?<!from )\b({'|'.join(names)})\b")
    return pattern.sub(lambda found: new[found[1]], "\n".join(lines))


def _moved(module: str, alias: ast.alias, new: Mapping[str, str]) -> tuple[str, str, str | None]:
    """Module, name and `as` of an import."""
    whole = f"{module}.{alias.name}"
    if whole in new:
        place, _, name = new[whole].rpartition(".")
        return place, name, alias.asname or (alias.name if name != alias.name else None)
    return new.get(module, module), alias.name, alias.asname


def main(files: list[str]) -> None:
    new = names()
    if not files:
        for old, now in (new | keys()).items():
            print(f"{old} -> {now}")
    for path in map(Path, files):
        before = path.read_text(encoding="utf-8")
        after = rewritten(before, new) if path.suffix == ".py" else before
        after = with_keys(after, keys(), recipe=path.suffix in (".yaml", ".yml"))
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"{path}: written")


if __name__ == "__main__":
    main(sys.argv[1:])
