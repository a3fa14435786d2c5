"""Damage that decoders pass over in silence: a JPEG that ends early or lost bytes is filled up with grey, and reads as good.

A JPEG's compressed data do not say where they end in the picture, but a decoder finds out: `_ends` makes the picture taller in
its header and puts other bits behind the data. What depends on those bits was not in the file. Where bytes were lost or changed,
a decoder falls out of step, and as good as never ends on the right block by chance.
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
_FRAMES = {0xC0: "baseline", 0xC1: "baseline", 0xC2: "progressive"}  # with Huffman codes; others are not looked into
_BEHIND = (b"\x00", b"\xa5", b"\x5b\x3c")  # bits to put behind the data: no byte of them begins a marker
_TALLER = 4  # rows of blocks that a picture is made taller by
_ZEROS = bytes(24)  # in compressed data: what a failed copy leaves
_LEFT = 6  # bytes of a scan that nothing needs, from which its decoder has lost or won some on the way
_LEAST = 0.02  # share of an uncompressed picture's rows that must be blank


def damage(content: bytes) -> str:
    """What is wrong with a file that decodes; empty where nothing is known to be. Tells of JPEG, PNG, WebP and TIFF, and of BMP
    and uncompressed TIFF where their pixels end in zeros; a changed byte that leaves all in step can't be told."""
    if content[:3] == b"\xff\xd8\xff":
        return _of_jpeg(content)
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return _of_png(content)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "ends early" if 8 + int.from_bytes(content[4:8], "little") > len(content) else ""
    return _of_plain(content) if content[:4] in (b"II*\0", b"MM\0*") or content[:2] == b"BM" else ""


def _of_png(content: bytes) -> str:
    at = 8
    while at + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        end = at + 8 + length
        if content[end : end + 4] != struct.pack(">I", zlib.crc32(content[at + 4 : end])):
            return f"a checksum is wrong (of its {kind.decode('latin-1')!r} part)" if _counts(kind) else ""
        if kind == b"IEND":
            return ""
        at = end + 4
    return "ends early"


def _counts(kind: bytes) -> bool:
    """Whether a picture depends on that part of a PNG: its name begins with a capital."""
    return kind[:1].isupper()


@dataclass(slots=True)
class _Scan:
    components: tuple[int, ...]
    first: int  # coefficients
    last: int
    low: int  # bits that are still to come
    end: int  # of its data, in the file
    breaks: list[tuple[int, int]]  # where restart markers are within it, and their numbers
    refines: bool  # adds a bit to what is there
    symbol: int  # of AC coefficients, which has the first code, of zeros alone; 0 ends a block

    @property
    def dense(self) -> bool:
        """Zeros are no flat blocks."""
        return self.symbol != 0


@dataclass(slots=True)
class _Jpeg:
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
        """Width and height in pixels of what is coded together."""
        return 8 * max(h for _, h, _ in self.factors), 8 * max(v for _, _, v in self.factors)


