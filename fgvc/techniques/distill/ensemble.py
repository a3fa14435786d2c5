"""Several teachers together: what each says of a batch, from its kept logits where those are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fgvc.techniques.api import EpochStart, Output
from fgvc.techniques.distill.logits import LogitFile, open_logits
from fgvc.techniques.distill.teacher import Teacher, TeacherOutput
from fgvc.techniques.plan import Context


class TeacherEnsemble:
    """Teachers, and for each its file of logits where they can be kept."""

    def __init__(self, teachers: Sequence[Teacher], *, cache: Path | None, classes: int) -> None:
        self.teachers, self._cache, self._classes = teachers, cache, classes
        self._files: list[LogitFile | None] = [None] * len(teachers)

    def open(self, start: EpochStart) -> None:
        """This epoch's file of each teacher whose answers can be kept."""
        if self._cache is None or not self.teachers:
            return
        images, shape = start.replays(), (start.images, self._classes)
        for number, teacher in enumerate(self.teachers):
            if images is not None and teacher.identity is not None:
                facts = f"{images} {teacher.identity()}"
                self._files[number] = open_logits(self._cache, facts, start.number, shape, first=start.first)
        if not any(self._files) and start.number == 0:
            start.say("distill.cache: nothing is kept: teachers change, or a technique changes images as they load")

    def ask(self, main: Output, ctx: Context, *, features: bool) -> list[TeacherOutput]:
        """Of the main view's pixels; where these are the clean ones, of their finest render, or of the file."""
        batch, x, answers = ctx.batch, main.view.x, []
        clean = batch if batch is not None and x is batch.x_clean else None
        finest = None if clean is None else clean.finest
        for teacher, file in zip(self.teachers, self._files, strict=True):
            known = None
            if clean is not None and file is not None and not (features and teacher.channels):
                known = file.recall(clean.index, clean.geometry)
            said = TeacherOutput(known.to(x.device), None) if known is not None else teacher(x, finest)
            if clean is not None and file is not None and known is None:
                file.keep(clean.index, clean.geometry, said.logits)
            answers.append(said)
        return answers
