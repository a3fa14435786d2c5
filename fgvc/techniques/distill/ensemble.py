"""Several teachers together: the output of each for a batch, from its cached logits where there are any."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fgvc.techniques.api import EpochStart, Output
from fgvc.techniques.distill.logits import LogitFile, open_logits
from fgvc.techniques.plan import Context
from fgvc.techniques.teacher import Teacher, TeacherOutput


class TeacherEnsemble:
    """Teachers, and the file of logits of each whose outputs can be cached."""

    def __init__(self, teachers: Sequence[Teacher], *, cache: Path | None, classes: int) -> None:
        self.teachers, self._cache, self._classes = teachers, cache, classes
        self._files: list[LogitFile | None] = [None] * len(teachers)

    def open(self, start: EpochStart) -> None:
        """Open this epoch's file of each teacher whose outputs can be cached."""
        if self._cache is None or not self.teachers:
            return
        images, shape = start.replays(), (start.images, self._classes)
        for number, teacher in enumerate(self.teachers):
            if images is not None and teacher.identity is not None:
                facts = f"{images} {teacher.identity()}"
                self._files[number] = open_logits(self._cache, facts, start.number, shape, first=start.first)
        if not any(self._files) and start.number == 0:
            start.say("distill.cache: nothing is cached: teachers change, or a technique changes images as they load")

    def outputs(self, main: Output, ctx: Context, *, features: bool) -> list[TeacherOutput]:
        """Output of each teacher for the main view; where its pixels are the clean ones, for their finest render, or cached."""
        batch, x, outputs = ctx.batch, main.view.x, []
        clean = batch if batch is not None and x is batch.x_clean else None
        finest = None if clean is None else clean.finest
        for teacher, file in zip(self.teachers, self._files, strict=True):
            cached = None
            if clean is not None and file is not None and not (features and teacher.channels):
                cached = file.recall(clean.index, clean.geometry)
            output = TeacherOutput(cached.to(x.device), None) if cached is not None else teacher(x, finest)
            if clean is not None and file is not None and cached is None:
                file.record(clean.index, clean.geometry, output.logits)
            outputs.append(output)
        return outputs
