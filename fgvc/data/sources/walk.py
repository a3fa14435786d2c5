"""Listing of the files below class folders, behind links as well, but never those of another class.

Each directory is listed once, and only links are `stat`ed, which makes a million files affordable.
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
from fgvc.io.places import is_run_folder


@dataclass(frozen=True, slots=True)
class ClassFolder:
    """The folder of a class in one split; `split_folder`: the folder above it, below root, or ""."""

    root: Path
    split_folder: str
    name: str

    def __str__(self) -> str:
        return f"{self.split_folder}/{self.name}" if self.split_folder else self.name

    @property
    def path(self) -> str:
        return f"{self.root}/{self}"


class Walk:
    """Lists class folders, and records the links it followed."""

    def __init__(self, places: Sequence[ClassFolder]) -> None:
        """Take the class folders to list. Raises FgvcError if links make two of them the same, or put one into another."""
        self._home = {place: os.path.realpath(place.path) for place in places}
        self._owner: dict[str, ClassFolder] = {}  # of a real folder that is a class folder
        for place, home in self._home.items():
            if (other := self._owner.setdefault(home, place)) is not place:
                raise FgvcError(f"{place.root}: {other}/ and {place}/ are one folder, {home}: remove the link")
        self._above: set[str] = set()  # real folders that hold class folders
        for place, home in self._home.items():
            above = [*_upwards(os.path.dirname(home)), *_upwards(os.path.realpath(place.root))]
            if holder := next((self._owner[folder] for folder in above if folder in self._owner), None):
                held = f"{place}/" if _within(home, self._home[holder]) else "the whole set"
                raise FgvcError(f"{place.root}: {holder}/ holds {held}, by a link ({self._home[holder]}): remove it")
            self._above.update(above)
        self._walked: dict[str, ClassFolder] = {}  # real folder -> the first class folder that leads there
        self._shared: list[tuple[ClassFolder, ClassFolder, str]] = []  # two that lead to one folder, and the path to it
        self._linked: dict[str, list[tuple[ClassFolder, str]]] = {}  # real file -> class folders with links to it, the links
        self._refused: list[str] = []  # links that are not followed
        self._again = 0
        self._runs: list[str] = []

    def images(self, place: ClassFolder) -> Iterator[tuple[list[str], Counter[str]]]:
        """List the images of the class folder and of each folder below it: sorted paths relative to root, and other files counted
        by suffix."""
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
        """Whether to follow a link: to a folder of this class alone, which isn't listed anyway."""
        real = os.path.realpath(link)
        if _listed(real, self._home[place]):
            return False
        owner = next((self._owner[folder] for folder in _upwards(real) if folder in self._owner), place)
        if real in self._above or owner is not place:
            self._refused.append(f"{link} -> {real}")
            return False
        return True

    def _first(self, place: ClassFolder, link: str) -> bool:
        """Whether a link to a file adds an image that the class does not have yet."""
        real = os.path.realpath(link)
        linking = self._linked.setdefault(real, [])
        listed = _listed(real, self._home[place]) and real.lower().endswith(SUFFIXES)
        again = listed or any(other is place for other, _ in linking)
        linking.append((place, link))
        self._again += again
        return not again

    def refuse_shared(self) -> None:
        """Raise FgvcError if two classes lead to the same real folder."""
        if mixed := [(a, b, where) for a, b, where in self._shared if a.name != b.name]:
            listed = some([f"{where} ({a}/ and {b}/)" for a, b, where in mixed], 3)
            raise FgvcError(f"{mixed[0][0].root}: two classes reach the same files by links: {listed}; remove one of the links")

    def warnings(self) -> list[str]:
        """Warnings of links, and of pictures of runs that were left out."""
        texts = []
        if self._runs:
            texts.append(f"the pictures of runs of fgvc are no images of the set, and left out: {some(self._runs, 3)}")
        if self._refused:
            texts.append(
                f"{len(self._refused)} links lead to a folder above or to another class; they are not followed: "
                f"{some(self._refused, 3)}"
            )
        if self._again:
            texts.append(f"{self._again} links are to images that their class has already; they are left out")
        pairs = [*self._shared, *self._same_files()]
        for kind, attribute in (("classes", "name"), ("splits", "split_folder")):
            if across := [(a, b, where) for a, b, where in pairs if getattr(a, attribute) != getattr(b, attribute)]:
                listed = some([f"{where} ({a}/ and {b}/)" for a, b, where in across], 3)
                texts.append(f"{len(across)} links bring the same images into two {kind}: {listed}; remove one of each")
        return texts

    def _same_files(self) -> Iterator[tuple[ClassFolder, ClassFolder, str]]:
        """Pairs of class folders that list the same file, at least one of them by a link, with the link."""
        for real, linking in self._linked.items():
            owner = self._walked.get(os.path.dirname(real)) if real.lower().endswith(SUFFIXES) else None
            first = owner or linking[0][0]
            yield from ((first, other, link) for other, link in linking if other is not first)


def _upwards(path: str) -> Iterator[str]:
    """A folder and all folders above it."""
    while True:
        yield path
        if path == (path := os.path.dirname(path)):
            return


def _listed(real: str, home: str) -> bool:
    """Whether a real path is listed below `home` without following links."""
    return _within(real, home) and "/." not in real[len(home) :]


def _within(path: str, folder: str) -> bool:
    """Whether a real path is `folder` or lies below it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def folders_in(folder: Path) -> list[str]:
    """Sorted names of the folders in a folder, without hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def loose_images(folder: Path) -> int:
    """Number of images in a folder itself, without those below."""
    with os.scandir(folder) as entries:
        return sum(
            entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and not entry.is_dir()
            for entry in entries
        )
