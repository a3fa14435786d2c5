"""The package's exceptions."""

from __future__ import annotations


class FgvcError(Exception):
    """An error for the user: its message says what is wrong, where, and what to do. The command line exits with 2."""


class NoNumbersError(FgvcError):
    """Logits are NaN or infinite, so that their arg-max would be meaningless."""


class ImageError(FgvcError):
    """An image that can't be read; `reason` is short enough for a table."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return ImageError, (self.path, self.reason)
