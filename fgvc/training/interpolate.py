"""Linear interpolation of the weights between a run's start and its end (`fgvc interpolate`).

WiSE-FT (Wortsman et al., CVPR 2022, arXiv:2109.01903).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fgvc import __version__
from fgvc.config.recipe import Selected
from fgvc.config.training import Log
from fgvc.data.loader import EvaluationBatch, evaluation_loader
from fgvc.data.unseen import FEWEST_TO_CHOOSE
from fgvc.errors import FgvcError, NoNumbersError
from fgvc.evaluation import metrics
from fgvc.evaluation.sample import Sample
from fgvc.io.bits import pack, unpack
from fgvc.io.display import Display, table
from fgvc.io.files import as_json, fill, make_folder, making, refuse_place
from fgvc.io.progress import track
from fgvc.models.backbone import head_prefixes
from fgvc.runs import checkpoint
from fgvc.runs.checkpoint import State
from fgvc.runs.deployed import FOLDER, RECORD
from fgvc.runs.folder import INTERPOLATION
from fgvc.runs.loaded import LoadedRun
from fgvc.runs.record import NAME
from fgvc.runs.weights import selected_weights
from fgvc.runtime.bundle import read_json
from fgvc.training.log import Events

KEPT = 2**30  # bytes of images that are decoded once for all shares; more are decoded for each
SHARES = tuple(round(0.1 * tenth, 1) for tenth in range(11))
COPIED_FILES = ("config.yaml", "labels.json", "preprocess.json", "env.json", "metrics.csv", "events.jsonl", NAME, RECORD)
SESSION_KEYS = ("optimizer", "scaler", "rng", "answers")  # of a checkpoint: what training goes on with, and its net's predictions


@dataclass(frozen=True, slots=True, repr=False)
class Interpolation(Display):
    """An interpolated net (1 - share) start + share end, written as a run of its own."""

    run: Path
    out: Path
    select: Selected  # the weights at the end of the way
    share: float
    by: str  # the validation score that chose the share
    scores: Mapping[float, metrics.Scores | None]  # of each share on validation, None: no numbers; empty: the share was given
    right: Mapping[float, NDArray[np.bool_]]  # of each share: whether each readable validation image (N,) is named rightly
    unreadable: tuple[str, ...]  # of the validation images

    @property
    def doubt(self) -> str | None:
        """A warning where few images chose the share."""
        images = next((scores.images for scores in self.scores.values() if scores is not None), FEWEST_TO_CHOOSE)
        if images >= FEWEST_TO_CHOOSE:
            return None
        few = f"{images} images, fewer than {FEWEST_TO_CHOOSE}"
        return f"the best of {len(self.scores)} by {few}, is partly luck; --share fixes one"

    @property
    def facts(self) -> Mapping[str, object]:
        by = self.by if self.scores else "hand"
        return {"": self.out, "share": f"{self.share:g}", "of the way from the start of": self.run, "chosen by": by}

    def _repr_html_(self) -> str:
        rows = ((f"{share:g}", "" if s is None else f"{100 * s.top1:.2f}") for share, s in self.scores.items())
        return Display._repr_html_(self) + (table(rows, head=("share", "top-1 %")) if self.scores else "")


def interpolate(
    run: LoadedRun, out: Path, *, share: float | None = None, device: str | None = None
) -> Interpolation:
    """Write the net (1 - share) start + share end of a run, between `ckpt/start` and the weights that it ended with, as a run.
    The run is opened with the latter (`select` "end").

    Of a run whose best epoch ships, the end is that of its training: better nets may lie on the way there. The share in [0,1] is
    the one of SHARES with the best `select_by` on the run's validation split, the smallest of several; or it is given, and
    nothing is scored. Running statistics lie between those of both nets as weights do; integers are the end's.
    Re-parameterised blocks stay so, and the way is one of their own weights. `device`: another than it was trained on. Writes
    `interpolation.json` beside what a run has.
    Raises FgvcError where `out` is there already or inside of the run, the run's start is gone, damaged, or has no trained head,
    and where there is no validation split and no share; then nothing is written.
    """
    folder = run.folder
    _refuse_out(folder, out)
    if share is not None and not 0 <= share <= 1:
        raise FgvcError(f"--share {share:g}: a number from 0 (the start) to 1 (the end)")
    trained = selected_weights(folder, run.recipe, "start"), selected_weights(folder, run.recipe, run.select)
    start, end = (each.state for each in trained)
    _refuse_headless(run, start)
    if end.identity != run.identity:
        raise FgvcError(f"{folder}: has trained on while it was read; try again")
    if not end.progress.finished:
        print(f"WARNING: {folder}: its training is not finished; its end is that of step {end.progress.step}", file=sys.stderr)
    weights = trained[0].weights, trained[1].weights
    if weights[0].keys() != weights[1].keys():
        raise FgvcError(f"{folder}: its ckpt/start is of a run of other settings; put that of this run there")
    scores: dict[float, metrics.Scores | None] = {}
    right: dict[float, NDArray[np.bool_]] = {}
    unreadable: tuple[str, ...] = ()
    by = run.recipe.select_by
    if share is None:
        scores, right, unreadable = _validation_scores(run, weights, device)
        share = _best_share(scores, by, folder)
    interpolation = Interpolation(folder, out, run.select, share, by, scores, right, unreadable)
    _write(interpolation, start, end, interpolate_weights(*weights, share), run.recipe.log)
    return interpolation


def right_by_share(folder: Path) -> dict[float, NDArray[np.bool_]]:
    """Read, for each share that was scored, whether each validation image (N,) is named rightly; empty where none was, or
    `folder` is no interpolated run."""
    if not (folder / INTERPOLATION).is_file():
        return {}
    scores = read_json(folder / INTERPOLATION, dict)["scores"]
    return {row["share"]: unpack(row["right"], row["images"]) for row in scores if "right" in row}


def interpolate_weights(start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Interpolate each float tensor, (1 - share) start + share end, in float64: exactly the start at 0 and the end at 1. Others
    are the end's."""
    return {
        name: ((1 - share) * start[name].double() + share * last.double()).to(last.dtype) if last.is_floating_point() else last
        for name, last in end.items()
    }


