"""Suffixes of image files, by which files below a folder are taken for images."""

from __future__ import annotations

from collections import Counter

TGA = (".tga", ".icb", ".vda", ".vst")  # no bytes identify this format, so the name must

SUFFIXES = (  # in lower case
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".jpg_large", ".jpg_small", ".jpg_orig", ".mpo",
    ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".avif", ".avifs",
    ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", *TGA,
)  # fmt: skip


def suffix_of(name: str) -> str:
    """The suffix of a file's name in lower case, or "no suffix"."""
    stem, dot, suffix = name.rpartition(".")
    return f".{suffix.lower()}" if stem and dot else "no suffix"


def counted(suffixes: Counter[str]) -> str:
    """Counts of suffixes in words, the most frequent first."""
    listed = sorted(suffixes.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    return ", ".join(f"{suffix} {count}" for suffix, count in listed[:8]) + more
