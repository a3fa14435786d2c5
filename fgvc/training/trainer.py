"""The training loop. It reads top to bottom, and no line of it depends on which techniques are on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from fgvc.config.exporting import refuse_opset
from fgvc.config.recipe import Recipe
from fgvc.data.quality.stored import spot_check
from fgvc.data.recipe import resolve_data
from fgvc.errors import FgvcError
from fgvc.evaluation.metrics import SMALLER_IS_BETTER, Scores
from fgvc.evaluation.png_plots import plot_confusion, plot_curves
from fgvc.io.files import write_atomic
from fgvc.io.names import some
from fgvc.models.finite import not_finite, suspicious
from fgvc.runs import checkpoint
from fgvc.runs.deployed import RECORD, record_of
from fgvc.runs.distributed import process_group
from fgvc.runs.folder import (
    RunStatus,
    claim_run,
    continue_run,
    end_setting,
    logged_finished,
    new_run_advice,
    read_run,
    recorded_preprocess,
    refuse_changed,
    required_start,
    resumed_recipe,
    start_run,
    update_settings,
)
from fgvc.runs.images import resumed_index
from fgvc.runs.record import Record
from fgvc.runs.trackers import refuse_missing
from fgvc.runs.weights import preprocess_fault
from fgvc.training.epoch_start import epoch_start
from fgvc.training.finite_check import TERM, not_finite_error, refuse_not_finite, state_tensors
from fgvc.training.floor import Floor, fit_floor, floor_comparison, floor_head, put_floor_head
from fgvc.training.interruption import advice_on_failure, interruptible
from fgvc.training.log import Events
from fgvc.training.means import RunningMeans
from fgvc.training.optim import learning_rate, learning_rates
from fgvc.training.optimizer_step import optimizer_step
from fgvc.training.refit import refit_recipe
from fgvc.training.session import Session, open_session
from fgvc.training.settle import few_words, settle_best
from fgvc.training.sheet import sample_sheet
from fgvc.training.start import fit_teachers, fit_unfolded
from fgvc.training.validate import score, start_doubt


def train(recipe: Recipe, out: Path, *, resume: str = "auto", overwrite: bool = False, recorded: bool = False) -> Path:
    """Train to the end of the schedule, or to `train.max_steps`; return `out`, or the folder of its refit (`train.refit`) where
    that could be another net.

    Goes on from `out`'s last checkpoint if that run is unfinished: killed at any moment and started again, it ends (on CPU)
    with the same bits as an uninterrupted one, and with the images that it recorded when it began: it refuses a set that has
    changed since. `recorded`: whatever has come to the set, as long as all of their files are there. A run that is finished by
    these settings stays as it is. Raises FgvcError for what the user can mend, KeyboardInterrupt after saving.
    """
    recipe = resolve_data(recipe)
    _train(recipe, out, resume=resume, overwrite=overwrite, recorded=recorded)
    if not recipe.train.refit:
        return out
    refit, folder, message = refit_recipe(out)
    if os.environ.get("RANK", "0") == "0":  # torchrun's
        Events(out, recipe.log).say(f"{folder}: {message}")
    if refit is not None:
        _train(refit, folder, resume="auto", overwrite=overwrite, recorded=recorded)
    return folder


def _train(recipe: Recipe, out: Path, *, resume: str, overwrite: bool, recorded: bool) -> None:
    with process_group(recipe.train) as process, ExitStack() as stack:
        events = Events(out, recipe.log, active=process.main)
        claimed: list[RunStatus] = ["new"]

        def claim() -> None:  # for all ranks, as long as the first one lives
            run = claim_run(out, recipe, resume=resume, overwrite=overwrite, recorded=recorded, say=events.say)
            claimed[0] = stack.enter_context(run)

        process.first(lambda: refuse_missing(recipe.log))
        process.first(claim)
        status = process.gather(claimed[0])[0]
        if status == "new":
            refuse_opset(recipe.export.exporter, recipe.export.opset)  # hours before it is exported
        if status == "finished":
            process.first(lambda: update_settings(out, recipe, recorded=recorded))
            _say_finished(read_run(out), out, events)
            return
        resumed: dict[str, Any] = {}
        if status == "on":
            recipe = resumed_recipe(recipe, read_run(out))
            recipe = recipe.model_copy(update={"select": recipe.selected})  # an earlier fgvc chose by the recipe alone
            index = resumed_index(out, recipe, recorded=recorded)
            resumed = {"index": index, "preprocess": recorded_preprocess(out), "start_state": required_start(out, recipe)}
        built = open_session(recipe, process, **resumed, notify=events.say, out=out)
        with advice_on_failure(recipe, out), built as session:
            _begin_or_resume(session, out, events, goes_on=status == "on")
            stack.enter_context(events.tracked(session.recipe, session.progress.step if status == "on" else None))
            _describe(session, events)
            if status == "new":
                events.trackers.picture("samples", lambda: sample_sheet(session), 0)
                _start(session, out, events)
            _run_epochs(session, out, events)


def _say_finished(recipe: Recipe, out: Path, events: Events) -> None:
    """Report that the run is finished, and write what it lacks if it was killed after its last checkpoint."""
    progress = checkpoint.read_progress(out / "ckpt", say=events.say)
    if events.active and not logged_finished(out):
        with events.tracked(recipe, progress.step):
            settle_best(out, recipe)
            _end(out, events, progress, recipe)
    advice = f"To go on raise {end_setting(recipe, progress)}; to lose it give --overwrite"
    events.say(f"{out}: this run is finished. {advice}")


def _begin_or_resume(session: Session, out: Path, events: Events, *, goes_on: bool) -> None:
    """Begin or resume a run: the folder is changed only now, when all is built and nothing more can be refused."""
    process = session.process
    facts: dict[str, Any] = {
        "labels.json": list(session.index.classes),
        "preprocess.json": session.preprocess.model_dump(mode="json"),
    }
    if (onnx := session.recipe.model.onnx) is not None:
        facts[RECORD] = record_of(onnx)
    if not goes_on:
        process.first(lambda: start_run(out, session.recipe, facts, Record.of(session.index)))
        return
    state = checkpoint.load(out / "ckpt", say=lambda _: None)  # `run_status` has reported it
    if (reason := preprocess_fault(out, state)) is not None:
        raise FgvcError(reason)
    finished, done = state.progress.finished, state.progress.step
    over = done == session.total_steps > 0 and (finished or not state.progress.sums)
    if done > session.total_steps or over:
        raise FgvcError(
            f"{out}: this run has made {done} steps, and the settings now end at {session.total_steps}: nothing is left to "
            f"do. Raise {end_setting(session.recipe, state.progress)}, or choose another --out"
        )
    _refuse_other_processes(state, session, out)
    recorded_best, state.progress.best = state.progress.best, checkpoint.best_score(out / "ckpt")
    if recorded_best is not None and state.progress.best is None:
        events.say(f"WARNING: {out}/ckpt/best: gone or damaged; the best of the epochs to come takes its place")
    if (reason := checkpoint.fault(out / "ckpt", "start")) is not None:
        events.say(f"WARNING: {out}/ckpt/start: {reason}; the run goes on without what it started from")
    if bad := not_finite(state_tensors(state)):  # as an earlier fgvc saved them
        message = f"its checkpoint of step {done} holds values that are NaN or infinite: {some(bad)}"
        raise not_finite_error(message, out=out, recipe=session.recipe)
    session.restore(state)
    process.gather(done)  # all have read it
    process.first(lambda: refuse_changed(out, facts))
    process.first(lambda: checkpoint.repair(out / "ckpt"))
    if finished:  # an extended run is unfinished from now on, whatever happens next
        _save(session, out)
    process.first(lambda: continue_run(out, session.recipe, session.index))
    events.write("resume", step=session.progress.step)
    events.say(f"going on at step {session.progress.step} of {session.total_steps}")


def _refuse_other_processes(state: checkpoint.State, session: Session, out: Path) -> None:
    """Raise FgvcError where the run was trained by another number of processes, each of which has its own random numbers."""
    then, now = len(state.rest["rng"]), session.process.world
    if then != now:
        launch = f"by torchrun --nproc-per-node={then} -m fgvc train ..." if then > 1 else "without torchrun"
        raise FgvcError(
            f"{out}: this run was trained by {then} process(es) and would go on by {now}: start it {launch} (train.device=cpu "
            f"where there are fewer GPUs). {new_run_advice(out)}"
        )


def _start(session: Session, out: Path, events: Events) -> None:
    """Fit norms and heads before the first step, score the start, and save it at once: a resumed run never fits anew."""
    if (unfolded := fit_unfolded(session)) is not None:
        events.write("unfolded", **asdict(unfolded))
        events.say(str(unfolded))
    floor = fit_floor(session)
    events.say(floor if isinstance(floor, str) else str(floor))
    if isinstance(floor, Floor):
        events.write("floor", **floor.facts)
        if session.recipe.model.head == "probe":
            put_floor_head(session, floor)
    for teacher, fit in fit_teachers(session).items():
        events.write("teacher", name=teacher, **asdict(fit))
        events.say(f"{teacher}: {fit}")
    scores = score(session, out)
    if doubt := start_doubt(scores, session.recipe.model):
        events.say(f"WARNING: {doubt}")
    if session.validated:  # it is the first of those that validation chooses among
        events.write("validated", step=0, **{f"val_{name}": value for name, value in scores.numbers().items()})
        session.progress.best, session.progress.best_epoch = scores.numbers()[session.recipe.select_by], 0
    _save(session, out, start=True, best=session.validated, floor=floor if isinstance(floor, Floor) else None)


def _run_epochs(session: Session, out: Path, events: Events) -> None:
    progress, recipe = session.progress, session.recipe
    session.keep_absent_rows()
    if not session.total_steps:  # the start ships
        progress.finished = True
        _save(session, out)
    with events.progress(session.total_steps, progress.step), interruptible() as interrupted:
        while not progress.finished:
            for _, prepare in session.step.hooks("before_epoch"):
                prepare(epoch_start(session, out, events, stop=interrupted))
            for losses, count in _steps(session, events):
                _check_step(session, losses, out)
                _log(session, losses, count, events)
                due = recipe.checkpoint.every_steps is not None and progress.step % recipe.checkpoint.every_steps == 0
                stop = session.process.agreed(interrupted.is_set())  # a signal reaches each process in a step of its own
                if stop or (due and not session.epoch_done):
                    _save(session, out)
                if stop:
                    raise KeyboardInterrupt(f"saved at step {progress.step}")
            _end_epoch(session, out, events)
    session.process.first(lambda: settle_best(out, recipe))  # a refit reads in each process what ships
    if session.process.main:
        _end(out, events, progress, recipe)


def _end(out: Path, events: Events, progress: checkpoint.Progress, recipe: Recipe) -> None:
    """Write what follows the last checkpoint: curves, the comparison with the floor, and the event that ends the log."""
    write_atomic(out / "plots" / "curves.png", plot_curves(progress.history))
    comparison = floor_comparison(out, recipe)
    facts = {} if comparison is None else {"standing": comparison.facts}
    events.write("finished", step=progress.step, seconds=round(progress.seconds, 1), **facts)
    for picture in ("curves", "confusion"):
        if (file := out / "plots" / f"{picture}.png").is_file():
            events.trackers.picture(picture, file.read_bytes, progress.step)
    for line in [] if comparison is None else comparison.lines(recipe):
        events.say(line)


def _steps(session: Session, events: Events) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Run the rest of the epoch that `progress` is in; yields each optimizer step's losses and number of images."""
    progress, per_step = session.progress, session.recipe.train.grad_accum_steps
    micro_batches = session.loader.epoch(progress.epoch, start=progress.micro)
    for _ in range(progress.micro // per_step, session.steps_per_epoch):
        if progress.step >= session.total_steps:
            return
        started = time.perf_counter()
        session.schedule.step_update(progress.step)
        losses, count = optimizer_step(session, micro_batches, events)
        progress.step += 1
        progress.micro += per_step
        progress.seconds += time.perf_counter() - started
        yield losses, count


def _check_step(session: Session, losses: Mapping[str, Tensor], out: Path) -> None:
    """Raise FgvcError on all processes where the loss, the gradients or what the step has moved are not finite on one, or where
    fp16 skips every step. A step waits for this value: none may go on, or be saved, with numbers that are none."""
    watched = session.finite_check.tensors(losses["loss"])
    if session.process.anywhere(suspicious(watched.values())):
        measures = {f"{kind}.{name}" for kind, technique in session.step.techniques.items() for name in technique.measures}
        terms = {f"{TERM}{name}": value for name, value in losses.items() if name not in {"loss", *measures}}
        of_loss = {"the loss": losses["loss"]} | ({} if losses["loss"].isfinite() else terms)
        _check_finite(session, out, of_loss | watched, f"step {session.progress.step}")
    step = session.progress.step
    if reason := session.finite_check.skipped(step, last=step >= session.total_steps):
        raise not_finite_error(reason, out=out, recipe=session.recipe)


def _check_finite(session: Session, out: Path, tensors: Mapping[str, Tensor], when: str) -> None:
    refuse_not_finite(tensors, when=when, out=out, recipe=session.recipe, process=session.process)


def _log(session: Session, losses: Mapping[str, Tensor], images: int, events: Events) -> None:
    """Add the losses to the epoch's means, and write a line every few steps."""
    progress = session.progress
    session.means.add(losses)
    events.moved(progress.step)
    if progress.step % events.log.every_steps == 0 or progress.step == session.total_steps:
        rate = progress.step * images / max(progress.seconds, 1e-9)
        lr = learning_rate(session.optimizer)
        events.step(
            progress.step,
            session.total_steps,
            epoch=progress.epoch,
            losses={name: float(value) for name, value in losses.items()},
            rates=learning_rates(session.optimizer),
            lr=lr,
            rate=rate,
        )


def _end_epoch(session: Session, out: Path, events: Events) -> None:
    """Validate on the weights that would ship, write the epoch's row, save, and move on."""
    progress = session.progress
    row: dict[str, float] = {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        "lr": learning_rate(session.optimizer),
    }
    row |= session.means.means()
    for name in session.means.undefined():
        if not progress.history or name in progress.history[-1]:  # else the epoch before has said so
            events.say(f"WARNING: {name}: finite in no step of epoch {row['epoch']}: metrics.csv has no value of it")
    last = progress.step >= session.total_steps
    if session.recipe.train.precise_bn and last:
        session.reestimate_norms()
    if session.epoch_done:
        session.average_epoch()
    _check_finite(session, out, session.finite_check.tensors(), f"the end of epoch {progress.epoch + 1}, step {progress.step}")
    due = last or (progress.epoch + 1) % session.recipe.train.validate_every == 0
    scores = score(session, out) if due else None
    scores = scores if session.validated else None
    best = scores is not None and _is_best(session, scores)
    if scores is not None:
        row |= {f"val_{name}": value for name, value in scores.numbers().items() if name != "images"}
    progress.history = [old for old in progress.history if old["epoch"] != row["epoch"]] + [row]
    if session.epoch_done:  # not so where train.max_steps ends the run in mid-epoch
        progress.epoch, progress.micro = progress.epoch + 1, 0
        session.means = RunningMeans()
    early = session.process.agreed(scores is not None and not last and progress.ended_early(session.recipe.train))
    progress.finished = last or early
    if scores is not None and progress.finished and session.process.main:  # of 200 classes it takes a second
        picture = plot_confusion(scores.confusion, session.index.classes, title="validation")
        write_atomic(out / "plots" / "confusion.png", picture)
    events.write("epoch", **row)
    events.table(progress.history)
    _save(session, out, best=best, score=None if scores is None else scores.numbers()[session.recipe.select_by])
    left = "" if progress.finished else events.left(progress.step, session.total_steps)
    remark = f", validation top-1 {100 * scores.top1:.2f} %" if scores else ""
    events.say(f"epoch {int(row['epoch'])}/{session.recipe.train.epochs}: loss {row['loss']:.4f}{remark}{left}")
    if early:
        events.say(
            f"ended early: validation ({session.recipe.select_by}) was the best after epoch {progress.best_epoch}, and "
            f"train.patience is {session.recipe.train.patience}"
        )


def _is_best(session: Session, scores: Scores) -> bool:
    """Whether these scores, of the epoch that ends, are the best so far; if so they are recorded as these."""
    progress, by = session.progress, session.recipe.select_by
    value = scores.numbers()[by]
    best = progress.best is None or (value < progress.best if by in SMALLER_IS_BETTER else value > progress.best)
    if best:
        progress.best, progress.best_epoch = value, progress.epoch + 1
    elif progress.best_epoch is None:  # in a run of an earlier fgvc: patience begins now
        progress.best_epoch = progress.epoch
    return best


def _save(
    session: Session,
    out: Path,
    *,
    best: bool = False,
    score: float | None = None,
    start: bool = False,
    floor: Floor | None = None,
) -> None:
    session.progress.score = score
    state = session.capture()
    if floor is not None:
        state.floor, state.rest = floor_head(session.step.net, floor), {**state.rest, "floor": floor.record}
    _check_finite(session, out, state_tensors(state), f"step {session.progress.step}")
    if session.process.main:
        settings = session.recipe.checkpoint
        checkpoint.save(
            out / "ckpt", state, best=best, keep=settings.keep, keep_best=settings.keep_best,
            smaller=session.recipe.select_by in SMALLER_IS_BETTER, start=start,
        )  # fmt: skip
    session.process.barrier()


def _describe(session: Session, events: Events) -> None:
    """Write down what was built: data, model, schedule, and doubts about them."""
    recipe, index = session.recipe, session.index
    doubts = [*session.weights.doubts, *index.warnings]
    if session.batch < recipe.train.images:
        doubts.append(f"train.batch_size: {recipe.train.batch_size} is more than there are: a step takes {session.batch} images")
    doubts += spot_check(index, index.rows("train")) if session.process.main else []
    for doubt in doubts:
        events.say(f"WARNING: {doubt}")
    counts = ", ".join(f"{split} {len(index.rows(split))}" for split in ("train", "val", "test"))
    details = [text for text in (counts, f"{len(index.classes)} classes") if text not in index.recognised]
    lines = [
        f"data: {index.recognised}" + f" ({'; '.join(details)})" * bool(details),
        f"model: {recipe.model.name}, weights {session.weights.origin}, input {session.preprocess.size}, "
        f"mean {session.preprocess.mean}, std {session.preprocess.std}",
        f"training: {session.total_steps} steps of {session.batch} images on {session.process.device}, "
        f"{session.process.world} process(es), {recipe.train.precision}; ships: {recipe.selected}",
        *session.choices,
        *session.step.attachments.notes,
        *few_words(len(index.rows("val"))),
    ]
    for line in lines:
        events.say(line)
    events.write("start", total_steps=session.total_steps, classes=len(index.classes), notes=lines, warnings=doubts)
