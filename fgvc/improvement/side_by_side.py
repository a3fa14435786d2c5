"""Rungs that work side by side, each in a process of its own, until all have ended or time is up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fgvc.errors import FgvcError
from fgvc.io.files import make_folder, writing
from fgvc.io.jsonl import objects
from fgvc.runtime.engine import available_cpus

PATIENCE = 60.0  # seconds that a process has to save and end
POLL = 0.2


@dataclass(frozen=True, slots=True)
class Job:
    """Work of one process, see `fgvc.improvement.work`; its output goes to a file."""

    name: str
    words: tuple[str, ...]
    log: Path


@dataclass(frozen=True, slots=True)
class Ended:
    """End of a process. `stopped`: time was up."""

    job: Job
    code: int
    stopped: bool
    seconds: float
    before: int = 0  # bytes that its log had when it began, of earlier sessions

    @property
    def message(self) -> str:
        """Reason why it ended: no time was left, the error in its log, the signal that killed it, or the last words of its
        log."""
        if self.stopped:
            return "its time was up"
        log = self.job.log.read_bytes()[self.before :] if self.job.log.is_file() else b""
        lines = log.decode("utf-8", "replace").strip().splitlines()
        at = next((n for n in range(len(lines) - 1, -1, -1) if lines[n].startswith("error: ")), None)
        if at is not None:
            return "\n".join(lines[at:]).removeprefix("error: ")
        if self.code < 0:
            cause = ", most likely for want of memory" if -self.code == signal.SIGKILL else ""
            return f"killed by signal {-self.code}{cause}"
        return lines[-1] if lines else f"ended with code {self.code}"


class Workers:
    """Processes for jobs, begun by one that has imported all that they need."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None  # begun with the first jobs

    def _started(self) -> subprocess.Popen[bytes]:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-P", "-m", "fgvc.improvement.work"],  # -P: whatever modules lie in the working directory
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,  # Ctrl-C is for the command, which stops them
            )
            assert self._server.stdout is not None
            os.set_blocking(self._server.stdout.fileno(), False)
        return self._server

    def run(
        self,
        jobs: Sequence[Job],
        *,
        slots: int,
        until: Callable[[], bool],
        tick: Callable[[Sequence[Job]], None],
        done: Callable[[Ended], None],
    ) -> None:
        """Run all jobs, `slots` at a time; `done` is told how each ended. `until`: whether time is up, when all are stopped,
        those that do not end within PATIENCE killed, and none is begun; `tick(running)` is called a few times a second. Whatever
        is raised on the way, all are stopped first: each saves a checkpoint."""
        waiting, running = list(jobs), dict[str, tuple[Job, float, int]]()
        threads = threads_of(slots)
        stopped, impatient = False, 0.0
        try:
            while running or (waiting and not stopped):
                if not stopped and until():
                    stopped, impatient = True, time.monotonic() + PATIENCE
                while waiting and len(running) < slots and not stopped:
                    job = waiting.pop(0)
                    with writing(job.log):
                        make_folder(job.log.parent)
                    before = job.log.stat().st_size if job.log.exists() else 0
                    self._order({"name": job.name, "words": job.words, "log": str(job.log), "threads": threads})
                    running[job.name] = job, time.monotonic(), before
                if stopped:
                    self._signal(running, "stop" if time.monotonic() < impatient else "kill")
                for report in self._ended():
                    job, began, before = running.pop(report["name"])
                    late, seconds = stopped and report["code"] != 0, time.monotonic() - began
                    done(Ended(job, report["code"], late, seconds, before))
                tick([job for job, _, _ in running.values()])
                time.sleep(POLL)
        finally:
            with suppress(FgvcError):  # of a server that has ended: `close` ends what it left
                self._signal(running, "stop")
                until_then = time.monotonic() + PATIENCE
                while running and time.monotonic() < until_then:
                    for report in self._ended():
                        running.pop(report["name"], None)
                    time.sleep(POLL / 4)

    def stop(self, name: str) -> None:
        """Stop one of the running jobs: it saves a checkpoint and ends."""
        self._signal([name], "stop")

    def _signal(self, names: Iterable[str], order: Literal["stop", "kill"]) -> None:
        for name in names:
            self._order({order: name})

    def _order(self, order: dict[str, Any]) -> None:
        server = self._started()
        assert server.stdin is not None
        try:
            server.stdin.write(json.dumps(order).encode() + b"\n")
            server.stdin.flush()
        except BrokenPipeError:
            server.wait()
            self._refuse_ended(server)

    @staticmethod
    def _refuse_ended(server: subprocess.Popen[bytes]) -> None:
        if server.poll() is not None:
            raise FgvcError(f"the process that trains has ended (code {server.returncode}); the same command goes on")

    def _ended(self) -> Iterator[dict[str, Any]]:
        server = self._started()
        assert server.stdout is not None
        while line := server.stdout.readline():
            yield json.loads(line)
        self._refuse_ended(server)

    def close(self) -> None:
        """Stop all that still runs, and wait for it."""
        if (server := self._server) is None:
            return
        assert server.stdin is not None
        assert server.stdout is not None
        with suppress(BrokenPipeError):
            server.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            server.wait(PATIENCE)
        if server.returncode != 0:  # it was killed, or hangs, and its processes may go on without it
            _end_group(server.pid)
            server.wait()
        server.stdout.close()


def _end_group(group: int) -> None:
    """Stop the processes of a group, and kill those that do not end within PATIENCE."""
    until = time.monotonic() + PATIENCE
    with suppress(ProcessLookupError, PermissionError):  # none is left
        os.killpg(group, signal.SIGTERM)
        while time.monotonic() < until:
            os.killpg(group, 0)
            time.sleep(POLL)
        os.killpg(group, signal.SIGKILL)


@contextmanager
def workers() -> Iterator[Workers]:
    """Processes for jobs, which end with the context."""
    made = Workers()
    try:
        yield made
    finally:
        made.close()


def last_json(log: Path) -> dict[str, Any]:
    """The last object of a log that is JSON."""
    return list(objects(log.read_text(encoding="utf-8", errors="replace")))[-1]


def threads_of(slots: int) -> int:
    """Threads of each process where so many work side by side."""
    return max(1, available_cpus() // slots)
