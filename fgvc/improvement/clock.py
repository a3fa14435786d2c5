"""Clock of a command's working time: the sum of all its sessions, from start to exit, over interruptions."""

from __future__ import annotations

import re
import time
from pathlib import Path

from fgvc.errors import FgvcError
from fgvc.io.files import as_json, write_atomic
from fgvc.runtime.bundle import read_json

FEWEST_SECONDS = 120.0  # of a budget: below this nothing is trained
EVERY = 2.0  # seconds between two writes, which a kill may lose
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds_of(budget: str | float) -> float:
    """Seconds of a budget such as `150s`, `20m`, `1.5h` or `2d`, or of a number of seconds. Raises FgvcError for anything else,
    and below two minutes."""
    text = f"{budget:f}s" if isinstance(budget, int | float) else budget
    written = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd])\s*", text.lower())
    if written is None:
        raise FgvcError(f"--budget {budget}: a number and its unit, s, m, h or d, such as 20m or 1.5h")
    seconds = float(written[1]) * UNITS[written[2]]
    if seconds < FEWEST_SECONDS:
        raise FgvcError(f"--budget {budget}: too small for a single rung; give 2m or more")
    return seconds


class Clock:
    """Counts the seconds of this session on top of those that earlier ones recorded in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._before = float(read_json(file, dict)["seconds"]) if file.is_file() else 0.0
        self._started = self._written = time.monotonic()

    @property
    def seconds(self) -> float:
        """Working time so far."""
        return self._before + time.monotonic() - self._started

    def tick(self, *, always: bool = False) -> None:
        """Record the working time, every EVERY seconds or now."""
        if always or time.monotonic() - self._written >= EVERY:
            self._written = time.monotonic()
            write_atomic(self._file, as_json({"seconds": round(self.seconds, 2)}))
