"""Running of the rungs of a ladder, and the choice between them by the images that choose."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fgvc.api import interpolate
from fgvc.errors import FgvcError
from fgvc.evaluation.paired import beats
from fgvc.improvement.clock import Clock
from fgvc.improvement.ladder import (
    BASE,
    FINAL,
    PLAIN,
    STUDENT,
    TEACHER,
    Plan,
    Rung,
    Stage,
    distilled,
    makespan,
    old_teachers,
)
from fgvc.improvement.on_ray import share_on_ray
from fgvc.improvement.outcome import Outcome, Status
from fgvc.improvement.recipes import Tree, merged, recipe_of, write_recipe
from fgvc.improvement.search import SPACE, Space, best_trial, search
from fgvc.improvement.side_by_side import Ended, Job, Workers, threads_of
from fgvc.improvement.task import Task
from fgvc.improvement.unlabelled import write_named
from fgvc.io.files import as_json, write_atomic
from fgvc.runs import checkpoint
from fgvc.runs.folder import INTERPOLATION
from fgvc.runs.validated import named_rightly
from fgvc.runtime.bundle import read_json
from fgvc.training.interpolate import right_by_share

UNCHOSEN_SHARE = 0.8  # of the way, best in the mean of three deployed files at 3e-4 (benchmarks/improve/rates.csv)
IS_PLAIN = "what ships is the plain recipe"
SHORTEST = 0.5  # of what was planned for what ships, that rungs which take longer than planned leave; then they are stopped
LEAST_FREE = 100 * 2**20  # bytes of the disk: with less a failure is taken for one of space
BETWEEN = "between"  # of the net between a run's start and its end that the images that choose like best
Say = Callable[[str], None]
Tick = Callable[[Sequence[Job]], None]


class Ladder:
    """The rungs of a plan in a folder, and their outcomes: `recipes/NAME.yaml`, `runs/NAME`, `logs/NAME.log`, `rungs.json`. A
    rung whose images choose in folds has a run for each, NAME-fold0 and so on.

    What was decided is read from `rungs.json` by the next session, which so decides the same."""

    def __init__(
        self, task: Task, plan: Plan, out: Path, clock: Clock, pool: Workers, *, say: Say, tick: Tick, command: str,
        standing: NDArray[np.bool_], flips: float | None = None, on_ray: bool = False,
    ) -> None:  # fmt: skip
        """Read the outcomes in the folder `out`. `flips`: the most negative flips against the deployed file, as a share of all
        images."""
        self.task, self.plan, self.out, self.clock, self.pool, self.say, self.tick = task, plan, out, clock, pool, say, tick
        self.command, self.on_ray = command, on_ray
        self.standing = standing  # (N,) whether the deployed file names the images that choose rightly; empty: there is none
        self._file = out / "rungs.json"
        stored = read_json(self._file, dict) if self._file.is_file() else {"outcomes": {}, "choices": {}}
        self.outcomes = {name: Outcome(**row) for name, row in stored["outcomes"].items()}
        self.choices: dict[str, Any] = stored["choices"]
        self.flips = flips
        self._answers: dict[str, dict[float, NDArray[np.bool_]]] = {}  # see `_points`
        self._ended: dict[str, list[Ended]] = {}  # of a rung's runs, in this session

    def climb(self) -> None:
        """Run all stages. Raises FgvcError where nothing is left that could ship; KeyboardInterrupt after saving."""
        if probes := self._run("probe"):
            self._choose("start", [BASE, *probes])
        if tuned := [name for name in self._run("tune") if name != TEACHER]:
            self._choose("best", tuned)
            if self.plan.of("teach"):
                self._name_unlabelled()
            if self._run("teach"):
                self._choose("student", [self.choices["best"], STUDENT])
            if self.plan.search:
                self._search()
        self._ship()

    @property
    def best(self) -> str | None:
        """The rung, or the trial of the search, that the images chose; None: there are none that choose."""
        return self.choices.get("searched", self.choices.get("student", self.choices.get("best")))

    @property
    def ships(self) -> Path:
        """The run that ships."""
        return self.run(self.choices["ships"])

    def run(self, name: str) -> Path:
        """Folder of a run by its name."""
        return self.out / "runs" / name

    def runs(self, rung: Rung) -> list[str]:
        """The names of a rung's runs: one for each fold."""
        return [rung.name] if rung.runs == 1 else [f"{rung.name}-fold{fold}" for fold in range(rung.runs)]

    def _runs_of(self, name: str) -> list[str]:
        """Names of the runs of a rung, one for each fold, or of a trial, which is one run."""
        return next((self.runs(rung) for rung in self.plan.rungs if rung.name == name), [name])

    def first_run(self, name: str) -> Path:
        """A rung's run; of those of folds the first."""
        return self.run(self._runs_of(name)[0])

    def settings(self, name: str, fold: int = 0) -> Tree:
        """Settings of a rung over the task's recipe. `fold`: the one whose teachers a student has."""
        if name == self.choices.get("searched") and name.startswith("trial-"):
            return self.choices["trial"]
        rung = next(rung for rung in self.plan.rungs if rung.name == name)
        if rung.stage == "probe" or name in (TEACHER, PLAIN):
            return rung.settings
        if rung.stage == "tune":
            return merged(self._start, rung.settings)
        if name == STUDENT:
            named = {"data": {"file": str(self._named)}} if self.task.unlabelled else {}
            return merged(self.settings(self.choices["best"]), distilled(self._teachers(fold)), named)
        own = self._start if self.best is None else self.settings(self.best)
        alone = PLAIN in self.outcomes and self.outcomes[PLAIN].reason == IS_PLAIN
        return merged(own, rung.settings, {"train": {"floor": True}} if alone else {})  # else it is the plain run's

    @property
    def _start(self) -> Tree:
        """The first weights that were chosen."""
        start = self.choices.get("start", BASE)
        return {} if start == BASE else {"model": self.settings(start)["model"]}

    def _teachers(self, fold: int) -> list[Tree]:
        """Teachers of the student: the tuned teacher, else the average of the runs so far; and the deployed file where flips
        cost. All have learned from the images that the student of that fold learns from."""
        names = [TEACHER] if self.has_run(TEACHER) else [rung.name for rung in self.plan.of("tune") if self.has_run(rung.name)]
        shares = {self._runs_of(name)[fold]: self.share(name) for name in names}
        runs = [{"kind": "run", "path": str(self._at(run, share).absolute())} for run, share in shares.items()]
        return [*runs, *old_teachers(self.task)]

    @property
    def _named(self) -> Path:
        """The table with the images that a teacher has named."""
        return (self.out / "images-named.csv").absolute()

    def _name_unlabelled(self) -> None:
        """Name the images without labels, by the tuned teacher or else the best run."""
        if self.task.unlabelled and STUDENT not in self.outcomes and not self._named.is_file():
            teacher = TEACHER if self.has_run(TEACHER) else self.choices["best"]
            place = self._at(teacher, self.share(teacher))  # such a ladder has no folds
            count = write_named(self.task.unlabelled, place, self.out / "images.csv", self._named)
            self.say(f"{teacher} names {count} of the {len(self.task.unlabelled)} images without labels, the others are left out")

    def has_run(self, name: str) -> bool:
        """Whether a rung was run to its end."""
        return name in self.outcomes and self.outcomes[name].status == "done"

    def _run(self, stage: Stage) -> list[str]:
        """Run the rungs of a stage that have no outcome yet; the names of those that are done."""
        rungs = self.plan.of(stage)
        left = [rung for rung in rungs if rung.name not in self.outcomes]
        for rung in left:
            begun, latest = any(self.run(name).exists() for name in self.runs(rung)), rung.latest_start
            if not begun and latest is not None and self.clock.seconds > latest:
                self._set(rung.name, Outcome(status="dropped", reason="it would have started too late"))
        left = [rung for rung in left if rung.name not in self.outcomes]
        if left:
            self._run_side_by_side(stage, left)
        return [rung.name for rung in rungs if self.has_run(rung.name)]

    def _run_side_by_side(self, stage: Stage, rungs: Sequence[Rung]) -> None:
        slots = self.plan.slots
        late = (1 - SHORTEST) * makespan(self.plan.of("ship"), slots)
        ends = [rung.latest_start + makespan([rung], slots) + late for rung in rungs if rung.latest_start is not None]
        latest = max(ends, default=1.1 * self.plan.budget - self.plan.shipping)  # what ships can be a little late
        self._ended = {rung.name: [] for rung in rungs}
        for rung in rungs:
            if self._was_finished(rung):  # in an earlier session, which ended before it could note that
                self._set_done(rung, sum(self._seconds(name, 0.0) for name in self.runs(rung)))
        rungs = [rung for rung in rungs if rung.name not in self.outcomes]
        rung_of = {name: rung for rung in rungs for name in self.runs(rung)}
        longest_first = sorted(rungs, key=lambda rung: rung.seconds, reverse=True)  # as the plan has them, see `makespan`
        jobs = [self._job(rung, fold) for rung in longest_first for fold in range(rung.runs)]
        # Decided when the stage begins: a rung that goes on with another number of threads ends with other bits.
        together = self.choices.setdefault("together", {}).setdefault(stage, min(slots, len(jobs)))
        self._store()
        self.pool.run(
            jobs, slots=together, until=lambda: self.clock.seconds > latest, tick=self.tick,
            done=lambda ended: self._note(ended, rung_of[ended.job.name]),
        )  # fmt: skip
        for rung in rungs:
            if rung.name not in self.outcomes:
                self._set(rung.name, Outcome(status="dropped", reason="the time was up before it began"))

    def _note(self, ended: Ended, rung: Rung) -> None:
        """Record how a rung ended, once all of its runs have. Raises FgvcError where the disk is full: no fault of the rung's, it
        goes on later."""
        if ended.code and not ended.stopped and self._is_full(ended.message):
            raise FgvcError(f"{self.out}: its disk is full: {ended.message}")
        runs = self._ended[rung.name]
        runs.append(ended)
        if len(runs) < rung.runs:
            return
        if bad := sorted((run for run in runs if run.stopped or run.code), key=lambda run: run.stopped):
            status: Status = "dropped" if bad[0].stopped else "failed"
            self._set(rung.name, Outcome(status=status, reason=bad[0].message, seconds=sum(run.seconds for run in runs)))
        else:
            self._set_done(rung, sum(self._seconds(run.job.name, run.seconds) for run in runs))

    def _set_done(self, rung: Rung, seconds: float) -> None:
        right, share = self._right_of(rung.name), self.share(rung.name)
        self._set(rung.name, Outcome(status="done", right=int(right.sum()), of=len(right), seconds=seconds, share=share))

    def _was_finished(self, rung: Rung) -> bool:
        """Whether all of a rung's runs, and their interpolated nets, are finished."""
        runs = self.runs(rung)
        ways = not self._has_way(rung) or all(self.run(f"{name}-{BETWEEN}").is_dir() for name in runs)
        return ways and all(checkpoint.is_finished(self.run(name) / "ckpt") for name in runs)

    def _has_way(self, rung: Rung) -> bool:
        """Whether the interpolated nets between a rung's start and end are scored."""
        return self.task.chooses and rung.stage in ("tune", "teach")

    def _is_full(self, message: str) -> bool:
        """Whether a process that failed did so for want of space: on the disk, or of the user's quota."""
        words = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
        return any(word in message for word in words) or shutil.disk_usage(self.out).free < LEAST_FREE

    def _seconds(self, name: str, seconds: float) -> float:
        """Seconds of a run's training, over all sessions, where they are more than this session's."""
        return round(max(seconds, checkpoint.read_progress(self.run(name) / "ckpt").seconds), 1)

    def _job(self, rung: Rung, fold: int) -> Job:
        """Write the recipe of a rung's run; return the process that trains it."""
        name = self.runs(rung)[fold]
        path = self.out / "recipes" / f"{name}.yaml"
        epochs = self.epochs(rung)
        length = {"train": {"epochs": epochs, "validate_every": epochs}} if epochs else {}
        held_out = {"data": {"fold": [fold, rung.runs]}} if rung.runs > 1 else {}
        write_recipe(self._recipe(self.settings(rung.name, fold), length, held_out), path)
        words = ["train", str(path), str(self.run(name))]
        if self._has_way(rung):
            words.append(str(self.run(f"{name}-{BETWEEN}")))
        return Job(name, tuple(words), self.out / "logs" / f"{name}.log")

    def _recipe(self, *settings: Tree) -> dict[str, Any]:
        return recipe_of(self.task.recipe, merged({"train": {"precision": self.plan.precision}}, *settings))

    def epochs(self, rung: Rung) -> int:
        """Epochs of a rung; of what ships more where a cheaper one than the costliest won, fewer where little time is left."""
        epochs = rung.epochs_of.get(self.best or "", rung.epochs)
        return max(1, int(epochs * self.choices.get("length", 1.0))) if rung.stage == "ship" else epochs

    def _set(self, name: str, outcome: Outcome) -> None:
        self.outcomes[name] = outcome
        self._store()
        chosen = f": {100 * outcome.accuracy:.1f} % of the {outcome.of} images that choose" if outcome.of else ""
        chosen += f", {outcome.share:g} of the way from its start to its end" if outcome.share < 1 else ""
        minutes = f", {outcome.seconds / 60:.1f} min" if outcome.seconds else ""
        self.say(f"{name}: {outcome.status}{chosen}{minutes}" + (f" ({outcome.reason})" if outcome.reason else ""))

    def _store(self) -> None:
        outcomes = {name: asdict(outcome) for name, outcome in self.outcomes.items()}
        write_atomic(self._file, as_json({"outcomes": outcomes, "choices": self.choices}))

    def _choose(self, what: str, names: Sequence[str]) -> None:
        """Choose between rungs, the simplest first: a later one must be better by more than one standard error."""
        if what in self.choices:
            return
        best = names[0]
        for name in names[1:]:
            if beats(self._right(best), self._right(name)):
                best = name
        self.choices[what] = best
        self._store()

    def _search(self) -> None:
        """Search around the best rung's settings for as long as what ships still fits."""
        if "searched" in self.choices:
            return
        best = self.choices.get("student", self.choices["best"])
        rung = next(rung for rung in self.plan.rungs if rung.name == best)
        ship = makespan(self.plan.of("ship"), self.plan.slots)
        left = self.plan.budget - self.plan.shipping - ship - self.clock.seconds
        recipe = self._recipe(self.settings(best))
        space = Space(recipe=recipe, epochs=rung.epochs, seconds=rung.seconds, deadline=time.time() + left)
        write_atomic(self.out / SPACE, as_json(asdict(space)))
        seed = self.task.recipe["train"]["seed"]
        if self.on_ray:
            share_on_ray(self.out, space, threads=threads_of(self.plan.slots), seed=seed, tick=self.tick)
        else:
            search(self.out, space, slots=self.plan.slots, seed=seed, pool=self.pool, tick=self.tick, say=self.say)
        trial = best_trial(self.out, seed)
        if trial is not None and not (between := self.run(f"{trial[0]}-{BETWEEN}")).exists():
            interpolate(self.run(trial[0]), between)
        if trial is not None and beats(self._right(best), self._right(trial[0])):
            self.choices |= {"searched": trial[0], "trial": merged(self.settings(best), trial[1])}
        else:
            self.choices["searched"] = best
        self._store()

    def _right(self, name: str) -> NDArray[np.bool_]:
        """Right answers of a rung to the images that choose; of the base, before it is trained, those of the deployed file."""
        done = self.has_run(name) or name.startswith("trial-")
        return self._right_of(name) if done else self.standing

    def _right_of(self, name: str) -> NDArray[np.bool_]:
        """Right answers of a run to the images that choose, at its best point between start and end."""
        return self._points(name)[self.share(name)]

    def share(self, name: str) -> float:
        """Share of the way from a run's start to its end where the images that choose like it best, the smallest of equals. Where
        flips cost: among those with no more of them than the gate allows, else where they are fewest."""
        points = self._points(name)
        if self.flips is not None and len(self.standing):
            lost = {share: float((self.standing & ~right).mean()) for share, right in points.items()}
            most = max(self.flips, min(lost.values()))
            points = {share: right for share, right in points.items() if lost[share] <= most}
        return max(points, key=lambda share: (points[share].sum(), -share), default=1.0)

    def _points(self, name: str) -> dict[float, NDArray[np.bool_]]:
        """Right answers of a rung to the images that choose, by the share of the way from start to end; the folds in turn. Of a
        rung without such interpolated nets those of its end."""
        if name not in self._answers:
            runs = self._runs_of(name)
            ways = [right_by_share(self.run(f"{run}-{BETWEEN}")) for run in runs]
            shares = [share for share in ways[0] if all(share in way for way in ways)]
            ways = ways if shares else [{1.0: right_on_choose(self.run(run))} for run in runs]
            self._answers[name] = {share: np.concatenate([way[share] for way in ways]) for share in shares or [1.0]}
        return self._answers[name]

    def _at(self, name: str, share: float) -> Path:
        """The net at a share of a run's way, a run itself."""
        place = self.run(f"{name}-{BETWEEN}")
        if share == 1:
            return self.run(name)
        if (place / INTERPOLATION).is_file() and read_json(place / INTERPOLATION, dict)["share"] == share:
            return place
        place = self.run(f"{name}-at-{share:g}")
        if not place.exists():
            interpolate(self.run(name), place, share=share)
        return place

    def _ship(self) -> None:
        """Train the best again, on the images that chose as well, which then ships by rule, as far from its start as the best was
        best; and the plain recipe beside it. Where none chose, as far as was best elsewhere."""
        if "share" not in self.choices:
            self.choices["share"] = UNCHOSEN_SHARE if self.best is None else self.share(self.best)
        share = self.choices["share"]
        is_plain = self.best == BASE and not self._start and share == 1
        if is_plain and PLAIN not in self.outcomes and self.plan.of("ship")[-1].name == PLAIN:
            self._set(PLAIN, Outcome(status="dropped", reason=IS_PLAIN))
        self._shorten()
        self._run("ship")
        start = self.choices.get("start", BASE)
        best = self.best if self.best is not None else start if start != BASE else None
        ships = FINAL if self.has_run(FINAL) else best
        if ships is None:
            ended = self.outcomes.pop(FINAL)  # the next session tries again
            self._store()
            way = "the same command tries again" if ended.status == "failed" else "choose another --out with a larger --budget"
            raise FgvcError(f"{self.run(FINAL)}: {ended.reason}, and nothing else could ship; {way}")
        self.choices["ships"] = self._at(self.first_run(ships).name, share).name
        self._store()

    def _shorten(self) -> None:
        """Decide on a share of the epochs of what ships: less than all where the time that is left is too short for them, at the
        pace of the rungs so far."""
        rungs = [rung for rung in self.plan.of("ship") if rung.name not in self.outcomes]
        if "length" in self.choices or not rungs:
            return
        trained = [rung for rung in self.plan.rungs if rung.stage in ("tune", "teach") and self.has_run(rung.name)]
        pace = max([1.0, *(self.outcomes[rung.name].seconds / (rung.runs * rung.seconds) for rung in trained)])
        left = self.plan.budget - self.plan.shipping - self.clock.seconds
        self.choices["length"] = length = min(1.0, max(0.0, round(left / (pace * makespan(rungs, self.plan.slots)), 2)))
        self._store()
        if length < 1:
            cut = ", ".join(f"{rung.name} {self.epochs(rung)}" for rung in rungs)
            self.say(f"less time is left than was planned; epochs of what ships: {cut}")


def right_on_choose(run: Path) -> NDArray[np.bool_]:
    """Whether a run's last validation names each image rightly (N,), in the order of the rows; empty without validation."""
    return named_rightly(run)[1]