def _of_jpeg(content: bytes) -> str:
    try:
        found = _parsed(content)
    except (IndexError, struct.error):
        return "its parts are broken"
    if not found.kind or not found.height or not found.scans:
        return ""
    if not found.ended:
        return "has no end mark"
    if missing := _incomplete(found):
        return missing
    if found.interval and len(found.scans) == 1:
        across, down = found.mcu
        blocks = -(-found.width // across) * -(-found.height // down)
        restarts = [number for _, number in found.scans[0].breaks]
        if restarts != [number % 8 for number in range(-(-blocks // found.interval) - 1)]:
            return "parts of its data are missing, or out of order"
    if any(
        _zeroless(found, scan) and _ZEROS in content[start : scan.end]
        for scan, start in zip(found.scans, found.starts, strict=True)
    ):
        return "has zeros in the place of some of its data"
    return _ends(content, found) or _leaves(content, found)


def _parsed(content: bytes) -> _Jpeg:
    """The frame and scans of the first picture in the file. Raises IndexError and struct.error where it breaks off."""
    found, scans, starts, at = _Jpeg(), list[_Scan](), list[int](), 2
    zeros: dict[int, int] = {}  # table of AC coefficients: what a code of zeros alone means
    while at < len(content):
        if content[at] != 0xFF:
            break
        while content[at] == 0xFF:
            at += 1
        marker = content[at]
        at += 1
        if marker == _EOI:
            found.ended = True
            break
        if marker == _TEM or 0xD0 <= marker <= _SOI:
            continue
        (length,) = struct.unpack_from(">H", content, at)
        body = content[at + 2 : at + length]
        if marker in _FRAMES and not found.kind:
            _, height, width, count = struct.unpack_from(">BHHB", body)
            found.kind, found.height, found.width, found.height_at = _FRAMES[marker], height, width, at + 3
            found.factors = tuple((body[6 + 3 * k], body[7 + 3 * k] >> 4, body[7 + 3 * k] & 15) for k in range(count))
        elif marker == _DRI:
            (found.interval,) = struct.unpack_from(">H", body)
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
    found.scans, found.starts = tuple(scans), tuple(starts)
    return found


def _zero_codes(tables: bytes) -> dict[int, int]:
    """Of each AC table in a segment the symbol that has the first code, which is of zeros; 0 ends a block."""
    found, at = {}, 0
    while at + 17 < len(tables):
        if tables[at] >> 4 == 1:
            found[tables[at] & 15] = tables[at + 17]
        at += 17 + sum(tables[at + 1 : at + 17])
    return found


def _scan_end(content: bytes, at: int) -> tuple[int, list[tuple[int, int]]]:
    """Where the next marker is that is no restart marker, and those on the way; each with the 0xFF that may fill up before it."""
    breaks = []
    while (at := content.find(b"\xff", at)) >= 0 and at + 1 < len(content):
        behind = at + 1
        while content[behind : behind + 1] == b"\xff":
            behind += 1
        code = content[behind] if behind < len(content) else 0
        if 0xD0 <= code <= 0xD7:
            breaks.append((at, code - 0xD0))
        elif code:
            return at, breaks
        at = behind + 1
    return len(content), breaks


def _zeroless(found: _Jpeg, scan: _Scan) -> bool:
    """Whether no picture gives so many zeros in a row: they would be one small coefficient after the other."""
    if found.kind == "baseline":
        return scan.dense
    return scan.first > 0 and not scan.refines and scan.symbol & 15 != 0  # else a run of flat blocks, or bits that are all 0


def _incomplete(found: _Jpeg) -> str:
    """Scans that never came: every component needs each of its 64 coefficients down to the last bit."""
    bits = {component: [1] * 64 for component, _, _ in found.factors}
    for scan in found.scans:
        for component in scan.components:
            if component in bits and scan.last < 64:
                width = scan.last + 1 - scan.first
                bits[component][scan.first : scan.last + 1] = [scan.low] * width
    return "" if not any(map(any, bits.values())) else "ends early: some of its passes are missing"


def _ends(content: bytes, found: _Jpeg) -> str:
    """Whether the data end where the picture does."""
    _, down = found.mcu
    whole = -(-found.height // down) * down
    # A pixel a block will do where all of a block is in one place: a row of it can't be in step, and another not.
    single = len(found.scans) == 1 and found.kind == "baseline"
    scale = 8 if single and min(found.width, found.height) >= 16 else 1
    taller = found.height if found.interval else min(whole + _TALLER * down, 65535)  # bits behind a break are skipped
    seen = list(_decoded(content, found, taller, scale))
    if len(seen) < len(_BEHIND):
        return "its data are broken"
    rows = found.height // scale - 2 * (scale == 1)  # colours of the last rows are mixed with those below
    own = np.stack([picture[:rows] for picture in seen])
    differ: NDArray[np.bool_] = np.any(own != own[0], axis=(0, 3))
    if rows > 0 and differ.any():
        share = f"{1 - int(differ.any(axis=1).argmax()) / rows:.0%}"
        return "some of its data end early" if found.interval else f"its data end early: the lower {share} are filled up"
    return ""


def _leaves(content: bytes, found: _Jpeg) -> str:
    """Whether the picture is there before its data end. What some cameras fill up with, one byte again and again, is no data."""
    if found.kind != "baseline" or len(found.scans) > 1 or found.interval or not found.scans[0].dense:
        return ""
    start, end = found.starts[0], found.scans[0].end
    data = content[start:end]
    data = data.rstrip(data[-1:]) + data[-1:]
    if len(data) < 4 * _LEFT:
        return ""
    without = content[:start] + data[: -_LEFT].rstrip(b"\xff")
    # All of the last blocks is looked at, which a picture may not show.
    across, down = found.mcu
    whole = replace(
        found, width=-(-found.width // across) * across, scans=(replace(found.scans[0], end=len(without)),)
    )
    for scale in (8, 1):  # the first is quick, but knows no details
        seen = list(_decoded(without, whole, -(-found.height // down) * down, scale))
        if len(seen) < len(_BEHIND) or any(not np.array_equal(picture, seen[0]) for picture in seen):
            return ""
    return "has more data than its picture takes: bytes were lost or changed"


def _decoded(content: bytes, found: _Jpeg, height: int, scale: int) -> Iterator[NDArray[np.uint8]]:
    """The picture as if it were `height` tall, with other bits behind the data of each scan; those that decode."""
    for bits in _BEHIND:
        behind = (bits * (1 + 4096 // len(bits)))[:4096] * (1 + found.width // 4096)
        parts, start = [], 0
        for end in (at for scan in found.scans for at in (*(at for at, _ in scan.breaks), scan.end)):
            parts += [content[start:end], behind[: 64 if found.interval else None]]
            start = end
        whole = bytearray(b"".join([*parts, b"\xff\xd9" if len(found.scans) == 1 else content[start:]]))
        struct.pack_into(">HH", whole, found.height_at, height, found.width)
        try:
            with Image.open(BytesIO(whole), formats=["JPEG"]) as image:
                if scale > 1:
                    image.draft(None, (image.width // scale, image.height // scale))
                yield np.asarray(image.convert("RGB"))
        except Exception:
            return


def _of_plain(content: bytes) -> str:
    """Rows of zeros at the end of what a camera or scanner wrote uncompressed, with a sharp border, as a broken copy leaves them.
    A bar at both ends was drawn."""
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
