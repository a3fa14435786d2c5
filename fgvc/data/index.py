"""The labelled images of a set, as columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fgvc.config.data import SPLITS, Split
from fgvc.config.images import MAX_PIXELS
from fgvc.images.decode import Picture, read_content, read_picture
from fgvc.io.display import Display


class Contents(Protocol):
    """Images that are no files below the set's root, by the names that the index has in the place of paths."""

    stamp: str  # changes with the contents

    def source(self, name: str) -> Path | bytes:
        """The file of an image, or what would be in it. Raises ImageError where there is neither."""

    def size(self, name: str) -> int:
        """Bytes of it; -1 where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ImageIndex(Display):
    """A labelled set of images as columns (N rows), not as N objects: a million rows fit in some 100 MB and
    workers that fork share them without copying (numpy's strings carry no reference counts)."""

    root: Path
    classes: tuple[str, ...]  # the position is the class number, in training, in the bundle and in every report
    paths: np.ndarray  # (N,) numpy StringDType: relative to root, "/" as separator
    labels: np.ndarray  # (N,) int32 in [0, K)
    splits: np.ndarray  # (N,) int8: position in SPLITS
    given_splits: tuple[Split, ...] = ()  # of validation and test, those that the set brings along; fgvc draws the others
    unseen: str = ""  # which images, where validation and test are those that the deployed classifier was not trained on
    joined: int = 0  # images that went to the split of their near copies
    groups: np.ndarray | None = None  # (N,) StringDType: rows of one group never straddle a split
    # Both in pixels of the image as stored; fgvc.images.upright turns them with the image by its EXIF orientation.
    boxes: np.ndarray | None = None  # (N,4) float32: left, top, width, height, as in CUB's tables; see `corners`
    parts: np.ndarray | None = None  # (N,P,3) float32: x, y, visible
    part_names: tuple[str, ...] = ()
    recognised: str = ""  # one line for people: the detected layout and the rule of the splits
    warnings: tuple[str, ...] = ()  # a line each: files that were left out, or are suspicious
    max_pixels: int = MAX_PIXELS  # of an image that is read
    contents: Contents | None = None  # of images that are no files

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, split: Split) -> np.ndarray:
        """Row numbers (int64, ascending) of one split."""
        return np.flatnonzero(self.splits == SPLITS.index(split))

    def path(self, row: int) -> Path:
        """The file of a row, or its name in messages."""
        return self.root / str(self.paths[row])

    def corners(self, rows: int | np.ndarray) -> NDArray[np.float64]:
        """Boxes (...,4) of the rows (...) as left, top, right, bottom (`fgvc.images.preprocess.Box`), in pixels as stored."""
        assert self.boxes is not None
        left_top, sides = np.split(self.boxes[rows].astype(np.float64), 2, axis=-1)
        return np.concatenate([left_top, left_top + sides], axis=-1)

    def source(self, row: int) -> Path | bytes:
        """The file of a row, or what would be in it. Raises ImageError where it is known to be missing."""
        return self.path(row) if self.contents is None else self.contents.source(str(self.paths[row]))

    def content(self, row: int) -> bytes:
        """All bytes of the row's file. Raises ImageError."""
        source = self.source(row)
        return read_content(source) if isinstance(source, Path) else source

    def picture(self, row: int, content: bytes | None = None) -> Picture:
        """The decoded picture of a row (of its `content`, if that was read before), under the set's limit of pixels. Raises
        ImageError as `decode` does."""
        source = self.source(row) if content is None else content
        return read_picture(source, max_pixels=self.max_pixels, name=self.path(row))

    @property
    def facts(self) -> Mapping[str, object]:
        return {"": self.root, "images": len(self), "classes": len(self.classes)}


def spread(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Select up to `count` of the rows (N,), evenly over all of them."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64)] if len(rows) else rows


def decode_row(index: ImageIndex, row: int) -> Image.Image:
    """The decoded image of a row, under the set's limit of pixels. Raises ImageError as `decode` does."""
    return index.picture(row).image
