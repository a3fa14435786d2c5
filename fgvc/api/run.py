"""A run as an object."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from fgvc.api.evaluation import evaluate, localize, report
from fgvc.api.shipping import export
from fgvc.config.recipe import Recipe
from fgvc.io.files import StrPath
from fgvc.runs.folder import read_run, recorded_classes
from fgvc.runs.history import History, read_history


class Run:
    """A run of training, by its folder; it stands wherever a run's folder is named.

    `evaluate`, `localize`, `report` and `export` are the functions of these names, whose first argument is the run.
    """

    def __init__(self, folder: StrPath) -> None:
        """Open a run. Raises FgvcError where the folder is none."""
        self.folder = Path(folder)
        self.recipe: Recipe = read_run(self.folder)
        self.classes: tuple[str, ...] = recorded_classes(self.folder)

    evaluate = evaluate
    localize = localize
    report = report
    export = export

    @cached_property
    def history(self) -> History:
        """What training recorded, epoch by epoch."""
        return read_history(self.folder)

    def __fspath__(self) -> str:
        return str(self.folder)

    def __truediv__(self, name: StrPath) -> Path:
        """A file or folder of the run."""
        return self.folder / name
