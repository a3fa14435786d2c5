"""Progress of an improvement: a line for each step, and on a terminal a live table of the running processes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fgvc.improvement.clock import Clock
from fgvc.improvement.ladder import Plan, makespan
from fgvc.improvement.side_by_side import Job
from fgvc.io.files import append
from fgvc.io.jsonl import objects
from fgvc.report.document import duration

if TYPE_CHECKING:
    from fgvc.improvement.rungs import Ladder

EVERY = 60.0  # seconds between two lines where there is no terminal


class View:
    """Writes progress lines to stderr and to `improve.log`, and shows the running processes."""

    def __init__(self, out: Path, clock: Clock) -> None:
        self._out, self._clock = out, clock
        self._console = Console(stderr=True, highlight=False)
        self._live: Live | None = None
        self._ladder: Ladder | None = None
        self._last_line = clock.seconds
        self._end = 0.0  # of the working time, as planned

    def __enter__(self) -> View:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Write one line."""
        self._console.print(text, markup=False, soft_wrap=True)
        append(self._out / "improve.log", json.dumps({"seconds": round(self._clock.seconds), "line": text}).encode())

    def plan(self, plan: Plan) -> None:
        """Show the ladder."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("rung", "epochs", "about", "starts by", ""):
            table.add_column(column, justify="right" if column in ("epochs", "about", "starts by") else "left")
        for rung in plan.rungs:
            latest = "" if rung.latest_start is None else duration(rung.latest_start)
            table.add_row(rung.name, str(rung.epochs or ""), duration(makespan([rung], plan.slots)), latest, rung.what)
        self._console.print(table)
        self.say(
            f"about {duration(plan.seconds)} of {duration(plan.budget)}, "
            f"{plan.slots} side by side, in {plan.precision}; {duration(plan.shipping)} are for export, judgement and page"
        )
        for name, why in plan.left_out.items():
            self.say(f"left out: {name}: {why}")

    def begin(self, ladder: Ladder) -> None:
        """Begin the live view."""
        self._ladder = ladder
        self._end = self._clock.seconds + ladder.plan.seconds - sum(outcome.seconds for outcome in ladder.outcomes.values())
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=2, transient=True)
            self._live.start()

    def tick(self, running: Sequence[Job]) -> None:
        """Update the display of the running processes; without a terminal it is a line a minute."""
        self._clock.tick()
        if self._ladder is None:
            return
        plan, seconds = self._ladder.plan, self._clock.seconds
        states = [f"{job.name} {self._state(job)}" for job in running]
        left = max(0.0, self._end - seconds)
        head = f"{duration(seconds)} of {duration(plan.budget)}, about {duration(left)} left"
        done = {name: row for name, row in self._ladder.outcomes.items() if row.of}
        if done:
            best = max(done, key=lambda name: done[name].accuracy)
            head += f", best so far {best} {100 * done[best].accuracy:.1f} %"
        if self._live is not None:
            self._live.update(Group(Text(head), *map(Text, states)))
        elif seconds - self._last_line >= EVERY and states:
            self._last_line = seconds
            print(f"{head}: {', '.join(states)}", file=self._console.file, flush=True)

    def _state(self, job: Job) -> str:
        """Progress of a run, in words."""
        assert self._ladder is not None
        ladder = self._ladder
        rung = next((rung for rung in ladder.plan.rungs if job.name in ladder.runs(rung)), None)
        log = self._ladder.run(job.name) / "events.jsonl"
        if rung is None or not log.is_file():
            return "starts"
        events = _tail(log)
        epoch = next((event["epoch"] for event in reversed(events) if event.get("event") == "step"), None)
        if any(event.get("event") == "finished" for event in events):
            return "between its start and its end"
        return "starts" if epoch is None else f"epoch {epoch + 1} of {self._ladder.epochs(rung)}"


def _tail(path: Path, size: int = 4096) -> list[dict[str, Any]]:
    """The last events of a log."""
    with path.open("rb") as file:
        file.seek(max(0, os.path.getsize(path) - size))
        return list(objects(file.read().decode("utf-8", "replace")))
