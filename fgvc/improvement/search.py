"""Search around the winner's settings (`--search`): Optuna's study in a journal file, which several processes may share.

`better/journal.log` is the study; `optuna-dashboard better/journal.log` shows it. Each trial is an ordinary run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.config.techniques import enabled_techniques
from fgvc.errors import FgvcError
from fgvc.improvement.recipes import Tree, merged, write_recipe
from fgvc.improvement.side_by_side import Ended, Job, Workers
from fgvc.io.files import file_lock
from fgvc.runs.folder import LOCK
from fgvc.runs.trackers import read_events
from fgvc.runtime.bundle import read_json

if TYPE_CHECKING:
    import optuna

JOURNAL, STUDY, SPACE = "journal.log", "improve", "search.json"
WAIT = 1.0  # seconds between two looks whether a search has begun
WARM_UP = 0.25  # share of a trial's epochs before it may be pruned
FIRST_TRIALS = 4  # that are never pruned
WEIGHTS = (("distill", "kd"), ("multiscale_head", "fused"), ("multiscale_head", "each"), ("centre_loss", "centre"))  # of losses

Say = Callable[[str], None]


def refuse_missing() -> None:
    """Raise FgvcError where Optuna is not installed."""
    if find_spec("optuna") is None:
        raise FgvcError("--search: needs Optuna: pip install 'fgvc[search]'")


def open_study(out: Path, seed: int) -> optuna.Study:
    """Open the study in a folder, or begin it."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(out / JOURNAL))),
        study_name=STUDY,
        direction="maximize",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=FIRST_TRIALS),
    )


def suggested(trial: optuna.Trial, recipe: Recipe) -> dict[str, Any]:
    """Settings of a trial around the winner's recipe: rate, decay, augmentation, smoothing, and the weights of its techniques."""
    optim, crop = recipe.optim, recipe.augment.crop_scale
    settings: dict[str, Any] = {
        "optim": {
            "lr": optim.lr * trial.suggest_float("lr, times the winner's", 0.25, 4, log=True),
            "weight_decay": trial.suggest_float("weight_decay", 1e-3, 0.2, log=True),
            "layer_decay": trial.suggest_float("layer_decay", 0.7, 1.0),
        },
        "augment": {"crop_scale": [min(trial.suggest_float("crop_scale", 0.15, 0.8), crop[1]), crop[1]]},
        "loss": {"label_smoothing": trial.suggest_float("label_smoothing", 0.0, 0.2)},
    }
    for (kind, key), weight in _weights(recipe).items():
        times = trial.suggest_float(f"{kind}.{key}, times the winner's", 0.25, 4, log=True)
        settings.setdefault("techniques", {}).setdefault(kind, {})[key] = weight * times
    return settings


def _weights(recipe: Recipe) -> dict[tuple[str, str], float]:
    """The loss weights, of WEIGHTS, that a recipe sets to a constant."""
    enabled = enabled_techniques(recipe.techniques)
    own = {(kind, key): getattr(enabled[kind], key) for kind, key in WEIGHTS if kind in enabled}
    return {name: float(weight) for name, weight in own.items() if isinstance(weight, int | float) and weight > 0}


