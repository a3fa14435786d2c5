"""Packing of which of N images were right into a cell of a table."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pack(right: NDArray[np.bool_]) -> str:
    """Pack booleans (N,) into bits, the first one the highest, as hexadecimal digits."""
    return np.packbits(right).tobytes().hex()


def unpack(text: str, images: int) -> NDArray[np.bool_]:
    """Unpack the booleans (N,) that `pack` packed; N = `images`."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=images).astype(np.bool_)
