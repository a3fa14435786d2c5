"""Processes of their own for tests, like those of `python -m fgvc ...`: to be killed, or to train beside another one.

A new Python imports torch and timm for five seconds before it does anything. Those that are started here are forked from one
server a session and worker, a new Python that has imported them and has done nothing else. Some tests start a real `python -m
fgvc` all the same (tests/techniques/test_plugin.py, tests/deploy).
"""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import IO, Any

from tests.charts import unpainted

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "fgvc.api", "fgvc.cli.app", "fgvc.exporting.reference", "fgvc.improvement.work", "fgvc.training.trainer",
        "albumentations", "matplotlib.backends.backend_agg", "torchmetrics.functional.classification",  # imported where needed
    ]
)  # fmt: skip
_groups: list[int] = []


@dataclass(frozen=True)
class Started:
    """A process that runs, or has run. What it prints lies in two files, complete when it has ended."""

    process: ForkServerProcess
    folder: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        """As that of `subprocess.Popen`: None while it runs, negative where a signal ended it."""
        return self.process.exitcode

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(encoding="utf-8")

    def wait(self, timeout: float = 120.0) -> Started:
        self.process.join(timeout)
        assert self.returncode is not None, f"it runs for more than {timeout} s: {self.stderr}"
        return self

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def start(
    folder: Path, function: Callable[..., object], *arguments: Any, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Started:
    """`function(*arguments)` in a new process, by the environment of this one and `env`; `folder` takes what it prints."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **(env or {})}
    process = _context.Process(target=_run, args=(folder, environment, cwd or Path.cwd(), function, arguments))
    process.start()
    assert process.pid is not None
    _groups.append(process.pid)
    return Started(process, folder)


def end_all() -> None:
    """At the end of a session: what loads images for a process that was killed may outlive it, and keeps the server alive."""
    for group in _groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    _groups.clear()


def fgvc(folder: Path, *arguments: object, env: Mapping[str, str] | None = None) -> Started:
    """`python -m fgvc ARGUMENTS...` in a new process."""
    return start(folder, _command, [str(argument) for argument in arguments], env=env)


def script(
    folder: Path, file: Path, *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Started:
    """`python FILE ARGUMENTS...` in a new process."""
    return start(folder, _script, file, [str(argument) for argument in arguments], env=env, cwd=cwd)


class Piped:
    """A process that reads its orders and answers them, with as much of `subprocess.Popen` as `fgvc.improvement` uses."""

    def __init__(self, folder: Path, function: Callable[[], object]) -> None:
        orders, own_orders = _context.Pipe(duplex=False)
        own_answers, answers = _context.Pipe(duplex=False)
        self._process = start(folder, _piped, function, orders, answers)
        self.pid = self._process.pid
        self.stdin: IO[bytes] = os.fdopen(os.dup(own_orders.fileno()), "wb")
        self.stdout: IO[bytes] = os.fdopen(os.dup(own_answers.fileno()), "rb")
        for end in (orders, own_orders, answers, own_answers):
            end.close()

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
        return self.returncode


def _piped(function: Callable[[], object], orders: Connection, answers: Connection) -> None:
    for source, target in ((orders, 0), (answers, 1)):
        os.dup2(source.fileno(), target)
        source.close()
    function()


def _command(arguments: Sequence[str]) -> None:
    from fgvc.cli.app import main

    main(list(arguments))


def _script(file: Path, arguments: Sequence[str]) -> None:
    sys.argv = [str(file), *arguments]
    runpy.run_path(str(file), run_name="__main__")


def _run(
    folder: Path, env: Mapping[str, str], place: Path, function: Callable[..., object], arguments: Sequence[Any]
) -> None:
    gc.freeze()  # a collection would touch, and so copy, the memory that all who were forked share
    os.setpgid(0, 0)
    for name, number in (("stdout", 1), ("stderr", 2)):
        handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(handle, number)
        os.close(handle)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(place)
    os.fsync = lambda handle: None  # a process may be killed; the machine is not
    for module, name, blank in unpainted():
        setattr(module, name, blank)
    function(*arguments)


def plain_draws(order: str, folder: Path) -> None:
    """`python -m fgvc.exporting.reference FOLDER` with the order as its input."""
    from fgvc.exporting.reference import main

    sys.stdin = io.StringIO(order)
    main([str(folder)])
