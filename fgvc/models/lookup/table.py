"""Table of the layers of all of timm's nets, and the search in it for those of a file, or nearly."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("timm.json.gz")
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """Nets of timm that have the same layers."""

    names: tuple[str, ...]
    fused: bool  # as they ship, their branches fused; else as they are trained
    stages: tuple[tuple[int, int], ...]  # channels and reduction of each of timm's feature_info
    layers: Counter[Shape]  # how many there are of each shape, but for the classifier


@dataclass(frozen=True, slots=True)
class Near:
    """An entry, and the number of layers by which a file differs from it."""

    entry: Entry
    differences: int  # layers that one of the two has alone, a changed one counted once


@cache
def timm_table() -> tuple[str, tuple[Entry, ...]]:
    """Read the table: the version of timm that it is of, and its entries."""
    read = json.loads(gzip.decompress(TABLE.read_bytes()))
    shapes = [tuple(shape) for shape in read["shapes"]]
    return read["timm"], tuple(
        Entry(
            tuple(net["names"]),
            net["fused"],
            tuple((channels, reduction) for channels, reduction in net["stages"]),
            Counter(shapes[number] for number in net["layers"]),
        )
        for net in read["nets"]
    )


def nearest(layers: Iterable[Shape], share: float = 0.1) -> list[Near]:
    """The entries of the same layers, in whatever order, or else those that differ in the fewest of them, a `share` of the
    file's at most (or two), from near to far."""
    own = Counter(layers)
    limit = max(2, int(share * own.total()))
    near = [
        Near(entry, max((own - entry.layers).total(), (entry.layers - own).total()))
        for entry in timm_table()[1]
        if abs(entry.layers.total() - own.total()) <= limit
    ]
    return sorted((net for net in near if net.differences <= limit), key=lambda net: net.differences)
