"""Damage that decoders ignore: a JPEG that ends early or lost bytes is filled up with grey, without an error.

A JPEG's compressed data do not say where they end in the picture. `_ends` therefore makes the picture taller in its header and
appends different bits to the data: pixels that depend on those bits were not in the file. After lost or changed bytes a decoder
is out of step, and almost never ends on the right block by chance.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SOI, _EOI, _SOS, _DRI, _DHT, _TEM = 0xD8, 0xD9, 0xDA, 0xDD, 0xC4, 0x01
_FRAMES = {0xC0: "baseline", 0xC1: "baseline", 0xC2: "progressive"}  # with Huffman codes; others are not checked
_APPENDED = (b"\x00", b"\xa5", b"\x5b\x3c")  # bits to append to the data: no byte of them begins a marker
_TALLER = 4  # rows of blocks by which a picture is made taller
_ZEROS = bytes(24)  # in compressed data: the trace of a failed copy
_SURPLUS = 6  # bytes at the end of a scan that its picture doesn't need, from which bytes were lost or changed before
_LEAST = 0.02  # share of an uncompressed picture's rows that must be blank


def damage(content: bytes) -> str:
    """The damage of a file that can be decoded, in words; empty if none is detected.

    JPEG and PNG are checked for missing or broken data, WebP for its length, BMP and uncompressed TIFF for rows of zeros at the
    end. A changed byte that leaves a JPEG's decoder in step is not detected."""
    if content[:3] == b"\xff\xd8\xff":
        return _jpeg_damage(content)
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return _png_damage(content)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "ends early" if 8 + int.from_bytes(content[4:8], "little") > len(content) else ""
    return _uncompressed_damage(content) if content[:4] in (b"II*\0", b"MM\0*") or content[:2] == b"BM" else ""


def _png_damage(content: bytes) -> str:
    at = 8
    while at + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        end = at + 8 + length
        if content[end : end + 4] != struct.pack(">I", zlib.crc32(content[at + 4 : end])):
            return f"a checksum is wrong (of its {kind.decode('latin-1')!r} chunk)" if _critical(kind) else ""
        if kind == b"IEND":
            return ""
        at = end + 4
    return "ends early"


def _critical(kind: bytes) -> bool:
    """Whether a picture depends on a chunk of a PNG: then the chunk's name begins with a capital."""
    return kind[:1].isupper()


@dataclass(slots=True)
class _Scan:
    """A scan of a JPEG: one pass over some coefficients of some components."""

    components: tuple[int, ...]
    first: int  # coefficients
    last: int
    low: int  # lower bits that later scans add
    end: int  # of its data, in the file
    breaks: list[tuple[int, int]]  # places of the restart markers within it, and their numbers
    refines: bool  # adds a bit to coefficients of earlier scans
    symbol: int  # symbol of AC coefficients with the first code, which is all zeros; 0 ends a block

    @property
    def dense(self) -> bool:
        """Whether zero bits code coefficients, not flat blocks."""
        return self.symbol != 0


@dataclass(slots=True)
class _Jpeg:
    """The frame of a JPEG and its scans."""

    kind: str = ""
    height: int = 0
    height_at: int = 0  # in the file
    width: int = 0
    factors: tuple[tuple[int, int, int], ...] = ()  # component, horizontal and vertical sampling
    interval: int = 0  # blocks of the interleaved data between restart markers; 0: none
    scans: tuple[_Scan, ...] = ()
    starts: tuple[int, ...] = ()  # of their data
    ended: bool = False

    @property
    def mcu(self) -> tuple[int, int]:
        """Width and height in pixels of a minimum coded unit."""
        return 8 * max(h for _, h, _ in self.factors), 8 * max(v for _, _, v in self.factors)


