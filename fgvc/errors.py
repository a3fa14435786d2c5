"""The package's exceptions."""

from __future__ import annotations


class FgvcError(Exception):
    """An error for the user: its message says what is wrong, where, and what to do. The command line exits with `exit_code`."""

    exit_code = 2


class NoNumbersError(FgvcError):
    """Logits are NaN or infinite, so that their arg-max would be meaningless."""


class ProofError(FgvcError):
    """A proof failed, so that nothing was exported; the message has what differs. The command line exits with 1."""

    exit_code = 1


class NoUnseenImagesError(FgvcError):
    """No image is left that could judge a deployed classifier: it may have been trained on all. The command line exits with 4."""

    exit_code = 4


class UndecidedError(FgvcError):
    """What was asked for can't be told from the images; the message has the candidates. The command line exits with 5."""

    exit_code = 5


class ImageError(FgvcError):
    """An image that can't be read; `reason` is short enough for a table."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return ImageError, (self.path, self.reason)
