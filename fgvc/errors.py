"""Mistakes that fgvc can name."""

from __future__ import annotations


class FgvcError(Exception):
    """A mistake that fgvc can name: the message says what, where and what to do. The command line exits with 2."""


class NoNumbersError(FgvcError):
    """Logits that are NaN or infinite, of which an arg-max would name a class all the same."""


class ImageError(FgvcError):
    """One image that can't be read; `reason` is short enough for a table."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return ImageError, (self.path, self.reason)
