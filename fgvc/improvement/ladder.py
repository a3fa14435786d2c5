"""The ladder of rungs, and its fit to a budget: pure arithmetic on measured costs.

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

Stage = Literal["probe", "tune", "teach", "ship"]
STAGES: tuple[Stage, ...] = ("probe", "tune", "teach", "ship")
BASE, TAUGHT, FINAL, PLAIN, TEACHER = "base", "taught", "final", "plain", "teacher"
MOST_EPOCHS = 24
TEACHER_SCALE = 1.4  # side of a teacher's input over the network's, about: 160 px are taught at 224
SAFETY = 1.2  # times what was timed
VIEWS = 3  # of an image, from which a head is fitted
FIT = 0.005  # seconds of the fit for each of them
UNFOLDED = 512  # images by which scales are fitted to a deployed file's folded norms
SHIPPING = 30.0  # seconds of export and proofs, and of the page
BETWEEN, JUDGED = 12, 5  # looks at each image: of nets between a start and an end; of all that are judged
PLAIN_SHARE = 1 / 4  # of the budget, at most
PROBE_SHARE = 1 / 10
SEARCH_SHARE = 0.4  # of what is left of the budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One run of the ladder. `settings` lie over the task's recipe, for TAUGHT and FINAL over the best rung's."""

    name: str
    stage: Stage
    what: str  # in words
    settings: Mapping[str, Any]
    epochs: int
    seconds: float  # that it takes, about
    latest_start: float | None = None  # working time after which it is dropped; None: it is not


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The ladder, cut to its budget and fixed before it starts."""

    budget: float  # seconds of working time
    slots: int  # rungs side by side
    shipping: float  # seconds kept for interpolation, export, judgement and page
    rungs: tuple[Rung, ...]
    left_out: Mapping[str, str]  # rung -> why
    search: float = 0.0  # seconds at least, of a search around the best
    timings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def of(self, stage: Stage) -> tuple[Rung, ...]:
        return tuple(rung for rung in self.rungs if rung.stage == stage)

    @property
    def seconds(self) -> float:
        """About how long the whole takes, from its first rung on."""
        rungs = sum(makespan((rung.seconds for rung in self.of(stage)), self.slots) for stage in STAGES)
        return rungs + self.search + self.shipping

    @property
    def record(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Plan:
        return cls(**{**stored, "rungs": tuple(Rung(**rung) for rung in stored["rungs"])})


@cache
def portfolio() -> tuple[Mapping[str, Any], ...]:
    """Recipes that are tried beside the plain one, in this order: `portfolio.json`. That they gain over the present base is not
    shown yet (benchmarks/base/README.md), which is why each must win."""
    return tuple(json.loads(Path(__file__).with_name("portfolio.json").read_text(encoding="utf-8")))


def candidates(task: Task) -> dict[str, dict[str, Any]]:
    """Settings whose steps cost differently, by name: those are timed."""
    rungs = {BASE: dict[str, Any]()} | {entry["name"]: dict(entry["settings"]) for entry in portfolio()}
    if (teacher := probed_teacher(task)) is not None:
        rungs[TAUGHT] = {"techniques": {"distill": taught_by([teacher])}}
        rungs[TEACHER] = teacher_run(task)
    return rungs


def taught_by(teachers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Settings of `techniques.distill`."""
    return {"teachers": list(teachers), "temperature": 2.0, "kd": 4.0}


def probed_teacher(task: Task) -> dict[str, Any] | None:
    """The frozen net that teaches with a fitted head: the first larger one at hand, at a larger size; None: there is none."""
    if not task.teachers:
        return None
    return {"kind": "probe", **task.teachers[0], "size": list(teacher_size(task))}


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


def makespan(seconds: Iterable[float], slots: int) -> float:
    """How long jobs take, the longest first, `slots` at a time."""
    busy = [0.0] * slots
    for cost in sorted(seconds, reverse=True):
        least = busy.index(min(busy))
        busy[least] += cost
    return max(busy)


