"""Trackers beside a run's own log: TensorBoard and MLflow. They get what `events.jsonl` gets, and pictures, recipe and bundle.

A tracker never changes a run: what it raises is said once, and the run goes on without it. `trackers.json` in the run's folder
holds the run's number in MLflow, where a resumed run goes on; TensorBoard's files lie in the run's folder.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from fgvc.config.loading import leaves
from fgvc.config.recipe import Recipe
from fgvc.config.training import Log
from fgvc.errors import FgvcError
from fgvc.io.files import as_json, write_atomic
from fgvc.io.jsonl import objects
from fgvc.rng import seeded_globals

NAME = "trackers.json"
FOLDER = "tensorboard"  # in a run's folder
DATABASE, ARTEFACTS = "mlflow.db", "mlflow-artifacts"  # beside the run's folder, for all the runs that lie there
NEEDED = {"tensorboard": ("torch.utils.tensorboard",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}
TABLE = 100  # MLflow takes so many parameters at once
KEY = re.compile(r"[\w.:/ -]{1,250}\Z")  # of MLflow's parameters

Say = Callable[[str], None]
Scalars = Mapping[str, float]


class Tracker(Protocol):
    """A place where runs are watched."""

    known: bool  # whether it had this run before

    def scalars(self, step: int, values: Scalars, when: float) -> None:
        """Log values by name; `when`: seconds since 1970."""

    def picture(self, name: str, png: bytes, step: int) -> None: ...

    def recipe(self, recipe: Recipe, text: str) -> None: ...

    def bundle(self, bundle: Path) -> None: ...

    def close(self, status: str | None) -> None:
        """End, in training with MLflow's FINISHED, FAILED or KILLED."""


def refuse_missing(log: Log) -> None:
    """Import what `log.to` needs. Raises FgvcError where a package is missing."""
    for kind in log.to:
        try:
            with _quiet():
                for module in NEEDED[kind]:
                    import_module(module)
        except ImportError as error:
            raise FgvcError(
                f"log.to: {kind} needs a package that is not installed ({error}): pip install 'fgvc[{kind}]', or take {kind} out "
                "of log.to"
            ) from error


class Trackers:
    """The trackers of a run; none of them where there is nothing to watch, as on other ranks than the first."""

    def __init__(self, say: Say, otherwise: str = "the run goes on without it") -> None:
        """Open no tracker yet. `otherwise`: the end of the message about a tracker that fails."""
        self.say, self.otherwise = say, otherwise
        self._open: dict[str, Tracker] = {}

    def __bool__(self) -> bool:
        return bool(self._open)

    def open(self, run: Path, log: Log, *, step: int | None = None, trains: bool = True) -> None:
        """Open those of `log.to`. `step`: the last one of a run that goes on; a tracker that does not have the run yet is given
        all that came before. `trains`: whether the run begins or goes on."""
        openers: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: TensorBoard(run, step),
            "mlflow": lambda: Mlflow(run, log, trains=trains),
        }
        for wanted in log.to:
            with self._tried(wanted):
                self._open[wanted] = openers[wanted]()
        if step is not None:
            past = [event for event in read_events(run) if event.get("step", 0) <= step]
            for kind, tracker in list(self._open.items()):
                if not tracker.known:
                    with self._tried(kind):
                        _replay(tracker, past)

    def event(self, event: Mapping[str, Any]) -> None:
        """Log the numbers of a line of `events.jsonl`, where it has any."""
        values = scalars_of(event)
        if values:
            self._each(lambda tracker: tracker.scalars(int(event["step"]), values, float(event["time"])))

    def picture(self, name: str, png: Callable[[], bytes], step: int) -> None:
        """Log a picture, which is made where there is a tracker."""
        if self:
            made = b""
            with self._tried(f"the picture {name}"):
                made = png()
            if made:
                self._each(lambda tracker: tracker.picture(name, made, step))

    def recipe(self, recipe: Recipe, text: str) -> None:
        self._each(lambda tracker: tracker.recipe(recipe, text))

    def bundle(self, bundle: Path) -> None:
        self._each(lambda tracker: tracker.bundle(bundle))

    def close(self, status: str | None) -> None:
        self._each(lambda tracker: tracker.close(status))
        self._open.clear()

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for kind, tracker in list(self._open.items()):
            with self._tried(kind):
                do(tracker)

    @contextmanager
    def _tried(self, kind: str) -> Iterator[None]:
        """Go on without the tracker `kind` where it raises anything, and leave the global generators as they are."""
        try:
            with _quiet(), seeded_globals(0):
                yield
        except Exception as error:
            self._open.pop(kind, None)
            first = next(iter(str(error).splitlines()), "")
            self.say(f"WARNING: log.to: {kind}: {type(error).__name__}: {first}; {self.otherwise}")


