"""Suffixes by which a file below a folder is taken for an image, in data sets and where folders are predicted or explained."""

from __future__ import annotations

from collections import Counter

TGA = (".tga", ".icb", ".vda", ".vst")  # no bytes tell these from others, so that the name must

SUFFIXES = (  # in lower case
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".jpg_large", ".jpg_small", ".jpg_orig", ".mpo",
    ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".avif", ".avifs",
    ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", *TGA,
)  # fmt: skip


def suffix_of(name: str) -> str:
    """In lower case; "no suffix"."""
    stem, dot, suffix = name.rpartition(".")
    return f".{suffix.lower()}" if stem and dot else "no suffix"


def counted(suffixes: Counter[str]) -> str:
    """In words, the most frequent first."""
    listed = sorted(suffixes.items(), key=lambda one: (-one[1], one[0]))
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    return ", ".join(f"{suffix} {count}" for suffix, count in listed[:8]) + more