def _jpeg_damage(content: bytes) -> str:
    try:
        jpeg = _parsed(content)
    except (IndexError, struct.error):
        return "its segments are broken"
    if not jpeg.kind or not jpeg.height or not jpeg.scans:
        return ""
    if not jpeg.ended:
        return "has no end mark"
    if missing := _incomplete(jpeg):
        return missing
    if jpeg.interval and len(jpeg.scans) == 1:
        across, down = jpeg.mcu
        blocks = -(-jpeg.width // across) * -(-jpeg.height // down)
        restarts = [number for _, number in jpeg.scans[0].breaks]
        if restarts != [number % 8 for number in range(-(-blocks // jpeg.interval) - 1)]:
            return "some of its data are missing, or out of order"
    if any(
        _zeroless(jpeg, scan) and _ZEROS in content[start : scan.end]
        for scan, start in zip(jpeg.scans, jpeg.starts, strict=True)
    ):
        return "has zeros in the place of some of its data"
    return _ends(content, jpeg) or _surplus(content, jpeg)


def _parsed(content: bytes) -> _Jpeg:
    """The frame and scans of the first picture in a file. Raises IndexError or struct.error if the file ends within them."""
    jpeg, scans, starts, at = _Jpeg(), list[_Scan](), list[int](), 2
    zeros: dict[int, int] = {}  # table of AC coefficients -> the symbol of the code of all zeros
    while at < len(content):
        if content[at] != 0xFF:
            break
        while content[at] == 0xFF:
            at += 1
        marker = content[at]
        at += 1
        if marker == _EOI:
            jpeg.ended = True
            break
        if marker == _TEM or 0xD0 <= marker <= _SOI:
            continue
        (length,) = struct.unpack_from(">H", content, at)
        body = content[at + 2 : at + length]
        if marker in _FRAMES and not jpeg.kind:
            _, height, width, count = struct.unpack_from(">BHHB", body)
            jpeg.kind, jpeg.height, jpeg.width, jpeg.height_at = _FRAMES[marker], height, width, at + 3
            jpeg.factors = tuple((body[6 + 3 * k], body[7 + 3 * k] >> 4, body[7 + 3 * k] & 15) for k in range(count))
        elif marker == _DRI:
            (jpeg.interval,) = struct.unpack_from(">H", body)
        elif marker == _DHT:
            zeros |= _zero_codes(body)
        at += length
        if marker == _SOS:
            components = tuple(body[1 + 2 * k] for k in range(body[0]))
            first, last, bits = body[1 + 2 * body[0] : 4 + 2 * body[0]]
            end, breaks = _scan_end(content, at)
            symbol = zeros.get(body[2] & 15, 0)
            scans.append(_Scan(components, first, last, bits & 15, end, breaks, bits >> 4 > 0, symbol))
            starts.append(at)
            at = end
    jpeg.scans, jpeg.starts = tuple(scans), tuple(starts)
    return jpeg


def _zero_codes(tables: bytes) -> dict[int, int]:
    """The symbol with the all-zero code of each AC table in a segment; 0 ends a block."""
    symbols, at = {}, 0
    while at + 17 < len(tables):
        if tables[at] >> 4 == 1:
            symbols[tables[at] & 15] = tables[at + 17]
        at += 17 + sum(tables[at + 1 : at + 17])
    return symbols


def _scan_end(content: bytes, at: int) -> tuple[int, list[tuple[int, int]]]:
    """The place of the next marker that is no restart marker, and the restart markers before it; each from its first 0xFF."""
    breaks = []
    while (at := content.find(b"\xff", at)) >= 0 and at + 1 < len(content):
        after = at + 1
        while content[after : after + 1] == b"\xff":
            after += 1
        code = content[after] if after < len(content) else 0
        if 0xD0 <= code <= 0xD7:
            breaks.append((at, code - 0xD0))
        elif code:
            return at, breaks
        at = after + 1
    return len(content), breaks


def _zeroless(jpeg: _Jpeg, scan: _Scan) -> bool:
    """Whether _ZEROS can't occur in a scan's data: they would be one small coefficient after the other."""
    if jpeg.kind == "baseline":
        return scan.dense
    return scan.first > 0 and not scan.refines and scan.symbol & 15 != 0  # else a run of flat blocks, or bits that are all 0


def _incomplete(jpeg: _Jpeg) -> str:
    """A message if scans are missing: every component needs each of its 64 coefficients down to the last bit."""
    bits = {component: [1] * 64 for component, _, _ in jpeg.factors}
    for scan in jpeg.scans:
        for component in scan.components:
            if component in bits and scan.last < 64:
                width = scan.last + 1 - scan.first
                bits[component][scan.first : scan.last + 1] = [scan.low] * width
    return "" if not any(map(any, bits.values())) else "ends early: some of its passes are missing"


def _ends(content: bytes, jpeg: _Jpeg) -> str:
    """A message if the data end before the picture does."""
    _, down = jpeg.mcu
    whole = -(-jpeg.height // down) * down
    # One pixel per block is enough if a block's data are in one place: all of its rows are in step, or none.
    single = len(jpeg.scans) == 1 and jpeg.kind == "baseline"
    scale = 8 if single and min(jpeg.width, jpeg.height) >= 16 else 1
    taller = jpeg.height if jpeg.interval else min(whole + _TALLER * down, 65535)  # bits after a restart interval are skipped
    pictures = list(_decoded(content, jpeg, taller, scale))
    if len(pictures) < len(_APPENDED):
        return "its data are broken"
    rows = jpeg.height // scale - 2 * (scale == 1)  # colours of the last rows are mixed with those below
    original = np.stack([picture[:rows] for picture in pictures])  # the rows of the picture as it was
    differ: NDArray[np.bool_] = np.any(original != original[0], axis=(0, 3))
    if rows > 0 and differ.any():
        share = f"{1 - int(differ.any(axis=1).argmax()) / rows:.0%}"
        return "some of its data end early" if jpeg.interval else f"its data end early: the lower {share} are filled up"
    return ""


def _surplus(content: bytes, jpeg: _Jpeg) -> str:
    """A message if the picture is complete before its data end. A repeated last byte, with which some cameras pad, is no data."""
    if jpeg.kind != "baseline" or len(jpeg.scans) > 1 or jpeg.interval or not jpeg.scans[0].dense:
        return ""
    start, end = jpeg.starts[0], jpeg.scans[0].end
    data = content[start:end]
    data = data.rstrip(data[-1:]) + data[-1:]
    if len(data) < 4 * _SURPLUS:
        return ""
    shortened = content[:start] + data[: -_SURPLUS].rstrip(b"\xff")
    # The whole of the last blocks is compared, even where the picture cuts them.
    across, down = jpeg.mcu
    whole = replace(
        jpeg, width=-(-jpeg.width // across) * across, scans=(replace(jpeg.scans[0], end=len(shortened)),)
    )
    for scale in (8, 1):  # the first is quick, but shows no details
        pictures = list(_decoded(shortened, whole, -(-jpeg.height // down) * down, scale))
        if len(pictures) < len(_APPENDED) or any(not np.array_equal(picture, pictures[0]) for picture in pictures):
            return ""
    return "has more data than its picture takes: bytes were lost or changed"


def _decoded(content: bytes, jpeg: _Jpeg, height: int, scale: int) -> Iterator[NDArray[np.uint8]]:
    """The picture decoded as if it were `height` tall, once for each of _APPENDED after the data of each scan, until an error."""
    for bits in _APPENDED:
        appended = (bits * (1 + 4096 // len(bits)))[:4096] * (1 + jpeg.width // 4096)
        pieces, start = [], 0
        for end in (at for scan in jpeg.scans for at in (*(at for at, _ in scan.breaks), scan.end)):
            pieces += [content[start:end], appended[: 64 if jpeg.interval else None]]
            start = end
        whole = bytearray(b"".join([*pieces, b"\xff\xd9" if len(jpeg.scans) == 1 else content[start:]]))
        struct.pack_into(">HH", whole, jpeg.height_at, height, jpeg.width)
        try:
            with Image.open(BytesIO(whole), formats=["JPEG"]) as image:
                if scale > 1:
                    image.draft(None, (image.width // scale, image.height // scale))
                yield np.asarray(image.convert("RGB"))
        except Exception:
            return


def _uncompressed_damage(content: bytes) -> str:
    """A message if the last rows of an uncompressed picture are zeros with a sharp border, as a broken copy leaves them.

    Blank rows at both ends are taken for a drawn frame."""
    with Image.open(BytesIO(content), formats=["TIFF", "BMP"]) as image:
        if image.info.get("compression", "raw") not in ("raw", 0):
            return ""
        pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    blank = np.array([not row.any() for row in pixels], np.bool_)
    if blank.all() or (blank[0] and blank[-1]) or not (blank[0] or blank[-1]):
        return ""
    rows = pixels if blank[-1] else pixels[::-1]
    count = int((blank if blank[-1] else blank[::-1])[::-1].argmin())  # at the end
    if count < max(2, _LEAST * len(rows)) or len(rows) - count < 3:
        return ""
    before = rows[len(rows) - count - 2].reshape(rows.shape[1], -1)  # the row between may have broken off
    return f"the last {count / len(rows):.0%} of its rows are zeros" if before.any(axis=1).mean() > 0.95 else ""