def log_bundle(run: Path, recipe: Recipe, bundle: Path, say: Say) -> None:
    """Give an exported bundle to the trackers of its run, those that have the run."""
    trackers = Trackers(say, "the bundle is written, and not logged there")
    if not (recipe.log.to and (run / NAME).is_file()):
        return
    try:
        refuse_missing(recipe.log)
    except FgvcError as error:
        say(f"WARNING: {error}; {trackers.otherwise}")
        return
    trackers.open(run, recipe.log, trains=False)
    trackers.bundle(bundle)
    trackers.close(None)


def read_events(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `events.jsonl`; a torn one of a killed run is passed over."""
    try:
        return list(objects((run / "events.jsonl").read_text(encoding="utf-8", errors="replace")))
    except OSError:
        return []


def scalars_of(event: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an event by their names in trackers: train/... of a step, epoch/... of an epoch's means, val/..., lr/...."""
    kind = event.get("event")
    if kind == "step":
        values = {f"train/{name}": value for name, value in (event.get("losses") or {"loss": event["loss"]}).items()}
        values |= {f"lr/{name}": value for name, value in (event.get("rates") or {"base": event["lr"]}).items()}
        values["train/images_per_second"] = event["images_per_second"]
    elif kind in ("epoch", "validated"):
        spared = ("event", "time", "step", "epoch", "lr")
        values = {
            f"val/{key.removeprefix('val_')}" if key.startswith("val_") else f"epoch/{key}": value
            for key, value in event.items()
            if key not in spared
        }
    else:
        return {}
    return {
        name: float(value) for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)
    }


def _replay(tracker: Tracker, events: Iterable[Mapping[str, Any]]) -> None:
    """Give a tracker the past of a run; of what was done twice the last counts."""
    last = {(event.get("event"), event.get("step")): event for event in events if scalars_of(event)}
    for event in sorted(last.values(), key=lambda event: int(event["step"])):
        tracker.scalars(int(event["step"]), scalars_of(event), float(event["time"]))


class TensorBoard:
    """Event files in the folder `tensorboard` of the run."""

    def __init__(self, run: Path, step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.known = (run / FOLDER).is_dir()
        # What an interrupted run logged after its last checkpoint is done again: readers drop it from purge_step on.
        purge = None if step is None else step + 1
        self._writer = SummaryWriter(str(run / FOLDER), purge_step=purge, flush_secs=20)
        _remember(run, "tensorboard", {"folder": FOLDER})

    def scalars(self, step: int, values: Scalars, when: float) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=when)

    def picture(self, name: str, png: bytes, step: int) -> None:
        import io

        import numpy as np
        from PIL import Image

        self._writer.add_image(name, np.array(Image.open(io.BytesIO(png)).convert("RGB")), step, dataformats="HWC")

    def recipe(self, recipe: Recipe, text: str) -> None:
        self._writer.add_text("recipe", _block(text))

    def bundle(self, bundle: Path) -> None:
        manifest = (bundle / "manifest.json").read_text(encoding="utf-8")
        self._writer.add_text("bundle", f"{bundle.resolve()}\n\n{_block(manifest)}")

    def close(self, status: str | None) -> None:
        self._writer.close()


