"""Sheet of the first samples of a run, for its trackers."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from fgvc.data.index import decode_row
from fgvc.images.lettering import writable
from fgvc.images.sheet import Cell, save_sheet
from fgvc.training.session import Session

SAMPLES = 6


def sample_sheet(session: Session) -> bytes:
    """PNG of a row for each of some samples of the epoch's first step: the original, and the picture after each step of the
    augmentation. The next epoch of the loader begins anew."""
    names, font = writable(session.index.classes)
    rows = []
    for row, steps in session.loader.steps(session.progress.epoch, SAMPLES):
        original = Cell(decode_row(session.index, row), names[int(session.index.labels[row])], "original")
        rows.append([original, *(Cell(Image.fromarray(picture), "", name) for name, picture in steps)])
    with TemporaryDirectory() as scratch:
        return save_sheet(rows, Path(scratch) / "samples.png", font=font).read_bytes()
