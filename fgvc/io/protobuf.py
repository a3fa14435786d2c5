"""Parsing of serialised protocol buffers, without their library: where the fields of a message lie."""

from __future__ import annotations

from collections.abc import Iterator

VARINT, LENGTH = 0, 2  # wire types; 1 and 5 are eight and four bytes


def fields(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int, int, int]]:
    """Number and wire type of each field of the message in data[start:end], and where its content begins and ends (of a varint:
    its own bytes). Raises ValueError where the bytes are no message, or cut short."""
    at, end = start, len(data) if end is None else end
    while at < end:
        tag, at = varint(data, at)
        number, wire = tag >> 3, tag & 7
        begin = at
        if wire == VARINT:
            at = varint(data, at)[1]
        elif wire == LENGTH:
            length, begin = varint(data, at)
            at = begin + length
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"no field of protobuf at byte {at}")
        if at > end:
            raise ValueError(f"cut short at byte {end}")
        yield number, wire, begin, at


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at a byte, below 2**64, and the byte after it. Raises ValueError where it has no end."""
    value = 0
    for place in range(10):
        if at >= len(data):
            break
        byte = data[at]
        value |= (byte & 0x7F) << 7 * place
        at += 1
        if byte < 0x80:
            return value & (2**64 - 1), at
    raise ValueError(f"a number without an end at byte {at}")


def signed(value: int) -> int:
    """The int64 or int32 that a varint holds."""
    return value - 2**64 if value >= 2**63 else value


def varints(data: bytes, start: int, end: int) -> list[int]:
    """Packed signed numbers."""
    numbers = []
    while start < end:
        value, start = varint(data, start)
        numbers.append(signed(value))
    return numbers
