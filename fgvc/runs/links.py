"""The names `last` and `best` of a run's checkpoints: links that lead through one folder, which is replaced in one step."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path

from fgvc.io.files import make_folder, remove, replace_link, sync

LINKS = "links"


def publish(folder: Path, *, last: str, best: str | None) -> None:
    """Point `last` and `best` at these checkpoints at the same moment."""
    if not (folder / LINKS).exists() and (before := leads_to(folder / "last")) is not None:
        _replace_links(folder, last=before, best=leads_to(folder / "best"))  # links of an earlier fgvc led straight there
    _replace_links(folder, last=last, best=best)


def _replace_links(folder: Path, *, last: str, best: str | None) -> None:
    new = free_path(folder, LINKS + "-1")
    make_folder(new)
    targets = {"last": last, "best": best} if best is not None else {"last": last}
    for name, target in targets.items():
        replace_link(new / name, f"../{target}")
    sync(new)
    if (folder / LINKS).exists():  # or the names would lead nowhere meanwhile
        _link_through(folder, targets)
    replace_link(folder / LINKS, new.name)
    _link_through(folder, targets)
    if best is None:
        remove(folder / "best")
    sync(folder)
    for path in folder.glob(f"{LINKS}-*"):
        if path.name != new.name:
            remove(path)


def _link_through(folder: Path, names: Mapping[str, str]) -> None:
    for name in names:
        link, through = folder / name, f"{LINKS}/{name}"
        if not link.is_symlink() or str(link.readlink()) != through:
            replace_link(link, through)


def leads_to(link: Path) -> str | None:
    """Name of the checkpoint that a link leads to; None where it leads to none."""
    path = resolved(link)
    return path.name if path.is_dir() and path.parent == link.parent.resolve() and path.name != link.name else None


def resolved(link: Path) -> Path:
    """Path that a link leads to; the link itself where it leads round in a circle."""
    try:
        return link.resolve()
    except RuntimeError:  # Python 3.12 and older
        return link


def free_path(folder: Path, name: str) -> Path:
    """The first of NAME, NAME.1, NAME.2, ... that does not exist in a folder."""
    names = chain([name], (f"{name}.{number}" for number in count(1)))
    return next(folder / name for name in names if not os.path.lexists(folder / name))
