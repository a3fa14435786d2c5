"""Handling of what ends a run early: signals, after a checkpoint, and failures that the user can mend."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch.distributed import DistError

from fgvc.config.recipe import Recipe
from fgvc.errors import FgvcError
from fgvc.runs.folder import new_run_advice


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Catch SIGINT and SIGTERM, so that they end the run after the current step, with a checkpoint."""
    interrupted = threading.Event()
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                old = signal.signal(number, lambda *_: interrupted.set())
                stack.callback(signal.signal, number, old)
        yield interrupted


@contextmanager
def advice_on_failure(recipe: Recipe, out: Path) -> Iterator[None]:
    """Raise FgvcError with advice for failures from outside the run: a killed process, lack of memory."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise FgvcError(
                "a loading process was killed, most likely for want of memory. Lower train.workers "
                f"(now {recipe.train.workers}): with the same command the run goes on"
            ) from error
        if isinstance(error, DistError) or "/gloo/" in str(error):
            raise FgvcError(
                f"{out}: another process of this launch has ended, and none goes on alone: it says why unless it was killed. The "
                f"same command goes on from the last checkpoint ({str(error).splitlines()[0][:200]})"
            ) from error
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise FgvcError(
            f"out of memory with train.batch_size={recipe.train.batch_size} at {recipe.image.size} px. "
            f"Raise train.grad_accum_steps (now {recipe.train.grad_accum_steps}; the same steps in smaller micro-batches), "
            "or lower image.size. "
            f"{new_run_advice(out)}"
        ) from error
