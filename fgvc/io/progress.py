"""Progress of long work on stderr: a bar on a terminal, a plain line every few seconds elsewhere; nothing for short work."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fgvc.io.times import about

T = TypeVar("T")
Tick = Callable[[str, int, int], None]
"""What is done, how much of it, of how much."""

SECONDS = 20.0  # between two plain lines
COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

_live: list[Progress] = []  # the bars on the terminal, which can be but one display


@contextmanager
def bars(console: Console | None = None) -> Iterator[Progress | None]:
    """The display of this process's bars, for as long as the context lasts; within another one that one's. None: no terminal."""
    console = console or Console(stderr=True, highlight=False)
    if _live:
        yield _live[0]
    elif not console.is_terminal or os.environ.get("RANK", "0") != "0":
        yield None
    else:
        redirect = sys.stdout.isatty()  # what is piped elsewhere stays there
        with Progress(*COLUMNS, console=console, transient=True, redirect_stdout=redirect) as display:
            _live.append(display)
            try:
                yield display
            finally:
                _live.clear()


@contextmanager
def ticking() -> Iterator[Tick]:
    """Make a function that shows the progress of the work; it may be called as often as one likes."""
    with bars() as display:
        if display is None:
            yield _Lines().tick
            return
        task: Any = display.add_task("", total=None)
        try:
            yield lambda what, done, total: display.update(task, description=what, completed=done, total=total)
        finally:
            display.remove_task(task)


def track(items: Iterable[T], what: str, total: int, *, size: Callable[[T], int] = lambda item: 1) -> Iterator[T]:
    """Yield the items, and show the progress; `size`: of one of them, in units of `total`."""
    with ticking() as tick:
        tick(what, 0, total)
        done = 0
        for item in items:
            yield item
            done += size(item)
            tick(what, done, total)


class _Lines:
    """Plain lines, one every SECONDS."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._what = ""

    def tick(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._began = what, now
        if now - self._last < SECONDS or os.environ.get("RANK", "0") != "0":
            return
        self._last = now
        left = f", {about((now - self._began) * (total - done) / done)} left" if 0 < done < total else ""
        print(f"{what}: {done} of {total}{left}", file=sys.stderr, flush=True)