def winner(recipe: Recipe) -> dict[str, float]:
    """The winner's own settings, which are the first trial."""
    optim, smoothing = recipe.optim, recipe.loss.label_smoothing
    values = {
        "lr, times the winner's": 1.0, "weight_decay": min(max(optim.weight_decay, 1e-3), 0.2), "layer_decay": optim.layer_decay,
        "crop_scale": recipe.augment.crop_scale[0], "label_smoothing": min(smoothing, 0.2),
    }  # fmt: skip
    return values | {f"{kind}.{key}, times the winner's": 1.0 for kind, key in _weights(recipe)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Space of the search, as `search.json` records it for processes that share the work."""

    recipe: Tree  # the winner's, whole
    epochs: int  # of a trial
    seconds: float  # that a trial takes, about
    deadline: float  # by `time.time`, when the search ends

    @property
    def left(self) -> float:
        """Seconds until the search ends."""
        return self.deadline - time.time()


def search(
    out: Path, space: Space, *, slots: int, seed: int, pool: Workers, tick: Callable[[Sequence[Job]], None], say: Say
) -> None:
    """Run trials, `slots` at a time, for as long as another one fits. Trials of other processes in the same folder count for
    all."""
    study = open_study(out, seed)
    recipe = validate(Recipe, space.recipe, where=str(out / SPACE))
    if not study.trials:
        study.enqueue_trial(winner(recipe))
    while space.left > space.seconds:
        trials = {f"trial-{trial.number}": trial for trial in (study.ask() for _ in range(slots))}
        jobs = [_job(out, name, trial, recipe, space) for name, trial in trials.items()]
        watch = _Pruning(out, trials, space.epochs)

        def look(running: Sequence[Job], watch: _Pruning = watch) -> None:
            for name in watch.pruned([job.name for job in running]):
                pool.stop(name)
            tick(running)

        def tell(ended: Ended, trials: Mapping[str, optuna.Trial] = trials, watch: _Pruning = watch) -> None:
            _tell(study, trials[ended.job.name], watch, ended.code, say)

        pool.run(jobs, slots=slots, until=lambda: space.left <= 0, tick=look, done=tell)


def _job(out: Path, name: str, trial: optuna.Trial, recipe: Recipe, space: Space) -> Job:
    """Write a trial's recipe; return the process that trains it."""
    settings = suggested(trial, recipe)
    trial.set_user_attr("settings", settings)
    path = out / "recipes" / f"{name}.yaml"
    write_recipe(merged(space.recipe, settings, {"train": {"epochs": space.epochs, "validate_every": 1}}), path)
    return Job(name, ("train", str(path), str(out / "runs" / name)), out / "logs" / f"{name}.log")


def join(out: Path, *, slots: int, seed: int, pool: Workers, say: Say) -> None:
    """Share the search of the process that holds the folder: wait until it begins, and run trials until it ends. Raises FgvcError
    where that process ends before."""
    say(f"{out}: another process works there: sharing its search when that begins")
    while not (out / SPACE).is_file():
        if (out / "verdict.json").is_file():
            return
        if not held(out):
            raise FgvcError(f"{out}: the process that worked there has ended before its search; the same command goes on")
        time.sleep(WAIT)
    space = Space(**read_json(out / SPACE, dict))
    search(out, space, slots=slots, seed=seed, pool=pool, tick=lambda running: None, say=say)


def held(out: Path) -> bool:
    """Whether a process works in the folder of an improvement."""
    with file_lock(out / LOCK) as locked:
        return not locked


class _Pruning:
    """Reports what each running trial reaches, epoch by epoch, and asks which are not worth going on with."""

    def __init__(self, out: Path, trials: Mapping[str, optuna.Trial], epochs: int) -> None:
        self._out, self._trials, self._warm_up = out, trials, WARM_UP * epochs
        self._reported: dict[str, int] = {}
        self.gone: set[str] = set()

    def pruned(self, names: Sequence[str]) -> list[str]:
        """Names of running trials that are to be stopped, each once."""
        fresh = []
        for name in names:
            for epoch, value in scores(self._out / "runs" / name):
                if epoch > self._reported.get(name, 0):
                    self._trials[name].report(value, epoch)
                    self._reported[name] = epoch
            if name not in self.gone and self._reported.get(name, 0) > self._warm_up and self._trials[name].should_prune():
                self.gone.add(name)
                fresh.append(name)
        return fresh

    def last(self, name: str) -> float | None:
        return next((value for _, value in reversed(list(scores(self._out / "runs" / name)))), None)


def scores(run: Path) -> Iterator[tuple[int, float]]:
    """Epochs of a run, from 1, and what they reach on the images that choose."""
    for event in read_events(run):
        if event.get("event") == "epoch" and "val_top1" in event:
            yield int(event["epoch"]), float(event["val_top1"])


def _tell(study: optuna.Study, trial: optuna.Trial, watch: _Pruning, code: int, say: Say) -> None:
    import optuna

    name = f"trial-{trial.number}"
    value = watch.last(name)
    if name in watch.gone:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        say(f"{name}: pruned")
    elif code == 0 and value is not None:
        study.tell(trial, value)
        say(f"{name}: {100 * value:.1f} % of the images that choose")
    else:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        say(f"{name}: ended with code {code}")


def best_trial(out: Path, seed: int) -> tuple[str, dict[str, Any]] | None:
    """Name and settings of the best finished trial; None: there is none."""
    study = open_study(out, seed)
    done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]  # a pruned one has a value, too
    if not done:
        return None
    best = max(done, key=lambda trial: (trial.value or 0.0, -trial.number))
    return f"trial-{best.number}", dict(best.user_attrs["settings"])
