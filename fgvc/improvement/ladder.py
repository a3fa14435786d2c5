"""Planning of the ladder of rungs within a budget: pure arithmetic on measured costs.

A rung is an ordinary run. Stages follow one another; the rungs of a stage are independent and run side by side.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from fgvc.config.loading import merge
from fgvc.errors import FgvcError
from fgvc.improvement.task import Task
from fgvc.improvement.work import Timing
from fgvc.training.start import UNFOLD_IMAGES, VIEWS

Stage = Literal["probe", "tune", "teach", "ship"]
STAGES: tuple[Stage, ...] = ("probe", "tune", "teach", "ship")
BASE, TAUGHT, TEACHER, STUDENT, FINAL, PLAIN = "base", "taught", "teacher", "student", "final", "plain"
MOST_EPOCHS = 24
FULL_EPOCHS = 12  # that what ships gets where the budget has them, however short the rungs before it were
TEACHER_SCALE = 1.4  # side of a teacher's input over the network's, about: 160 px are taught at 224
SAFETY = 1.15  # times what was timed
FIT = 1e-4  # seconds of a head's fit for each view of an image, and for each class
ALONE = 0.7  # of its time, that a rung takes with the threads of two
SHIPPING = 30.0  # seconds of export and proofs, and of the page
LOOKS_BETWEEN, LOOKS_JUDGED = 8, 5  # at an image: by the nets between a start and an end, decoded once; by all that are judged
PLAIN_SHARE = 1 / 4  # of the budget, at most
PROBE_SHARE = 1 / 15
SEARCH_SHARE = 0.4  # of what is left of the budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One rung of the ladder: settings to train by. `settings` lie over the task's recipe, for STUDENT and FINAL over the best
    rung's."""

    name: str
    stage: Stage
    what: str  # in words
    settings: Mapping[str, Any]
    epochs: int
    seconds: float  # that a run of it takes, about
    runs: int = 1  # one for each fold
    latest_start: float | None = None  # working time after which it is dropped; None: it is not
    epochs_of: Mapping[str, int] = field(default_factory=dict)  # of FINAL: in as many seconds, where this rung won


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The ladder, cut to its budget and fixed before it starts."""

    budget: float  # seconds of working time
    slots: int  # rungs side by side
    shipping: float  # seconds kept for export, judgement and page
    rungs: tuple[Rung, ...]
    left_out: Mapping[str, str]  # rung -> why
    search: float = 0.0  # seconds at least, of a search around the best
    precision: str = "fp32"  # of all rungs
    timings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def of(self, stage: Stage) -> tuple[Rung, ...]:
        """The rungs of a stage."""
        return tuple(rung for rung in self.rungs if rung.stage == stage)

    @property
    def seconds(self) -> float:
        """About how long the whole takes, from its first rung on."""
        return sum(makespan(self.of(stage), self.slots) for stage in STAGES) + self.search + self.shipping

    @property
    def record(self) -> dict[str, Any]:
        """Values for JSON, which `read` reads."""
        return asdict(self)

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Plan:
        """The plan from its record in JSON."""
        return cls(**{**stored, "rungs": tuple(Rung(**rung) for rung in stored["rungs"])})


@cache
def portfolio() -> tuple[Mapping[str, Any], ...]:
    """Recipes that are tried beside the plain one, in this order: `portfolio.json`, which benchmarks/improve/portfolio.py writes
    from the tables of results. Their gains there are means, so each must win."""
    return tuple(json.loads(Path(__file__).with_name("portfolio.json").read_text(encoding="utf-8")))


def candidates(task: Task) -> dict[str, dict[str, Any]]:
    """Settings whose steps cost differently, by name: those are timed."""
    rungs = {BASE: dict[str, Any]()} | {entry["name"]: dict(entry["settings"]) for entry in portfolio()}
    rungs[TAUGHT] = taught(task)
    if task.teachers:
        rungs[TEACHER] = teacher_run(task)
    return rungs


def taught(task: Task) -> dict[str, Any]:
    """Settings of a run that learns from a frozen net with a fitted head, at a larger size: the largest net at hand, else its
    own first weights. The deployed file teaches, too, where flips cost."""
    net = task.teachers[0] if task.teachers else _own_net(task)
    return distilled([{"kind": "probe", **net, "size": list(teacher_size(task))}, *old_teachers(task)])


def _own_net(task: Task) -> dict[str, Any]:
    if task.file is not None:
        return {"onnx": task.file}
    model = task.recipe["model"]
    return {"backbone": model["backbone"], "weights": model["weights"], "kwargs": dict(model.get("kwargs", {}))}


def old_teachers(task: Task) -> list[dict[str, Any]]:
    """The deployed file, where flips cost."""
    return [{"kind": "bundle", "path": task.file}] if task.keeps_answers else []


def distilled(teachers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Settings that add teachers."""
    return {"techniques": {"distill": {"teachers": list(teachers), "temperature": 2.0, "kd": 4.0}}}


