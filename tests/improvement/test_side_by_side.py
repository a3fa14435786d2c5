"""Processes that train: what they leave in their logs, one that hangs, and the death of the process that began them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fgvc.errors import FgvcError
from fgvc.improvement import side_by_side
from fgvc.improvement.side_by_side import Ended, Job, Workers, workers
from fgvc.improvement.work import _wait_for
from fgvc.io.files import file_lock
from fgvc.runs.folder import LOCK
from tests.stand_ins import ForReal


def hanging(folder: Path) -> Job:
    """A job that waits for a reader of its log, for ever."""
    os.mkfifo(folder / "hangs.log")
    return Job("hangs", ("time", "none.yaml"), folder / "hangs.log")


def on_child(pool: Workers, act: Callable[[int], None]) -> Callable[[Sequence[Job]], None]:
    """A tick that does something to the process of the first job, once."""
    done: list[int] = []

    def tick(running: Sequence[Job]) -> None:
        server = pool._started().pid
        children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
        if children and not done:
            done.append(int(children[0]))
            act(done[0])

    return tick


def gone(pid: int) -> bool:
    """Whether a process has ended, though nobody may have asked for its code."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize(
    ("log", "code", "message"),
    [
        (b"error: the disk is full\n", 2, "ended with code 2"),
        (b"error: the disk is full\nerror: no such recipe\nnor any other\n", 2, "no such recipe\nnor any other"),
        (b"error: the disk is full\nepoch 3 of 4\n", -9, "killed by signal 9, most likely for want of memory"),
        (b"error: the disk is full\nTraceback\nValueError: no\n", 1, "ValueError: no"),
        (None, 1, "ended with code 1"),
    ],
)
def test_the_message_of_a_process_is_of_this_session(log: bytes | None, code: int, message: str, tmp_path: Path) -> None:
    job = Job("base", (), tmp_path / "base.log")
    if log is not None:
        job.log.write_bytes(log)
    assert Ended(job, code, False, 1.0, len(b"error: the disk is full\n")).message == message


def test_processes_that_hear_of_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_python_for_rungs: ForReal
) -> None:
    """One that hangs when time is up is killed; those of a process that was killed itself end with it."""
    children, ended = list[int](), list[Ended]()

    def stop(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)  # it hears no SIGTERM
        children.append(pid)

    def kill(pid: int) -> None:
        children.append(pid)
        os.kill(os.getpgid(pid), signal.SIGKILL)  # the leader of its group began it

    job = hanging(tmp_path)
    with new_python_for_rungs(), workers() as pool:
        with monkeypatch.context() as patch:
            patch.setattr(side_by_side, "PATIENCE", 0.5)
            pool.run([job], slots=1, until=lambda: bool(children), tick=on_child(pool, stop), done=ended.append)
        assert [(one.code, one.stopped) for one in ended] == [(-9, True)]
        with pytest.raises(FgvcError, match="the same command goes on"):
            pool.run([job], slots=1, until=lambda: False, tick=on_child(pool, kill), done=ended.append)
    until = time.monotonic() + 5
    while not gone(children[1]) and time.monotonic() < until:
        time.sleep(0.05)
    assert gone(children[1])


def test_a_run_that_an_earlier_command_still_saves_is_waited_for(tmp_path: Path) -> None:
    saved = threading.Event()
    held = threading.Event()

    def save() -> None:
        with file_lock(tmp_path / LOCK):
            held.set()
            time.sleep(0.3)
            saved.set()

    thread = threading.Thread(target=save)
    thread.start()
    held.wait()
    _wait_for(tmp_path)
    assert saved.is_set()
    thread.join()
