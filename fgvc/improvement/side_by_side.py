"""Rungs that work side by side, each in a process of its own, until all have ended or time is up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgvc.errors import FgvcError

PATIENCE = 60.0  # seconds that a process has to save and end
POLL = 0.2


@dataclass(frozen=True, slots=True)
class Job:
    """What one process does, see `fgvc.improvement.work`; its output goes to a file."""

    name: str
    words: tuple[str, ...]
    log: Path


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended. `stopped`: time was up."""

    job: Job
    code: int
    stopped: bool
    seconds: float

    @property
    def message(self) -> str:
        """The last words of its log."""
        lines = self.job.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        at = next((n for n in range(len(lines) - 1, -1, -1) if lines[n].startswith("error: ")), max(0, len(lines) - 1))
        return "\n".join(lines[at:]).removeprefix("error: ") if lines else f"ended with code {self.code}"


class Workers:
    """Processes for jobs, begun by one that has imported all that they need."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None  # begun with the first jobs

    def _started(self) -> subprocess.Popen[bytes]:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "fgvc.improvement.work"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,  # Ctrl-C is for the command, which stops them
            )
            assert self._server.stdout is not None
            os.set_blocking(self._server.stdout.fileno(), False)
        return self._server

    def run(
        self, jobs: Sequence[Job], *, slots: int, until: Callable[[], bool], tick: Callable[[Sequence[Job]], None]
    ) -> list[Ended]:
        """Run all jobs, `slots` at a time. `until`: whether time is up, when all are stopped and none is begun; `tick(running)`
        is called a few times a second. Whatever is raised on the way, all are stopped first: each saves a checkpoint."""
        waiting, ended, running = list(jobs), list[Ended](), dict[str, tuple[Job, float]]()
        threads = max(1, (os.cpu_count() or 1) // slots)
        stopped = False
        try:
            while running or (waiting and not stopped):
                stopped = stopped or until()
                while waiting and len(running) < slots and not stopped:
                    job = waiting.pop(0)
                    job.log.parent.mkdir(parents=True, exist_ok=True)
                    self._order({"name": job.name, "words": job.words, "log": str(job.log), "threads": threads})
                    running[job.name] = job, time.monotonic()
                if stopped:
                    self._stop(running)
                for report in self._ended():
                    job, began = running.pop(report["name"])
                    ended.append(Ended(job, report["code"], stopped and report["code"] != 0, time.monotonic() - began))
                tick([job for job, _ in running.values()])
                time.sleep(POLL)
        finally:
            self._stop(running)
            until_then = time.monotonic() + PATIENCE
            while running and time.monotonic() < until_then:
                for report in self._ended():
                    running.pop(report["name"], None)
                time.sleep(POLL / 4)
        return ended

    def stop(self, name: str) -> None:
        """Stop one of the running jobs: it saves a checkpoint and ends."""
        self._order({"stop": name})

    def _stop(self, running: dict[str, Any]) -> None:
        for name in running:
            self.stop(name)

    def _order(self, order: dict[str, Any]) -> None:
        orders = self._started().stdin
        assert orders is not None
        orders.write(json.dumps(order).encode() + b"\n")
        orders.flush()

    def _ended(self) -> Iterator[dict[str, Any]]:
        server = self._started()
        assert server.stdout is not None
        while line := server.stdout.readline():
            yield json.loads(line)
        if server.poll() is not None:
            raise FgvcError(f"the process that trains has ended (code {server.returncode}); the same command goes on")

    def close(self) -> None:
        """Stop all that still runs, and wait for it."""
        if (server := self._server) is None:
            return
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.close()
        try:
            server.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        server.stdout.close()


@contextmanager
def workers() -> Iterator[Workers]:
    """Processes for jobs, which end with the context."""
    made = Workers()
    try:
        yield made
    finally:
        made.close()


def last_json(log: Path) -> dict[str, Any]:
    """The last line of a log that is JSON."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return dict(json.loads(next(line for line in reversed(lines) if line.startswith("{"))))
