"""Rungs in processes of their own: training, or the timing of a few of its steps.

`python -m fgvc.improvement.work` imports all that these need, once, and forks a process for each line of its standard input,
a JSON object: {"name", "words", "log", "threads"} begins one, {"stop": name} stops it, {"kill": name} kills it. On standard
output it says how each ended: {"name", "code"}. At the end of its standard input, as when the command was killed, it stops all:
each saves a checkpoint.
"""

from __future__ import annotations

import json
import os
import select
import signal
import statistics
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from fgvc.api import interpolate
from fgvc.config.images import Preprocess
from fgvc.config.recipe import Recipe
from fgvc.data.loader import evaluation_loader
from fgvc.data.recipe import load_recipe
from fgvc.errors import FgvcError
from fgvc.io.files import file_lock
from fgvc.models.backbone import memory_format
from fgvc.runs.distributed import process_group
from fgvc.runs.folder import LOCK
from fgvc.training.forecast import peak_memory
from fgvc.training.log import Events
from fgvc.training.optimizer_step import optimizer_step
from fgvc.training.session import Session, open_session
from fgvc.training.trainer import train

STEPS = 3  # that are timed, after one that sets up
PATIENCE = 60.0  # seconds that an earlier command's process has to save and end


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Measured costs of a rung on this machine, with one thread a process as it will run."""

    start: float  # seconds until it is ready to train: images, net
    step: float  # seconds of a step, with the loading of its images
    batch: int  # images of a step
    look: float  # seconds of an image in evaluation, with its loading
    teacher_look: float = 0.0  # the same of teachers whose heads are fitted first; 0: there are none
    peak_bytes: int
    device: str
    weights_bytes: int = 0  # of all parameters and buffers
    precision: str = "fp32"  # the faster one


def timing(recipe: Recipe, started: float) -> Timing:
    """Time a few real steps of a recipe, and the evaluation of a batch. `started`: by `time.monotonic`."""
    with process_group(recipe.train) as process, open_session(recipe, process, teachers="to time") as session:
        start = time.monotonic() - started
        with TemporaryDirectory() as scratch:
            events = Events(Path(scratch), recipe.log, active=False)
            batches = session.loader.epoch(0)
            seconds = []
            for _ in range(min(STEPS + 1, session.steps_per_epoch)):
                began = time.monotonic()
                optimizer_step(session, batches, events)
                if process.device.type != "cpu":
                    torch.accelerator.synchronize()
                seconds.append(time.monotonic() - began)
        look = _look(session, session.step.net.eval(), session.preprocess)
        teacher_look = sum(_look(session, probed.net, probed.spec) for probed in session.probed.values())
        timed = seconds[1:] or seconds
        return Timing(
            start=start, step=statistics.median(timed), batch=session.batch, look=look, teacher_look=teacher_look,
            peak_bytes=peak_memory(process.device), device=process.device.type, weights_bytes=_weights_bytes(session.step),
            precision=session.process.precision,
        )  # fmt: skip


def _weights_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def _look(session: Session, net: nn.Module, spec: Preprocess) -> float:
    """Seconds of one image in evaluation, with its loading."""
    rows = session.index.rows("train")[: 2 * session.batch]
    began = time.monotonic()
    with torch.inference_mode():
        for batch in evaluation_loader(session.index, rows, spec=spec, batch_size=session.batch, workers=0):
            net(batch.images.to(session.process.device, memory_format=memory_format(net))).cpu()
    return (time.monotonic() - began) / len(rows)


def work(words: list[str]) -> int:
    """Do `time RECIPE` or `train RECIPE RUN [BETWEEN]`; returns the exit code. BETWEEN: a folder for the net between the run's
    start and its end that the images that choose like best."""
    started = time.monotonic()
    try:
        recipe = load_recipe(Path(words[1]))
        if words[0] == "time":
            print(json.dumps(asdict(timing(recipe, started))))
        else:
            _wait_for(Path(words[2]))
            run = train(recipe, Path(words[2]))
            if len(words) > 3 and not Path(words[3]).exists():
                _interpolate(run, Path(words[3]))
    except FgvcError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _interpolate(run: Path, between: Path) -> None:
    """The best net between a run's start and its end, if there is a way: not where the start's head had learnt nothing."""
    try:
        interpolate(run, between)
    except FgvcError as error:
        print(f"no way between the start and the end: {error}", file=sys.stderr)


def _wait_for(run: Path) -> None:
    """Wait for a process of an earlier command that was killed: it may still be saving."""
    if (run / LOCK).is_file():
        with file_lock(run / LOCK, wait=PATIENCE):
            pass


def _begin(order: dict[str, Any]) -> int:
    """Fork a process that carries out an order; returns its number."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        torch.set_num_threads(order["threads"])
        code = work(order["words"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Carry out orders, one JSON object a line on standard input, until that is closed and all processes have ended."""
    running: dict[int, str] = {}
    pending, open_ = b"", True
    while open_ or running:
        ready = select.select([0] if open_ else [], [], [], 0.1)[0]
        if ready:
            read = os.read(0, 65536)
            *lines, pending = (pending + read).split(b"\n")
            for order in map(json.loads, lines):
                if "name" in order:
                    running[_begin(order)] = order["name"]
                for word, number in (("stop", signal.SIGTERM), ("kill", signal.SIGKILL)):
                    for pid in [pid for pid, name in running.items() if name == order.get(word)]:
                        os.kill(pid, number)
            if not read:
                open_ = False
                for pid in running:
                    os.kill(pid, signal.SIGTERM)
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            if open_:
                print(json.dumps({"name": running[pid], "code": os.waitstatus_to_exitcode(status)}), flush=True)
            del running[pid]


if __name__ == "__main__":
    serve()