def _block(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())  # Markdown's block of code


class Mlflow:
    """A run of MLflow: in the server or database of `log.mlflow_uri` or MLFLOW_TRACKING_URI, else in `mlflow.db` beside the run's
    folder."""

    def __init__(self, run: Path, log: Log, *, trains: bool) -> None:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        place = run.resolve().parent
        uri = log.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(tracking_uri=uri or f"sqlite:///{place / DATABASE}")
        record = _recorded(run, "mlflow")
        self.known = record.get("uri") == uri and "run" in record
        if self.known:
            try:
                self._run = self._client.get_run(record["run"]).info.run_id
                if trains:
                    self._client.update_run(self._run, status="RUNNING")
            except MlflowException:  # it was deleted there
                self.known = False
        if not (self.known or trains):
            raise FgvcError(f"the run of {run / NAME} is not there")
        if not self.known:
            experiment = self._client.get_experiment_by_name(log.mlflow_experiment)
            number = experiment.experiment_id if experiment is not None else self._client.create_experiment(
                log.mlflow_experiment, artifact_location=None if uri else (place / ARTEFACTS).as_uri()
            )  # fmt: skip
            made = self._client.create_run(number, run_name=run.resolve().name, tags={"fgvc.run": str(run.resolve())})
            self._run = made.info.run_id
            _remember(run, "mlflow", {"uri": uri, "run": self._run})
        self._last: dict[str, int] = {}  # of each metric, its last step

    def scalars(self, step: int, values: Scalars, when: float) -> None:
        from mlflow.entities import Metric

        fresh = {name: value for name, value in values.items() if step > self._last_step(name)}
        self._last |= dict.fromkeys(fresh, step)
        self._client.log_batch(
            self._run, metrics=[Metric(name, value, int(when * 1000), step) for name, value in fresh.items()]
        )

    def _last_step(self, name: str) -> int:
        """The last step of a metric: MLflow keeps whatever is logged twice, as by a run that was killed and does its last steps
        again."""
        if name not in self._last:
            history = self._client.get_metric_history(self._run, name) if self.known else []
            self._last[name] = max((metric.step for metric in history), default=-1)
        return self._last[name]

    def picture(self, name: str, png: bytes, step: int) -> None:
        self._file(f"{name}-{step}.png" if step else f"{name}.png", png, "pictures")

    def recipe(self, recipe: Recipe, text: str) -> None:
        from mlflow.entities import Param

        self._file("config.yaml", text.encode(), None)
        if not self.known:  # MLflow's parameters can't be changed
            rows = [
                Param(key, str(value)[:500]) for key, value in leaves(recipe.model_dump(mode="json")) if KEY.match(key)
            ]
            for at in range(0, len(rows), TABLE):
                self._client.log_batch(self._run, params=rows[at : at + TABLE])

    def bundle(self, bundle: Path) -> None:
        self._client.log_artifacts(self._run, str(bundle), "bundle")

    def close(self, status: str | None) -> None:
        if status is not None:
            self._client.set_terminated(self._run, status)

    def _file(self, name: str, data: bytes, folder: str | None) -> None:
        with TemporaryDirectory() as scratch:
            (Path(scratch) / name).write_bytes(data)
            self._client.log_artifact(self._run, str(Path(scratch) / name), folder)


def _recorded(run: Path, kind: str) -> dict[str, Any]:
    try:
        return dict(json.loads((run / NAME).read_text(encoding="utf-8"))[kind])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _remember(run: Path, kind: str, record: Mapping[str, Any]) -> None:
    others = {other: _recorded(run, other) for other in NEEDED if other != kind and _recorded(run, other)}
    write_atomic(run / NAME, as_json(others | {kind: record}))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence these packages in the block: warnings, lines of a new database; MLflow's usage reports; its minutes of trying again
    where there is no server."""
    defaults = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    for logger in ("mlflow", "alembic"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
