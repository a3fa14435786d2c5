"""Log of a run: events and tables on disk, lines on the terminal (on stderr; stdout is for results)."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fgvc.config.training import Log
from fgvc.io.files import append, finite_or_none, write_atomic
from fgvc.io.tables import as_csv


class Events:
    """Writer of `events.jsonl` (append-only), `metrics.csv` and one progress line; silent on ranks other than 0."""

    def __init__(self, run: Path, log: Log, *, active: bool = True) -> None:
        self.run, self.log, self.active = run, log, active
        self.console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._task: Any = None
        self._last_line_time = 0.0

    def write(self, kind: str, **values: Any) -> None:
        """Append one event; a torn last line of a killed run is closed first."""
        if not self.active:
            return
        event = finite_or_none({"event": kind, "time": round(time.time(), 3), **values})
        append(self.run / "events.jsonl", json.dumps(event, default=str, allow_nan=False).encode())

    def table(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Rewrite metrics.csv from the whole history."""
        if not self.active or not rows:
            return
        lines = [{key: f"{value:.6g}" for key, value in row.items() if math.isfinite(value)} for row in rows]
        write_atomic(self.run / "metrics.csv", as_csv(lines))

    def say(self, text: str) -> None:
        if self.active:
            self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, total: int, done: int, what: str = "training") -> Iterator[None]:
        """Show one live bar on a terminal, a plain line every few seconds elsewhere. Within another, a second bar in it."""
        if self._bar is not None:
            training, self._task = self._task, self._bar.add_task(what, total=total, completed=done)
            yield
            self._bar.remove_task(self._task)
            self._task = training
        elif self.active and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with Progress(*columns, console=self.console, transient=True) as bar:
                self._bar, self._task = bar, bar.add_task(what, total=total, completed=done)
                yield
                self._bar = None
        else:
            self._last_line_time = time.monotonic()
            yield

    def done(self, count: int, total: int) -> None:
        """Move the innermost bar, or print a line every few seconds."""
        if self._bar is not None:
            self._bar.update(self._task, completed=count)
        elif self.active and time.monotonic() - self._last_line_time >= self.log.every_seconds:
            self._last_line_time = time.monotonic()
            print(f"{count}/{total}", file=sys.stderr, flush=True)

    def step(self, step: int, total: int, *, epoch: int, loss: float, lr: float, rate: float) -> None:
        """Log one step; `rate` in images/s over all ranks."""
        self.write("step", step=step, epoch=epoch, loss=round(loss, 6), lr=lr, images_per_second=round(rate, 2))
        text = f"epoch {epoch + 1} loss {loss:.3f} lr {lr:.2g} {rate:.0f} img/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif self.active and time.monotonic() - self._last_line_time >= self.log.every_seconds:
            self._last_line_time = time.monotonic()
            print(f"step {step}/{total} {text}", file=sys.stderr, flush=True)