def cost(timing: Timing, *, learn: int, choose: int, epochs: int) -> float:
    """Seconds of a run: its start, the fitted head, the scores before and after, and its steps."""
    looks = (VIEWS * learn + 3 * choose + UNFOLDED) * timing.look + FIT * VIEWS * learn
    steps = max(1, learn // timing.batch) * epochs
    return SAFETY * (timing.start + looks + steps * timing.step)


def plan_ladder(
    task: Task, timings: Mapping[str, Timing], *, budget: float, spent: float, slots: int, search: bool = False
) -> Plan:
    """Cut the ladder to what is left of the budget: the richest one whose rungs get the epochs that they need. `search`: leave
    SEARCH_SHARE of that for a search.

    Raises FgvcError where not even the plainest fits.
    """
    looks = BETWEEN * task.counts["val"] + JUDGED * task.counts["test"]
    shipping = SHIPPING + looks * timings[BASE].look
    left = budget - spent - shipping
    searching = SEARCH_SHARE * max(0.0, left) if search and task.chooses else 0.0
    left -= searching
    reasons: dict[str, str] = {}
    for names, fewest in _ladders(task, timings):
        epochs = _most_epochs(task, timings, names, left=left, budget=budget, slots=slots)
        if epochs >= fewest:
            rungs = _rungs(task, timings, names, epochs=epochs, budget=budget, slots=slots)
            left_out = {name: reason for name, reason in reasons.items() if name not in names}
            return _with_latest_starts(
                Plan(
                    budget=budget, slots=slots, shipping=shipping, rungs=rungs, left_out=left_out, search=searching,
                    timings={name: asdict(timing) for name, timing in timings.items()},
                )
            )  # fmt: skip
        reason = f"in a ladder with it each rung would have {epochs} epochs, and it needs {fewest}"
        reasons |= dict.fromkeys(names, reason)
    least = spent + shipping + _total(task, timings, names, epochs=1, budget=math.inf, slots=slots)
    raise FgvcError(
        f"--budget: {budget / 60:.0f} min are too few for a rung of a single epoch: about {math.ceil(least / 60)} min are needed"
    )


def _ladders(task: Task, timings: Mapping[str, Timing]) -> list[tuple[tuple[str, ...], int]]:
    """Ladders from the richest to the plainest: rungs, and epochs that each needs."""
    known = [entry["name"] for entry in portfolio() if entry["name"] in timings]
    if not task.chooses:
        return [((FINAL, PLAIN), 1)]
    if not known:
        return [((BASE, FINAL), 1)]
    taught = (TAUGHT,) if TAUGHT in timings or not task.teachers else ()  # else there is a teacher, which can't teach
    tuned = (TEACHER,) if taught and TEACHER in timings else ()
    return [
        ((BASE, *known, *tuned, *taught, FINAL, PLAIN), 12),
        ((BASE, known[0], *tuned, *taught, FINAL, PLAIN), 8),
        ((BASE, known[0], *taught, FINAL, PLAIN), 8),
        ((BASE, known[0], FINAL, PLAIN), 6),
        ((BASE, FINAL), 1),
    ]


def _most_epochs(
    task: Task, timings: Mapping[str, Timing], names: Sequence[str], *, left: float, budget: float, slots: int
) -> int:
    fitting = [
        epochs
        for epochs in range(1, MOST_EPOCHS + 1)
        if _total(task, timings, names, epochs=epochs, budget=budget, slots=slots) <= left
    ]
    return max(fitting, default=0)


def _total(
    task: Task, timings: Mapping[str, Timing], names: Sequence[str], *, epochs: int, budget: float, slots: int
) -> float:
    rungs = _rungs(task, timings, names, epochs=epochs, budget=budget, slots=slots)
    return sum(makespan((rung.seconds for rung in rungs if rung.stage == stage), slots) for stage in STAGES)


def _rungs(
    task: Task, timings: Mapping[str, Timing], names: Sequence[str], *, epochs: int, budget: float, slots: int
) -> tuple[Rung, ...]:
    learn, choose = task.counts["train"], task.counts["val"]
    entries = {entry["name"]: entry for entry in portfolio()}
    rungs = _probes(task, timings[BASE], budget=budget, slots=slots)
    for name in (BASE, *entries, TEACHER):
        if name in names:
            settings = teacher_run(task) if name == TEACHER else entries[name]["settings"] if name in entries else {}
            what = (
                f"{task.teachers[0]['backbone']}, tuned by the base to teach" if name == TEACHER
                else entries[name]["what"] if name in entries else "the plain recipe"
            )  # fmt: skip
            seconds = cost(timings[name], learn=learn, choose=choose, epochs=epochs)
            rungs.append(Rung(name=name, stage="tune", what=what, settings=settings, epochs=epochs, seconds=seconds))
    if TAUGHT in names:
        by = "the runs before it" if not task.teachers else task.teachers[0]["backbone"]
        more = len(task.unlabelled)
        seconds = cost(_taught(timings), learn=learn + more, choose=choose, epochs=epochs) + more * timings[BASE].look
        what = f"the best of these, taught by {by}"
        rungs.append(Rung(name=TAUGHT, stage="teach", what=what, settings={}, epochs=epochs, seconds=seconds))
    costliest = max(
        (_taught(timings) if name == TAUGHT else timings[name] for name in names if name in (TAUGHT, BASE, *entries)),
        key=lambda timing: timing.step, default=timings[BASE],
    )  # fmt: skip
    named = len(task.unlabelled) if TAUGHT in names else 0
    final = cost(costliest, learn=learn + choose + named, choose=0, epochs=epochs)
    shipped = Rung(
        name=FINAL, stage="ship",
        what="the best again, on the images that chose as well" if choose else "the first of the portfolio",
        settings=LEARN_ALL if choose else LEARN_ALL | unchosen(task, timings), epochs=epochs, seconds=final,
    )  # fmt: skip
    if PLAIN not in names:
        return *rungs, shipped
    plain_epochs = _plain_epochs(timings[BASE], learn=learn + choose, seconds=min(final, PLAIN_SHARE * budget))
    what, seconds = "the plain recipe on the same images, for as long, to compare with", cost(
        timings[BASE], learn=learn + choose, choose=0, epochs=plain_epochs
    )
    return *rungs, shipped, Rung(name=PLAIN, stage="ship", what=what, settings=LEARN_ALL, epochs=plain_epochs, seconds=seconds)


LEARN_ALL = {"data": {"hold_out": False}}


def _probes(task: Task, timing: Timing, *, budget: float, slots: int) -> list[Rung]:
    """Fitted heads on the features of all first weights, the deployed file's own among them, where that is cheap."""
    starts = [{"name": "deployed", "weights": "deployed"}] if task.file is not None else []
    seconds = cost(timing, learn=task.counts["train"], choose=task.counts["val"], epochs=0)
    rungs = [
        Rung(
            name=f"probe-{start['name']}", stage="probe", what=f"a head fitted to the features of {start['name']}", epochs=0,
            settings={"model": {"weights": start["weights"], "head": "probe"}, "train": {"max_steps": 0}}, seconds=seconds,
        )
        for start in (*starts, *task.starts)
    ]  # fmt: skip
    cheap = makespan((rung.seconds for rung in rungs), slots) <= PROBE_SHARE * budget
    return rungs if task.chooses and cheap else []


def unchosen(task: Task, timings: Mapping[str, Timing]) -> dict[str, Any]:
    """Settings of what ships where no image can choose: the first of the portfolio, taught where a teacher is at hand."""
    known = [entry["settings"] for entry in portfolio() if entry["name"] in timings]
    settings = copy.deepcopy(dict(known[0])) if known else {}
    if TAUGHT in timings and (teacher := probed_teacher(task)) is not None:
        merge(settings, {"techniques": {"distill": taught_by([teacher])}})
    return settings


def _plain_epochs(timing: Timing, *, learn: int, seconds: float) -> int:
    """Epochs of the plain recipe in as many seconds."""
    return max(
        [1, *(n for n in range(1, 4 * MOST_EPOCHS) if cost(timing, learn=learn, choose=0, epochs=n) <= seconds + 1e-9)]
    )


def _taught(timings: Mapping[str, Timing]) -> Timing:
    """What a taught run costs: as timed with the teacher at hand, or with a forward of two nets of the same kind."""
    if TAUGHT in timings:
        return timings[TAUGHT]
    base, most = timings[BASE], max((timings[n] for n in timings if n != TEACHER), key=lambda timing: timing.step)
    return replace(most, step=most.step + 2 * base.look * base.batch)


def _with_latest_starts(plan: Plan) -> Plan:
    """The plan with the working time by which each rung must begin, so that what ships still fits."""
    ship = makespan((rung.seconds for rung in plan.of("ship")), plan.slots)
    end = plan.budget - plan.shipping - ship - plan.search
    rungs = [
        rung if rung.stage == "ship" else replace(rung, latest_start=max(0.0, end - rung.seconds)) for rung in plan.rungs
    ]
    return replace(plan, rungs=tuple(rungs))
