"""History of a run as it was recorded: epochs, learning rates, machine and time."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fgvc.errors import FgvcError
from fgvc.io.display import Display, table
from fgvc.io.jsonl import objects

COMMON_COLUMNS = ("epoch", "step", "lr", "base", "l1", "loss")  # columns of metrics.csv that are no technique's
MACHINE = ("system", "cpu", "cores", "accelerator")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class History(Display):
    """Recorded history of one run."""

    epochs: tuple[Mapping[str, float], ...]  # rows of metrics.csv
    rates: tuple[tuple[int, float], ...]  # step, learning rate
    started: str  # day of the first step, UTC; empty where the run does not tell
    seconds: float | None  # of training, over all sessions; None: not finished
    environment: Mapping[str, Any]

    @property
    def terms(self) -> dict[str, list[str]]:
        """Columns of metrics.csv by technique."""
        columns: dict[str, list[str]] = {}
        for key in dict.fromkeys(key for row in self.epochs for key in row):
            if key not in COMMON_COLUMNS and not key.startswith("val_"):
                columns.setdefault(key.partition(".")[0], []).append(key)
        return columns

    @property
    def command(self) -> str:
        """Command that started the run, quoted for a shell; from Python, the arguments of that program."""
        words = [str(word) for word in self.environment.get("command") or ()]
        return shlex.join(["fgvc", *words]) if words[:1] == ["train"] else shlex.join(words)

    @property
    def machine(self) -> str:
        facts = {key: self.environment.get(key) for key in MACHINE}
        facts["cores"] = f"{facts['cores']} cores" if facts["cores"] else None
        return ", ".join(str(value) for value in facts.values() if value)

    @property
    def versions(self) -> str:
        versions = {key: value for key, value in self.environment.items() if key not in (*MACHINE, "command") and value}
        return ", ".join(f"{name} {value}" for name, value in versions.items())

    @property
    def facts(self) -> Mapping[str, object]:
        took = "not finished" if self.seconds is None else f"{self.seconds:.0f} s"
        last = next((row["val_top1"] for row in reversed(self.epochs) if "val_top1" in row), None)
        scored = {} if last is None else {"last validation top-1": f"{100 * last:.2f} %"}
        return {"epochs": len(self.epochs), "training": took, **scored}

    def _repr_html_(self) -> str:
        columns = {"loss": ("loss", 1, 4), "val_loss": ("validation loss", 1, 4), "val_top1": ("validation top-1 %", 100, 2)}
        given = [key for key in columns if any(key in row for row in self.epochs)]
        rows = (
            [f"{row['epoch']:.0f}", *(f"{columns[key][1] * row[key]:.{columns[key][2]}f}" if key in row else "" for key in given)]
            for row in self.epochs
        )
        return table(rows, head=["epoch", *(columns[key][0] for key in given)])


def read_history(run: Path) -> History:
    """Read `env.json`, `events.jsonl` and `metrics.csv`. A torn line of a killed run is passed over, and of what a resumed run
    did twice the last counts. Raises FgvcError where a file is not what fgvc writes."""
    rates: dict[int, float] = {}
    started, seconds = "", None
    with _as_written(run / "events.jsonl"):
        for event in objects(_text(run / "events.jsonl")):
            if event.get("event") == "step":
                rates[int(event["step"])] = float(event["lr"])
            if event.get("event") == "start" and not started:
                started = datetime.fromtimestamp(float(event["time"]), UTC).date().isoformat()
            if event.get("event") in ("finished", "resume"):
                seconds = float(event["seconds"]) if event["event"] == "finished" else None
    with _as_written(run / "env.json"):
        text = _text(run / "env.json")
        environment = dict(json.loads(text)) if text else {}
    with _as_written(run / "metrics.csv"):
        rows = list(csv.DictReader(io.StringIO(_text(run / "metrics.csv"))))
        epochs = tuple({key: float(value) for key, value in row.items() if value} for row in rows)
        if wrong := [at for at, row in enumerate(epochs, 2) if not {"epoch", "step", "lr", "loss"} <= row.keys()]:
            raise ValueError(f"line {wrong[0]} lacks an epoch, step, lr or loss")
    return History(
        epochs=epochs, rates=tuple(sorted(rates.items())), started=started, seconds=seconds, environment=environment
    )


def interpolation_remark(run: Path) -> str:
    """Remark about a run that `fgvc interpolate` wrote: its share, its ends, and the validation scores by share; else empty.
    Raises FgvcError where that is not as fgvc wrote it."""
    with _as_written(path := run / "interpolation.json"):
        if not (text := _text(path)):
            return ""
        tree = json.loads(text)
        by = str(tree["by"])
        scored = [f"{row['share']:g}: {row[by]:.4f}" for row in tree["scores"] if row.get(by) is not None]
        origin = f" (validation {by} by share: {', '.join(scored)})" if scored else " (given)"
        return f"share {tree['share']:g} of the way from the start of {tree['run']} to its {tree['select']} weights{origin}"


@contextmanager
def _as_written(path: Path) -> Iterator[None]:
    """Turn what reading a broken file raises into FgvcError."""
    try:
        yield
    except (ValueError, TypeError, KeyError, OverflowError, OSError) as error:
        raise FgvcError(f"{path}: not as fgvc wrote it ({type(error).__name__}: {error}); mend or remove it") from error


def _text(path: Path) -> str:
    """Text of a file; empty where there is no such file."""
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise FgvcError(f"{path}: can't be read: {error}") from error
