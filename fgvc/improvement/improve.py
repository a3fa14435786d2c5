"""From a deployed file and a folder of images to a better file (`fgvc improve`), top to bottom."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fgvc.api import export
from fgvc.config.loading import load, validate
from fgvc.config.recipe import Recipe
from fgvc.data.unseen import parse_seen
from fgvc.errors import FgvcError
from fgvc.evaluation.compared import Images, PairedAnswers, collect_answers
from fgvc.evaluation.paired import Gate, wilson
from fgvc.evaluation.side import open_sides
from fgvc.improvement.clock import Clock, seconds_of
from fgvc.improvement.ladder import BASE, FINAL, PLAIN, Plan, candidates, plan_ladder
from fgvc.improvement.on_ray import refuse_missing_ray
from fgvc.improvement.page import write_page
from fgvc.improvement.recipes import merged, recipe_of, write_recipe
from fgvc.improvement.request import Request, refuse_other_words
from fgvc.improvement.rungs import Ladder
from fgvc.improvement.search import held, join, refuse_missing
from fgvc.improvement.side_by_side import Ended, Job, Workers, last_json, workers
from fgvc.improvement.task import Task, look
from fgvc.improvement.verdict import Verdict, judge, read_verdict
from fgvc.improvement.view import View
from fgvc.improvement.work import Timing
from fgvc.io.display import Display
from fgvc.io.files import as_json, file_lock, holder, make_folder, refuse_place, rename, write_atomic, writing
from fgvc.io.names import some
from fgvc.report.document import duration
from fgvc.runs.folder import LOCK
from fgvc.runs.images import first_index, read_index
from fgvc.runs.loaded import load_run, onnx_answers
from fgvc.runtime.bundle import read_json
from fgvc.runtime.engine import available_cpus
from fgvc.runtime.stack import stack_of
from fgvc.training.automatic import free_bytes

TIMING_SHARE = 1 / 4  # of the budget, after which what is not timed is left out; but for the base
LONG = 180.0  # seconds of a budget, from which more than the plain recipe is timed
MEMORY_SHARE = 0.8  # of what is free, that the rungs side by side may take
RUN_SIZE = 8  # a run's folder over its weights: checkpoints with averages and the optimizer's state


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Improvement(Display):
    """Result of an improvement. `bundle`: the better file with all that belongs to it; None: none is shown to be better, or
    `dry_run`."""

    folder: Path
    plan: Plan
    verdict: Verdict | None
    bundle: Path | None
    candidate: Path | None
    report: Path | None

    @property
    def exit_code(self) -> int:
        """0: better, or nothing was to be trained; 3: not."""
        return 0 if self.verdict is None or self.verdict.better else 3

    @property
    def facts(self) -> Mapping[str, object]:
        if self.verdict is None:
            return {"": self.folder, "planned": f"{len(self.plan.rungs)} rungs"}
        return {"": self.folder, "verdict": self.verdict.sentence("it"), "page": self.report}


def improve(
    target: str | Path,
    data: str | Path,
    out: str | Path = "better",
    *,
    budget: str | float = "1h",
    starts: Sequence[str] = (),
    labels: str | Path | None = None,
    preprocess: str | Path | None = None,
    seen: str | Path = "train",
    unseen: str | Path | None = None,
    unlabelled: str | Path | None = None,
    size: tuple[int, int] | None = None,
    min_gain: float | None = None,
    max_negative_flips: str | None = None,
    seed: int = 0,
    search: bool = False,
    on: Literal["ray"] | None = None,
    dry_run: bool = False,
) -> Improvement:
    """Look for better weights for a deployed classifier within a budget, and show that they are better (docs/improve.md).

    `target`: an .onnx file, or timm's name of a net where none is deployed yet; `data`: labelled images. Everything lies in
    `out`: the same call goes on where an earlier one ended. `budget`: working time, `20m` or seconds. `starts`: other pretrained
    weights, `NAME=FILE`: of this net they are tried, of others they teach. `labels`, `preprocess`: of the file, where nothing
    beside it says them. `seen`: what the file was trained on: train (the set's own train split), none, or a list of paths;
    `unseen`: a folder of images that it has not seen; `unlabelled`: of more, that a teacher names. `size`: (height, width) of the
    network's input where no file says it.
    `min_gain`, `max_negative_flips`: gates beside the gain's interval. `search`: around the winner's settings by Optuna, for a
    part of the budget; a second call on the same folder shares it; `on`: ray, on a cluster. `dry_run`: stop when the plan
    is made.

    Raises FgvcError for what can't be (all that is missing at once), NoUnseenImagesError where no image could judge,
    KeyboardInterrupt after saving.
    """
    request = Request(
        target=str(target), data=Path(data).expanduser(), budget=seconds_of(budget),
        labels=_path(labels), preprocess=_path(preprocess),
        seen=parse_seen(os.path.expanduser(seen)) or "train",
        unseen=_path(unseen), unlabelled=_path(unlabelled), starts=tuple(starts), size=size, seed=seed,
        search=search, min_gain=min_gain, max_negative_flips=max_negative_flips,
    )  # fmt: skip
    return run_improvement(request, Path(out), on_ray=on == "ray", dry_run=dry_run)


def _path(place: str | Path | None) -> Path | None:
    return None if place is None else Path(place).expanduser()


def run_improvement(request: Request, out: Path, *, on_ray: bool = False, dry_run: bool = False) -> Improvement:
    """Run the improvement that a request asks for; see `improve`."""
    gate = Gate(max_negative_flips=request.max_negative_flips, min_gain=request.min_gain)
    if on_ray:
        if not request.search:
            raise FgvcError("--on ray: is for the search, give --search")
        refuse_missing_ray()
    if request.search:
        refuse_missing()
        if _held(out):
            return _joined(request, out)
    with _claimed(out) as clock, View(out, clock) as view, workers() as pool:
        task = look(request, out, view.say)
        for line in task.lines():
            view.say(line)
        standing = _standing(task, out, view)
        plan = _plan(request, task, out, clock, view, pool)
        if dry_run:
            return Improvement(folder=out, plan=plan, verdict=None, bundle=None, candidate=None, report=None)
        command = request.command(out)
        ladder = Ladder(
            task, plan, out, clock, pool, say=view.say, tick=view.tick, command=command, standing=standing, on_ray=on_ray,
            flips=gate.flip_share(task.counts["test"]),
        )  # fmt: skip
        verdict = _judged(out)
        if verdict is None:
            view.begin(ladder)
            ladder.climb()
            verdict = _judge(task, ladder, out, gate, view, standing)
        place, report = _placed(out, verdict), out / "report.html"
        view.say(f"written: {report}")
        shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in (*verdict.others.items(), ("new", verdict.new)))
        view.say(f"on the {verdict.images} images that judge: {shares}")
        if (floor := verdict.others.get("floor", 0.0)) > verdict.new:
            view.say(f"the floor, a logistic regression on the frozen net, names more of these: {100 * floor:.1f} %")
        view.say(verdict.sentence(task.name))
        return Improvement(
            folder=out, plan=plan, verdict=verdict, bundle=place if verdict.better else None,
            candidate=None if verdict.better else place, report=report,
        )  # fmt: skip


def _held(out: Path) -> bool:
    """Whether another process works in the folder and has fixed its plan."""
    return (out / "plan.json").is_file() and held(out)


def _joined(request: Request, out: Path) -> Improvement:
    """Share the search of the process that works in the folder. Raises FgvcError where that asks for something else, or for no
    search."""
    refuse_other_words(request, out)
    plan = Plan.read(read_json(out / "plan.json", dict))
    with workers() as pool:
        seed = request.seed + os.getpid()
        join(out, slots=plan.slots, seed=seed, pool=pool, say=lambda line: print(line, file=sys.stderr, flush=True))
    return Improvement(folder=out, plan=plan, verdict=None, bundle=None, candidate=None, report=None)


@contextmanager
def _claimed(out: Path) -> Iterator[Clock]:
    """Lock the folder, so that this process alone works there, and count the working time."""
    others = out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir())  # a kill leaves .lock, at first
    if others and not (out / "clock.json").is_file():
        raise FgvcError(f"{out}: not empty, and not the folder of an improvement; choose another --out")
    refuse_place(out)
    with writing(out):
        make_folder(out)
    with file_lock(lock := out / LOCK) as locked:
        if not locked:
            raise FgvcError(f"{out}: is being worked on by {holder(lock)}; wait for it, or choose another --out")
        clock = Clock(out / "clock.json")
        clock.tick(always=True)
        try:
            yield clock
        finally:
            clock.tick(always=True)


def _standing(task: Task, out: Path, view: View) -> NDArray[np.bool_]:
    """Right answers (N,) of the deployed file on the images that choose; empty without a file or such images."""
    if task.file is None or not task.chooses:
        return np.empty(0, bool)
    file = out / "standing.json"
    if not file.is_file():
        path, recipe = Path(task.file), validate(Recipe, task.recipe, where=str(out))
        index = read_index(recipe, copies=False)
        stack = stack_of(path)
        assert stack.preprocess is not None  # it was kept with the file
        answers = onnx_answers(stack.session(), index, index.rows("val"), spec=stack.preprocess, workers=0)
        write_atomic(file, as_json({"right": (answers.logits.argmax(1) == answers.labels).astype(int).tolist()}))
    right = np.array(read_json(file, dict)["right"], bool)
    low, high = wilson(float(right.mean()), len(right))
    view.say(
        f"where it stands: {100 * right.mean():.1f} % of the {len(right)} images that choose "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f})"
    )
    return right


def _plan(request: Request, task: Task, out: Path, clock: Clock, view: View, pool: Workers) -> Plan:
    """The plan as it was fixed, or a new one from timed steps."""
    file = out / "plan.json"
    if file.is_file():
        plan = Plan.read(read_json(file, dict))
        if plan.budget != request.budget:
            view.say(f"the plan was made for {duration(plan.budget)}, and stays; another --out makes another")
    else:
        timings, slots = _timings(task, out, clock, view, pool, budget=request.budget)
        plan = plan_ladder(task, timings, budget=request.budget, spent=clock.seconds, slots=slots, search=request.search)
        _refuse_full(out, plan, timings)
        write_atomic(file, as_json(plan.record))
    view.plan(plan)
    return plan


def _refuse_full(out: Path, plan: Plan, timings: Mapping[str, Timing]) -> None:
    """Raise FgvcError where the disk has no room for the runs: not after an hour's training."""
    runs = sum(rung.runs for rung in plan.rungs)
    need = RUN_SIZE * max(timing.weights_bytes for timing in timings.values()) * (runs + 2)
    if (free := shutil.disk_usage(out).free) < need:
        raise FgvcError(
            f"{out}: {free / 2**30:.1f} GB are free on its disk, and {runs} runs need about {need / 2**30:.1f} GB; "
            "free some, or choose an --out on another disk"
        )


def _timings(
    task: Task, out: Path, clock: Clock, view: View, pool: Workers, *, budget: float
) -> tuple[dict[str, Timing], int]:
    """Time what the rungs cost, as many side by side as will run. Raises FgvcError where the base can't be trained."""
    settings_by_name, precision = (candidates(task), "auto") if budget >= LONG else ({BASE: {}}, "fp32")
    slots = 1 if torch.cuda.is_available() else min(2, available_cpus())
    view.say(f"timing a few steps of {some(list(settings_by_name), 9)}")
    jobs = []
    for name, settings in settings_by_name.items():
        path = out / "recipes" / f"time-{name}.yaml"
        write_recipe(recipe_of(task.recipe, merged(settings, {"train": {"precision": precision}})), path)
        jobs.append(Job(name, ("time", str(path)), out / "logs" / f"time-{name}.log"))
    timings: dict[str, Timing] = {}

    def note(ended: Ended) -> None:
        if ended.code == 0:
            timings[ended.job.name] = Timing(**last_json(ended.job.log))
        elif ended.job.name == BASE and not ended.stopped:
            raise FgvcError(f"the plain recipe can't be trained here: {ended.message}")
        else:
            view.say(f"{ended.job.name} is left out: {ended.message}")

    def is_up() -> bool:
        return clock.seconds > budget * (TIMING_SHARE if BASE in timings else 1)

    pool.run(jobs, slots=slots, until=is_up, tick=lambda running: clock.tick(), done=note)
    if BASE not in timings:
        raise FgvcError(f"--budget: {budget / 60:.0f} min are over before a single step is timed")
    free = free_bytes(torch.device(timings[BASE].device))
    if (need := slots * max(timing.peak_bytes for timing in timings.values())) > MEMORY_SHARE * free:
        slots = 1
        view.say(f"one rung at a time: two would need about {need / 2**30:.1f} GB of memory")
    return timings, slots


def _judged(out: Path) -> Verdict | None:
    """The verdict that an earlier session reached."""
    file = out / "verdict.json"
    return read_verdict(read_json(file, dict)) if file.is_file() else None


def _judge(task: Task, ladder: Ladder, out: Path, gate: Gate, view: View, standing: NDArray[np.bool_]) -> Verdict:
    """Export and prove what ships into `candidate/`, and read the images that judge, once."""
    candidate = out / "candidate"
    view.say(f"exporting {ladder.ships.name}, with all proofs")
    export(ladder.ships, candidate, overwrite=True)
    plain = ladder.run(PLAIN) if ladder.has_run(PLAIN) else None
    # Without a file the baseline is the plain recipe, which may be what ships.
    old = Path(task.file) if task.file is not None else plain or ladder.ships
    answers = _answers(old, candidate, ladder)
    others = {}
    if plain is not None:
        others["plain"] = _right(answers, plain, None)
    floors = (_right(answers, ladder.first_run(name), "floor") for name in (PLAIN, FINAL, BASE) if ladder.has_run(name))
    others["floor"] = next((right for right in floors if right is not None), None)
    beside = {name: right for name, right in others.items() if right is not None}
    verdict = judge(answers.paired, gate, beside, deployed=task.file is not None)
    start = float(standing.mean()) if len(standing) else None
    write_page(task, ladder, answers, verdict, bundle=candidate, start=start, out=out / "report.html")
    write_atomic(out / "verdict.json", as_json(verdict.record))
    return verdict


def _placed(out: Path, verdict: Verdict) -> Path:
    """Move the bundle to its place for deployment if it is better; returns where the model lies."""
    candidate, bundle = out / "candidate", out / "bundle"
    if verdict.better and candidate.exists():
        with writing(bundle):
            rename(candidate, bundle)
    return bundle if verdict.better else candidate


def _answers(old: Path, new: Path, ladder: Ladder) -> PairedAnswers:
    """Compute the answers of both classifiers on the images that judge."""
    recipe = load(Recipe, ladder.out / "recipes" / f"{FINAL}.yaml")
    index = first_index(recipe)
    return collect_answers(*open_sides(old, new), Images(index=index, rows=index.rows("test"), split="judge"))


def _right(answers: PairedAnswers, run: Path, select: Any) -> np.ndarray | None:
    """Right answers (N,) of a run on the same images; None: it has no such weights."""
    try:
        loaded = load_run(run, select)
    except FgvcError:
        return None
    own = loaded.answers(answers.rows, index=answers.images)
    return np.asarray(own.logits.argmax(1) == own.labels)