def teacher_size(task: Task) -> tuple[int, int]:
    """Height and width of a teacher's input, in multiples of 32 pixels."""
    height, width = task.size
    return tuple(32 * max(1, round(side * TEACHER_SCALE / 32)) for side in (height, width))  # type: ignore[return-value]


def teacher_run(task: Task) -> dict[str, Any]:
    """Settings of the run that tunes the teacher by the same base."""
    teacher = task.teachers[0]
    return {
        "model": {"backbone": teacher["backbone"], "weights": teacher["weights"], "kwargs": teacher["kwargs"]},
        "image": {"size": list(teacher_size(task))},
    }


def makespan(rungs: Iterable[Rung], slots: int) -> float:
    """Seconds that the runs of rungs take, started the longest first, `slots` at a time."""
    busy = [0.0] * slots
    for cost in sorted((rung.seconds for rung in rungs for _ in range(rung.runs)), reverse=True):
        least = busy.index(min(busy))
        busy[least] += cost
    return max(busy)


def cost(timing: Timing, *, learn: int, choose: int, epochs: int, classes: int, fits: bool = False) -> float:
    """Seconds of a run: its start, the scores before and after, the fit of a teacher's head and (`fits`) of one of its own, and
    its steps."""
    looks = ((3 + LOOKS_BETWEEN * (epochs > 0)) * choose + UNFOLD_IMAGES) * timing.look
    views, fit = (1 + VIEWS) * learn, FIT * classes
    fitted = views * (timing.look + fit) * fits + views * (timing.teacher_look + fit) * (timing.teacher_look > 0)
    steps = max(1, learn // timing.batch) * epochs
    return SAFETY * (timing.start + looks + fitted + steps * timing.step)


def plan_ladder(
    task: Task, timings: Mapping[str, Timing], *, budget: float, spent: float, slots: int, search: bool = False
) -> Plan:
    """Cut the ladder to what is left of the budget: the richest one whose rungs get the epochs that they need. `search`: leave
    SEARCH_SHARE of that for a search.

    Raises FgvcError where not even the plainest fits.
    """
    shipping = SHIPPING + LOOKS_JUDGED * task.counts["test"] * timings[BASE].look
    left = budget - spent - shipping
    searching = SEARCH_SHARE * max(0.0, left) if search and task.chooses else 0.0
    left -= searching
    reasons = {f"--start {net['backbone']}": "the largest of the nets at hand teaches" for net in task.teachers[1:]}
    if not task.chooses:
        unused = [*(f"--start {start['name']}" for start in task.starts), *["--search"] * search]
        reasons |= dict.fromkeys(unused, "no image chooses whether it is better")
    for names, fewest in _ladders(task, timings):
        draft = _Draft(task, timings, names, budget=budget, slots=slots)
        epochs = max((n for n in range(1, MOST_EPOCHS + 1) if draft.seconds(n) <= left), default=0)
        if epochs >= fewest:
            full = max(n for n in range(epochs, max(epochs, FULL_EPOCHS) + 1) if draft.seconds(epochs, n) <= left)
            left_out = {name: reason for name, reason in reasons.items() if name not in names}
            return _with_latest_starts(
                Plan(
                    budget=budget, slots=slots, shipping=shipping, rungs=draft.rungs(epochs, full), left_out=left_out,
                    search=searching, timings={name: asdict(timing) for name, timing in timings.items()},
                    precision=timings[BASE].precision,
                )
            )  # fmt: skip
        reason = f"in a ladder with it each rung would have {epochs} epochs, and it needs {fewest}"
        reasons |= dict.fromkeys(names, reason)
    least = spent + shipping + _Draft(task, timings, names, budget=math.inf, slots=slots).seconds(1)
    raise FgvcError(
        f"--budget: {budget / 60:.0f} min are too few for a rung of a single epoch: about {math.ceil(least / 60)} min are needed"
    )


def _ladders(task: Task, timings: Mapping[str, Timing]) -> list[tuple[tuple[str, ...], int]]:
    """Yield ladders from the richest to the plainest, each with its rungs and the epochs that each needs.

    With fewer than six epochs another rung costs more than it gives: on the birds file the plain recipe alone had, at its best
    share, 76.9 % of the images that choose after 3 epochs, 79.3 after 6 and 79.5 after 9; taught, 78.3 after 3 (docs/improve.md).
    """
    timed = [entry["name"] for entry in portfolio() if entry["name"] in timings]
    if not task.chooses:
        return [((FINAL, PLAIN), 1)]
    if not timed and TAUGHT not in timings:  # too little time to time more than the base
        return [((BASE, FINAL), 1)]
    taught_rung = (TAUGHT,) if TAUGHT in timings else ()
    tuned = (TEACHER,) if TEACHER in timings else ()
    first = taught_rung or (timed[0],)
    rich = [
        ((BASE, *timed, *taught_rung, *tuned, STUDENT, FINAL, PLAIN), 12),
        ((BASE, *timed, *taught_rung, STUDENT, FINAL, PLAIN), 8),
    ]
    if task.unlabelled:  # which are for a student alone: another rung beside it comes after that
        return [*rich, ((BASE, STUDENT, FINAL, PLAIN), 3), ((BASE, FINAL), 1)]
    return [*rich, ((BASE, *timed, *taught_rung, FINAL, PLAIN), 8), ((BASE, *first, FINAL, PLAIN), 6), ((BASE, FINAL), 1)]


@dataclass(frozen=True, slots=True)
class _Draft:
    """The rungs of one ladder with the costs that they would have."""

    task: Task
    timings: Mapping[str, Timing]
    names: Sequence[str]
    budget: float
    slots: int

    def seconds(self, epochs: int, full: int | None = None) -> float:
        """Seconds of all stages, where each rung has `epochs` and the run that ships `full` (default: as many)."""
        rungs = self.rungs(epochs, full or epochs)
        return sum(makespan((rung for rung in rungs if rung.stage == stage), self.slots) for stage in STAGES)

    def rungs(self, epochs: int, full: int) -> tuple[Rung, ...]:
        rungs = (*self._probes(), *self._tuned(epochs), *self._student(epochs), *self._shipped(full))
        runs = {stage: sum(rung.runs for rung in rungs if rung.stage == stage) for stage in STAGES}
        alone = {stage for stage in STAGES if runs[stage] == 1} if self.slots > 1 else set()
        return tuple(replace(rung, seconds=ALONE * rung.seconds) if rung.stage in alone else rung for rung in rungs)

    def _cost(self, timing: Timing, epochs: int, *, learn: int, choose: int = 0, fits: bool = False) -> float:
        """Seconds of a run that learns from `learn` images and is scored on `choose`."""
        fits = fits or self.task.file is None  # timm's net begins with a fitted head
        return cost(timing, learn=learn, choose=choose, epochs=epochs, classes=len(self.task.classes), fits=fits)

    def _probes(self) -> list[Rung]:
        """Fitted heads on the features of all first weights, the deployed file's own among them, where that is cheap."""
        starts = [{"name": "deployed", "weights": "deployed"}] if self.task.file is not None else []
        seconds = self._cost(self.timings[BASE], 0, learn=self.task.to_learn, choose=self.task.to_choose, fits=True)
        rungs = [
            Rung(
                name=f"probe-{start['name']}", stage="probe", what=f"a head fitted to the features of {start['name']}", epochs=0,
                settings={"model": {"weights": start["weights"], "head": "probe"}, "train": {"max_steps": 0}}, seconds=seconds,
            )
            for start in (*starts, *self.task.starts)
        ]  # fmt: skip
        cheap = makespan(rungs, self.slots) <= PROBE_SHARE * self.budget
        return rungs if self.task.chooses and cheap else []

    def _tuned(self, epochs: int) -> list[Rung]:
        task = self.task
        teacher = task.teachers[0]["backbone"] if task.teachers else "its own first weights"
        kinds: dict[str, tuple[str, Mapping[str, Any]]] = {BASE: ("the plain recipe", {})}
        kinds |= {entry["name"]: (entry["what"], entry["settings"]) for entry in portfolio()}
        kinds[TAUGHT] = f"taught by {teacher} at {'x'.join(map(str, teacher_size(task)))} px, with a fitted head", taught(task)
        if task.teachers:
            kinds[TEACHER] = f"{teacher}, tuned by the base to teach", teacher_run(task)
        return [
            Rung(
                name=name, stage="tune", what=what, settings=settings, epochs=epochs, runs=task.folds,
                seconds=self._cost(
                    self.timings[name], epochs, learn=task.to_learn, choose=task.to_choose, fits=name == TEACHER
                ),
            )
            for name, (what, settings) in kinds.items() if name in self.names
        ]  # fmt: skip

    def _student(self, epochs: int) -> list[Rung]:
        if STUDENT not in self.names:
            return []
        task, more = self.task, len(self.task.unlabelled)
        by = f"the tuned {task.teachers[0]['backbone']}" if TEACHER in self.names else "the runs before it"
        seconds = self._cost(self._student_timing, epochs, learn=task.to_learn + more, choose=task.to_choose)
        what = f"the best of these, taught by {by}"
        return [
            Rung(
                name=STUDENT, stage="teach", what=what, settings={}, epochs=epochs, runs=task.folds,
                seconds=seconds + more * self.timings[BASE].look,
            )
        ]  # fmt: skip

    @property
    def _student_timing(self) -> Timing:
        """Timing of a student: the costliest rung's step, and a forward of each teacher."""
        tuned = [self.timings[name] for name in self.names if name in self.timings and name != TEACHER]
        costliest = max(tuned, key=lambda timing: timing.step)
        teacher = self.timings.get(TEACHER) if TEACHER in self.names else None
        look = len(tuned) * self.timings[BASE].look if teacher is None else teacher.look
        return replace(costliest, step=costliest.step + look * costliest.batch, teacher_look=0.0)

    def _shipped(self, epochs: int) -> list[Rung]:
        task, counts = self.task, self.task.counts
        learn = counts["train"] + counts["val"]
        named = len(task.unlabelled) if STUDENT in self.names else 0
        tried = [self.timings[name] for name in self.names if name in self.timings and name != TEACHER]
        if STUDENT in self.names:
            tried.append(self._student_timing)
        if not task.chooses:
            tried = [self.timings.get(TAUGHT, self.timings[BASE])]
        costliest = max(tried, key=lambda timing: timing.step)
        seconds = self._cost(costliest, epochs, learn=learn + named, fits=PLAIN not in self.names)
        settings = LEARN_ALL | {"train": {"floor": PLAIN not in self.names}}
        shipped = Rung(
            name=FINAL, stage="ship",
            what="the best again, on the images that chose as well" if task.chooses else "the first of the portfolio",
            settings=settings if task.chooses else settings | unchosen(task, self.timings), epochs=epochs, seconds=seconds,
            epochs_of={
                name: max(
                    n for n in range(epochs, max(epochs, FULL_EPOCHS) + 1)
                    if n == epochs or self._cost(self.timings[name], n, learn=learn, fits=PLAIN not in self.names) <= seconds
                )
                for name in self.names if name in self.timings and name != TEACHER
            },
        )  # fmt: skip
        if PLAIN not in self.names:
            return [shipped]
        base, most = self.timings[BASE], min(seconds, PLAIN_SHARE * self.budget)
        counted = [n for n in range(1, 4 * MOST_EPOCHS) if self._cost(base, n, learn=learn, fits=True) <= most + 1e-9]
        plain_epochs = max(counted, default=1)
        plain = Rung(
            name=PLAIN, stage="ship", what="the plain recipe on the same images, for as long, to compare with",
            settings=LEARN_ALL | {"train": {"floor": True}}, epochs=plain_epochs,
            seconds=self._cost(base, plain_epochs, learn=learn, fits=True),
        )  # fmt: skip
        return [shipped, plain]


LEARN_ALL = {"data": {"hold_out": False}}


def unchosen(task: Task, timings: Mapping[str, Timing]) -> dict[str, Any]:
    """Settings of the run that ships where no image can choose: the first of the portfolio, with a teacher where one can be
    timed."""
    timed = [entry["settings"] for entry in portfolio() if entry["name"] in timings]
    settings = copy.deepcopy(dict(timed[0])) if timed else {}
    if TAUGHT in timings:
        merge(settings, taught(task))
    return settings


def _with_latest_starts(plan: Plan) -> Plan:
    """The plan with the working time by which each rung must begin, so that what ships still fits."""
    end = plan.budget - plan.shipping - makespan(plan.of("ship"), plan.slots) - plan.search
    rungs = [
        rung if rung.stage == "ship" else replace(rung, latest_start=max(0.0, end - makespan([rung], plan.slots)))
        for rung in plan.rungs
    ]
    return replace(plan, rungs=tuple(rungs))
