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
from rich.progress import Progress

from fgvc.config.recipe import Recipe
from fgvc.config.training import Log
from fgvc.io.files import append, finite_or_none, write_atomic
from fgvc.io.progress import bars
from fgvc.io.tables import as_csv
from fgvc.io.times import about
from fgvc.runs.trackers import Trackers


class Events:
    """Writer of `events.jsonl` (append-only), `metrics.csv` and one progress line; silent on ranks other than 0."""

    def __init__(self, run: Path, log: Log, *, active: bool = True) -> None:
        self.run, self.log, self.active = run, log, active
        self.console = Console(stderr=True, highlight=False)
        self.trackers = Trackers(self.say)
        self._bar: Progress | None = None
        self._task: Any = None
        self._last_line_time = 0.0
        self._began, self._first_step = 0.0, 0  # of this session's training

    def write(self, kind: str, **values: Any) -> None:
        """Append one event; a torn last line of a killed run is closed first."""
        if not self.active:
            return
        event = finite_or_none({"event": kind, "time": round(time.time(), 3), **values})
        append(self.run / "events.jsonl", json.dumps(event, default=str, allow_nan=False).encode())
        self.trackers.event(event)

    def table(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Rewrite metrics.csv from the whole history."""
        if not self.active or not rows:
            return
        lines = [{key: f"{value:.6g}" for key, value in row.items() if math.isfinite(value)} for row in rows]
        write_atomic(self.run / "metrics.csv", as_csv(lines))

    @contextmanager
    def tracked(self, recipe: Recipe, step: int | None = None) -> Iterator[None]:
        """Keep the trackers of `log.to` open, and tell them how the run ends; `step`: the last one of a run that goes on."""
        if not self.active:
            yield
            return
        self.trackers.open(self.run, self.log, step=step)
        self.trackers.recipe(recipe, (self.run / "config.yaml").read_text(encoding="utf-8"))
        try:
            yield
        except BaseException as error:
            self.trackers.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        self.trackers.close("FINISHED")

    def say(self, text: str) -> None:
        if self.active:
            self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, total: int, done: int, what: str = "training") -> Iterator[None]:
        """Show one live bar on a terminal, a plain line every few seconds elsewhere. Within another, a second bar in it."""
        if what == "training":
            self._began, self._first_step = time.monotonic(), done
        if self._bar is not None:
            training, self._task = self._task, self._bar.add_task(what, total=total, completed=done)
            yield
            self._bar.remove_task(self._task)
            self._task = training
        elif self.active and self.console.is_terminal:
            with bars(self.console) as bar:
                assert bar is not None
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

    def moved(self, step: int) -> None:
        """Move the bar, where there is one, between two steps that are logged."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def step(
        self,
        step: int,
        total: int,
        *,
        epoch: int,
        losses: Mapping[str, float],
        rates: Mapping[str, float],
        lr: float,
        rate: float,
    ) -> None:
        """Log one step. `losses`: the whole, its base, and the techniques' terms; `rates`: of the groups of parameters, by their
        factors; `rate` in images/s over all ranks."""
        loss, more = losses["loss"], {}
        if losses.keys() - {"loss", "base"}:
            more["losses"] = {name: round(value, 6) for name, value in losses.items()}
        if len(rates) > 1:
            more["rates"] = dict(rates)
        self.write("step", step=step, epoch=epoch, loss=round(loss, 6), lr=lr, images_per_second=round(rate, 2), **more)
        text = f"epoch {epoch + 1} loss {loss:.3f} lr {lr:.2g} {rate:.0f} img/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif self.active and time.monotonic() - self._last_line_time >= self.log.every_seconds:
            self._last_line_time = time.monotonic()
            print(f"step {step}/{total} {text}{self.left(step, total)}", file=sys.stderr, flush=True)

    def left(self, step: int, total: int) -> str:
        """Remaining time at the pace of this session, validation included, as the end of a sentence; empty at the end."""
        done = step - self._first_step
        return f", {about((time.monotonic() - self._began) * (total - step) / done)} left" if done > 0 and step < total else ""
