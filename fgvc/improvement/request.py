"""Request for an improvement, as the command line gives it, and its comparison with that of a resumed command."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fgvc.data.unseen import Seen
from fgvc.errors import FgvcError
from fgvc.io.names import few
from fgvc.runtime.bundle import read_json
from fgvc.studies.candidate import named_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Arguments of `fgvc improve`."""

    target: str  # a deployed .onnx file, or timm's name of a net
    data: Path
    budget: float  # seconds
    labels: Path | None = None
    preprocess: Path | None = None
    seen: Seen = "train"
    unseen: Path | None = None
    unlabelled: Path | None = None
    starts: tuple[str, ...] = ()
    size: tuple[int, int] | None = None  # of the network's input, where no file says it
    seed: int = 0
    max_negative_flips: str | None = None  # the gate: the deployed file teaches, too
    min_gain: float | None = None
    search: bool = False  # around the winner's settings, see `fgvc.improvement.search`

    @property
    def file(self) -> Path | None:
        """The deployed file; None: a net of timm's."""
        return Path(self.target).expanduser() if self.target.lower().endswith(".onnx") or Path(self.target).is_file() else None

    def command(self, out: Path) -> str:
        """The command line that asks for it."""
        words = ["fgvc", "improve", self.target, str(self.data), "--budget", f"{self.budget / 60:g}m", "-o", str(out)]
        size = None if self.size is None else "x".join(map(str, self.size))
        options = {
            "labels": self.labels, "preprocess": self.preprocess, "unseen": self.unseen, "unlabelled": self.unlabelled,
            "size": size, "seen": None if self.seen == "train" else self.seen, "seed": self.seed or None,
            "min-gain": self.min_gain, "max-negative-flips": self.max_negative_flips,
        }  # fmt: skip
        for option, value in [*options.items(), *(("start", text) for text in self.starts)]:
            words += [] if value is None else [f"--{option}", str(value)]
        words += ["--search"] * self.search
        return shlex.join(words)

    @property
    def absolute_starts(self) -> tuple[str, ...]:
        """The starts with absolute paths of their files; other words as they are."""
        return tuple(map(_absolute, self.starts))

    @property
    def record(self) -> dict[str, Any]:
        """Arguments that must be the same when the command is resumed, with absolute paths; the budget may grow."""
        asked = {key: value for key, value in asdict(self).items() if key != "budget"}
        asked |= {"target": self.file or self.target, "starts": self.absolute_starts}
        return {key: str(value.absolute()) if isinstance(value, Path) else value for key, value in asked.items()}


def _absolute(start: str) -> str:
    named, weights = named_weights(start)
    file = Path(weights).expanduser()
    return "=".join([*[named] * bool(named), str(file.absolute())]) if file.is_file() else start


def refuse_other_words(request: Request, out: Path) -> None:
    """Raise FgvcError where the folder's improvement was begun with other words than the request's."""
    stored = read_json(out / "task.json", dict)["request"]
    if changed := [key for key, value in request.record.items() if _plain(value) != stored.get(key)]:
        raise FgvcError(
            f"{out}: was begun with other words ({few(changed)} differ): give the same ones to go on, or choose another --out"
        )


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