def _refuse_out(folder: Path, out: Path) -> None:
    refuse_place(out)
    if out.resolve() == folder.resolve() or folder.resolve() in out.resolve().parents:
        raise FgvcError(f"{out}: inside of {folder}, which stays as it is; choose another --out")
    if out.exists() or out.is_symlink():
        raise FgvcError(f"{out}: exists already; remove it, or choose another --out")


def _refuse_headless(run: LoadedRun, start_state: State) -> None:
    """Raise FgvcError where what the run started from had a head that had learnt nothing."""
    net, head = run.step.net, run.recipe.model.head
    names = {f"net.{name}" for name, _ in net.named_parameters() if name.startswith(head_prefixes(net))}
    if head != "probe" and not names <= set(start_state.rest.get("pretrained", ())):
        raise FgvcError(
            f"{run.folder}: it started from a head without training (model.head: {head}), so nothing on the way from there "
            "is of use. Train with model.head=probe, which fits a head before the first step, and interpolate that run"
        )


def _validation_scores(
    run: LoadedRun, ends: tuple[Mapping[str, Tensor], Mapping[str, Tensor]], device: str | None
) -> tuple[dict[float, metrics.Scores | None], dict[float, NDArray[np.bool_]], tuple[str, ...]]:
    """Validation scores of the net of each share, as evaluation computes them; whether it names each image rightly; and the
    images that can't be read."""
    if not len(rows := run.rows("val")):
        raise FgvcError(f"{run.folder}: its data has no validation split to choose the share by; give it: --share 0.5")
    scores: dict[float, metrics.Scores | None] = {}
    right: dict[float, NDArray[np.bool_]] = {}
    unreadable: dict[str, None] = {}
    classes, nothing = len(run.classes), np.empty(0, np.int64)
    workers = run.recipe.train.workers

    def loaded() -> Iterator[EvaluationBatch]:
        for batch in evaluation_loader(run.index, rows, spec=run.preprocess, batch_size=64, workers=workers):
            unreadable.update(dict.fromkeys(str(error) for error in batch.bad))
            yield batch

    def batches(sample: Sample) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in loaded() if kept is None else kept:
            sample.add_batch(batch)
            yield batch.images, batch.labels

    kept = list(loaded()) if 12 * math.prod(run.preprocess.size) * len(rows) <= KEPT else None
    with run.on_device(device) as (place, layout):
        for share in track(SHARES, "shares", len(SHARES)):
            run.step.net.load_state_dict(interpolate_weights(*ends, share))
            sample = Sample(run.step.net, nothing)
            try:
                scores[share] = metrics.evaluate(
                    sample, batches(sample), classes=classes, device=place, memory_format=layout, ending=run.preprocess.ending
                )
                right[share] = sample.right
            except NoNumbersError:  # both ends may be well, and what lies between not
                scores[share] = None
    return scores, right, tuple(unreadable)


def _best_share(scores: Mapping[float, metrics.Scores | None], by: str, folder: Path) -> float:
    """The share of the best score; of several the smallest, which is nearest to the pretrained net."""
    sign = 1 if by in metrics.SMALLER_IS_BETTER else -1
    ranked = [(sign * share_scores.numbers()[by], share) for share, share_scores in scores.items() if share_scores is not None]
    if not ranked:
        raise FgvcError(f"{folder}: none of the nets from its start to its end gives numbers; train anew with a lower optim.lr")
    return min(ranked)[1]


def _write(interpolation: Interpolation, start: State, end: State, net: dict[str, Tensor], log: Log) -> None:
    """Write a finished run with two checkpoints: the start, and the interpolated net under all other names."""
    at = interpolation.scores.get(interpolation.share)
    progress = replace(
        end.progress, finished=True, best=None if at is None else at.numbers()[interpolation.by], sums={}, counts={}
    )
    rest = {key: value for key, value in end.rest.items() if key not in SESSION_KEYS}
    state = State(net, end.branches, None if end.ema is None else net, rest, progress)
    record = {
        "run": str(interpolation.run.resolve()), "start": start.identity, "end": end.identity, "select": interpolation.select,
        "share": interpolation.share, "by": interpolation.by if interpolation.scores else None, "fgvc": __version__,
        "scores": [
            {"share": share, **({} if scores is None else scores.numbers() | {"right": pack(interpolation.right[share])})}
            for share, scores in interpolation.scores.items()
        ],
    }  # fmt: skip
    with making(interpolation.out) as scratch:
        for file in [interpolation.run / name for name in COPIED_FILES if (interpolation.run / name).is_file()]:
            fill(scratch / file.name, file.read_bytes())
        if (kept := interpolation.run / FOLDER).is_dir():
            make_folder(scratch / FOLDER)
            for file in kept.iterdir():
                fill(scratch / FOLDER / file.name, file.read_bytes())
        fill(scratch / INTERPOLATION, as_json(record))
        events = Events(scratch, log)
        events.write("interpolated", run=record["run"], share=interpolation.share)
        events.write("finished", step=progress.step, seconds=round(progress.seconds, 1))
        checkpoint.save(scratch / "ckpt", start, start=True)
        checkpoint.save(scratch / "ckpt", state, best=True)
