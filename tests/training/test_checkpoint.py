"""At no kill point is `last` missing or unloadable; a failed save costs nothing."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from fgvc.errors import FgvcError
from fgvc.runs import checkpoint
from fgvc.runs.checkpoint import Progress, State
from tests.processes import start


def state(step: int, *, size: int = 1000) -> State:
    net = {"w": torch.full((size,), float(step)), "n": torch.tensor(step)}
    return State(net, {}, {"w": net["w"] + 1}, {"optimizer": {"lr": 0.1, "buffer": net["w"]}}, Progress(step=step))


def test_round_trip(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(3), best=True)
    for name in ("last", "best"):
        loaded = checkpoint.load(tmp_path, name)
        assert torch.equal(loaded.net["w"], torch.full((1000,), 3.0))
        assert torch.equal(loaded.ema["w"], torch.full((1000,), 4.0))
        assert loaded.rest["optimizer"]["lr"] == 0.1
        assert loaded.progress == Progress(step=3)


def test_best_and_one_older_checkpoint_stay(tmp_path: Path) -> None:
    for step in range(1, 7):
        checkpoint.save(tmp_path, state(step), best=step == 2)
    assert checkpoint.load(tmp_path, "best").progress.step == 2
    assert checkpoint.load(tmp_path, "last").progress.step == 6
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002", "step-00000005", "step-00000006"]


def test_the_same_step_twice(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(5))
    again = state(5)
    again.progress.finished = True
    checkpoint.save(tmp_path, again)
    assert checkpoint.load(tmp_path).progress.finished


def test_a_failed_save_leaves_the_earlier_one_and_no_scrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, state(1))
    before = sorted(p.name for p in tmp_path.iterdir())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(FgvcError, match="No space left.*earlier one is intact"):
        checkpoint.save(tmp_path, state(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert checkpoint.load(tmp_path).progress.step == 1


def test_damage_is_named(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(1))
    file = tmp_path / "last" / "net.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(FgvcError, match="damaged checkpoint"):
        checkpoint.load(tmp_path)


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    checkpoint.save(tmp_path, state(1))
    torch.save({"optimizer": Evil()}, tmp_path / "last" / "state.pt")
    with pytest.raises(FgvcError, match="damaged checkpoint"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "owned").exists()


def save_on(folder: Path, step: int) -> None:
    print("ready", flush=True)
    while True:
        step += 1
        checkpoint.save(folder, state(step, size=200_000), best=step % 3 == 0)


def test_killed_at_any_moment_the_last_checkpoint_loads(tmp_path: Path) -> None:
    tmp_path, printed, step = tmp_path / "ckpt", tmp_path / "said", 0
    checkpoint.save(tmp_path, state(0, size=200_000))
    for kill in range(4):
        child = start(printed, save_on, tmp_path, step)
        while not ((printed / "stdout").is_file() and child.stdout):
            assert child.returncode is None, child.stderr
            time.sleep(0.005)
        for _ in range(8):
            time.sleep(0.013 * (1 + kill))
            assert checkpoint_is_whole(tmp_path)
        child.send_signal(signal.SIGKILL)
        assert child.wait().returncode == -signal.SIGKILL
        (printed / "stdout").unlink()
        loaded = checkpoint.load(tmp_path)
        assert loaded.progress.step >= step
        assert torch.equal(loaded.net["w"], torch.full((200_000,), float(loaded.progress.step)))
        step = loaded.progress.step
        checkpoint.save(tmp_path, state(step + 1, size=200_000))
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "scraps of the killed process stay"
        step += 1
    assert step > 0


def checkpoint_is_whole(folder: Path) -> bool:
    """A reader beside the writer: the link may move on while it reads, but what it points at is complete."""
    target = folder / os.readlink(folder / "last")
    names = {p.name for p in target.iterdir()} if target.exists() else None
    return names is None or {"net.safetensors", "ema.safetensors", "state.pt", "meta.json"} <= names
