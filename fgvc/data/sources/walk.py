"""The files below class folders, behind links as well, but never those of another class.

One directory listing each and no `stat` of files but of links, which is what makes a million of them affordable.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fgvc.errors import FgvcError
from fgvc.images.suffix import SUFFIXES, suffix_of
from fgvc.io.names import some


@dataclass(frozen=True, slots=True)
class ClassFolder:
    """One folder of one class; `part`: the folder above it, below root, or ""."""

    root: Path
    part: str
    name: str

    def __str__(self) -> str:
        return f"{self.part}/{self.name}" if self.part else self.name

    @property
    def path(self) -> str:
        return f"{self.root}/{self}"


class Walk:
    """Walks class folders, and remembers where it came by links."""

    def __init__(self, places: Sequence[ClassFolder]) -> None:
        """Raises FgvcError where links make two class folders one, or put one into another."""
        self._home = {place: os.path.realpath(place.path) for place in places}
        self._owner: dict[str, ClassFolder] = {}  # of a real folder that is a class folder
        for place, home in self._home.items():
            if (other := self._owner.setdefault(home, place)) is not place:
                raise FgvcError(f"{place.root}: {other}/ and {place}/ are one folder, {home}: remove the link")
        self._above: set[str] = set()  # real folders that hold class folders
        for place, home in self._home.items():
            above = [*_upwards(os.path.dirname(home)), *_upwards(os.path.realpath(place.root))]
            if holder := next((self._owner[folder] for folder in above if folder in self._owner), None):
                what = f"{place}/" if _within(home, self._home[holder]) else "the whole set"
                raise FgvcError(f"{place.root}: {holder}/ holds {what}, by a link ({self._home[holder]}): remove it")
            self._above.update(above)
        self._walked: dict[str, ClassFolder] = {}  # real folder -> the first class that came there
        self._shared: list[tuple[ClassFolder, ClassFolder, str]] = []  # two that came to one folder, and by which name
        self._linked: dict[str, list[tuple[ClassFolder, str]]] = {}  # real file -> who links to it, and by which name
        self._refused: list[str] = []  # links that were not followed
        self._again = 0
        self._runs: list[str] = []

    def images(self, place: ClassFolder) -> Iterator[tuple[list[str], Counter[str]]]:
        """For the class folder and all below it: the images' paths relative to root, sorted, and the suffixes of other files."""
        waiting = [str(place)]
        while waiting:
            folder = waiting.pop()
            full = f"{place.root}/{folder}"
            real = os.path.realpath(full)
            if (first := self._walked.get(real)) is place:
                continue
            if first is None:
                self._walked[real] = place
            else:
                self._shared.append((first, place, full))
            images, below, others = [], [], Counter[str]()
            with os.scandir(full) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
                if is_run_folder({entry.name for entry in listed}):
                    self._runs.append(folder)
                    continue
                for entry in listed:
                    name = f"{folder}/{entry.name}"
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        if not entry.is_symlink() or self._follow(place, entry.path):
                            below.append(name)
                    elif not entry.name.lower().endswith(SUFFIXES):
                        others[suffix_of(entry.name)] += 1
                    elif not entry.is_symlink() or self._first(place, entry.path):
                        images.append(name)
            waiting += reversed(below)
            yield images, others

    def _follow(self, place: ClassFolder, link: str) -> bool:
        """Whether a link leads to a folder of this class alone, which is not listed by its own name."""
        real = os.path.realpath(link)
        if _listed(real, self._home[place]):
            return False
        owner = next((self._owner[folder] for folder in _upwards(real) if folder in self._owner), place)
        if real in self._above or owner is not place:
            self._refused.append(f"{link} -> {real}")
            return False
        return True

    def _first(self, place: ClassFolder, link: str) -> bool:
        """Whether a link to a file brings the class an image that it does not have yet."""
        real = os.path.realpath(link)
        who = self._linked.setdefault(real, [])
        own = _listed(real, self._home[place]) and real.lower().endswith(SUFFIXES)
        again = own or any(other is place for other, _ in who)
        who.append((place, link))
        self._again += again
        return not again

    def refuse_shared(self) -> None:
        """Raise FgvcError where two classes came to the same real folder."""
        if mixed := [(a, b, where) for a, b, where in self._shared if a.name != b.name]:
            listed = some([f"{where} ({a}/ and {b}/)" for a, b, where in mixed], 3)
            raise FgvcError(f"{mixed[0][0].root}: two classes reach the same files by links: {listed}; remove one of the links")

    def warnings(self) -> list[str]:
        """What people should know of the links that there were."""
        found = []
        if self._runs:
            found.append(f"the pictures of runs of fgvc are no images of the set, and left out: {some(self._runs, 3)}")
        if self._refused:
            found.append(
                f"{len(self._refused)} links lead to a folder above or to another class; they are not followed: "
                f"{some(self._refused, 3)}"
            )
        if self._again:
            found.append(f"{self._again} links are to images that their class has already; they are left out")
        pairs = [*self._shared, *self._same_files()]
        for what, of in (("classes", "name"), ("parts", "part")):
            if across := [(a, b, where) for a, b, where in pairs if getattr(a, of) != getattr(b, of)]:
                listed = some([f"{where} ({a}/ and {b}/)" for a, b, where in across], 3)
                found.append(f"{len(across)} links bring the same images into two {what}: {listed}; remove one of each")
        return found

    def _same_files(self) -> Iterator[tuple[ClassFolder, ClassFolder, str]]:
        """Two class folders that list one file, at least one of them by a link."""
        for real, who in self._linked.items():
            owner = self._walked.get(os.path.dirname(real)) if real.lower().endswith(SUFFIXES) else None
            first = owner or who[0][0]
            yield from ((first, other, link) for other, link in who if other is not first)


def is_run_folder(names: set[str]) -> bool:
    """Whether a folder of these files is a run of fgvc, begun now or by an earlier version."""
    return "config.yaml" in names and not names.isdisjoint({".lock", "ckpt"})


def _upwards(path: str) -> Iterator[str]:
    """A folder and all above it."""
    while True:
        yield path
        if path == (path := os.path.dirname(path)):
            return


def _listed(real: str, home: str) -> bool:
    """Whether a walk of `home` comes to a real path without any link."""
    return _within(real, home) and "/." not in real[len(home) :]


def _within(path: str, folder: str) -> bool:
    """Whether a real path is a folder, or lies below it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def folders_in(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones left out."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def loose_images(folder: Path) -> int:
    """Images in a folder itself."""
    with os.scandir(folder) as entries:
        return sum(
            entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and not entry.is_dir()
            for entry in entries
        )
