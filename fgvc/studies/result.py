"""Training and measuring of one run of a study; each result is a small file that is written once."""

from __future__ import annotations

import csv
import gc
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fgvc.config.loading import differences
from fgvc.errors import FgvcError
from fgvc.evaluation.evaluate import evaluate
from fgvc.evaluation.localize import localize
from fgvc.exporting.into import skeleton
from fgvc.exporting.onnx import Interface, export_onnx
from fgvc.exporting.proofs import Structural, compare_structure
from fgvc.exporting.prove import untie
from fgvc.exporting.reference import cached_plain
from fgvc.images.preprocess import described
from fgvc.io.bits import pack
from fgvc.models.backbone import deployed
from fgvc.reparam.plain import strip
from fgvc.runs import checkpoint
from fgvc.runs.environment import environment
from fgvc.runs.folder import is_run, read_run
from fgvc.runs.loaded import LoadedRun, load_run
from fgvc.runs.record import NAME, load
from fgvc.runs.weights import has_floor
from fgvc.studies.identity import ScoredSplit, data_digest, digest, index_digest, result_settings
from fgvc.studies.study import Cell
from fgvc.training.trainer import train

Result = dict[str, Any]  # a line of runs.csv
NEEDED = ("arm", "trial", "split", "epochs", "seed", "recipe", "cost")
COUNTS = ("trial", "seed", "fold", "folds", "images", "epochs")
WORDS = {
    "arm",
    "split",
    "right",
    "floor_right",
    "no_maps",
    "select",
    "graph",
    "plain",
    "fed",
    "settings",
    "recipe",
    "fgvc",
    "torch",
    "timm",
    "cpu",
}


def read_lines(table: Path) -> list[Result]:
    """Read the lines of a runs.csv with their types. Raises FgvcError where it is no such file."""
    try:
        rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
        lines = [{key: row[key] for key in NEEDED} | dict(_values(row)) for row in rows]
        if wrong := [row for row in lines if not (row["epochs"] and 0 < float(row["cost"]) < math.inf)]:
            raise ValueError(f"epochs {wrong[0]['epochs']!r}, cost {wrong[0]['cost']!r}")
        return lines
    except (OSError, KeyError, ValueError) as error:
        raise FgvcError(f"{table}: no runs.csv of a study: {error}") from error


def _values(row: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for key, text in row.items():
        if key in WORDS:
            yield key, text
        elif text and key != "budget":  # which follows from the plan
            yield key, int(text) if key in COUNTS else float(text)


def train_cell(cell: Cell, run: Path) -> None:
    """Train the run of a cell to its end. Raises FgvcError where a run of other settings is there."""
    if not finished(cell, run):
        recipe = cell.recipe
        if is_run(run):  # it goes on with its own number of workers and the like, with the data where the study has them
            recipe = read_run(run).model_copy(update={"data": recipe.data})
        train(recipe, run)
        gc.collect()  # nets lie in cycles


def finished(cell: Cell, run: Path) -> bool:
    """Whether the run's training is finished. Raises FgvcError where it has other settings, or other images."""
    if not is_run(run):
        return False
    if changed := differences(result_settings(read_run(run)), result_settings(cell.recipe)):
        rows = "\n".join(f"  {key}: {then!r} in the run, {now!r} now" for key, (then, now) in changed.items())
        raise FgvcError(
            f"{run}: was trained with other settings than the study's:\n{rows}\nChoose another --out, another name for "
            "the arm, or remove that folder"
        )
    if (run / NAME).is_file() and index_digest(load(run / NAME, run).index) != data_digest(cell.recipe):
        raise FgvcError(
            f"{run}: was trained on other images than {cell.recipe.data.root} has now: restore the set as it was, or choose "
            "another --out for a study of what it is now"
        )
    return checkpoint.is_finished(run / "ckpt")


def measure(cell: Cell, folder: Path, split: ScoredSplit, *, cost: float, localise: bool) -> Result:
    """Measure the line of one run on one split. `cost`: of its training steps, over those of the base arm's run."""
    run = load_run(folder, root=cell.recipe.data.root)
    evaluation = evaluate(run, split)
    graph = graph_of(run)
    row: Result = {
        "arm": cell.trial.arm,
        "trial": cell.trial.number,
        "seed": cell.seed,
        **({} if cell.fold is None else {"fold": cell.fold[0], "folds": cell.fold[1]}),
        "split": split,
        **{name: round(value, 6) for name, value in evaluation.scores.numbers().items()},
        "right": pack(evaluation.right),
    }
    if has_floor(folder):
        floor = evaluate(run.selecting("floor"), split)
        row |= {"floor": round(floor.scores.top1, 6), "floor_right": pack(floor.right)}
    if localise and run.index.boxes is not None and len(run.index.rows(split)):
        row |= _localisation_scores(run, split)
    facts = environment()
    return row | {
        "epochs": cell.epochs,
        "cost": round(cost, 4),
        "select": run.select,
        "graph": graph.sha256,
        "plain": graph.reference_sha256,
        "fed": described(run.preprocess),
        "settings": cell.trial.overrides,
        "recipe": digest(cell.recipe),
        **{key: facts[key] for key in ("fgvc", "torch", "timm", "cpu")},
    }


def _localisation_scores(run: LoadedRun, split: ScoredSplit) -> Result:
    try:
        localisation = localize(run, split)
    except FgvcError as error:
        return {"no_maps": str(error)}
    shares = {} if localisation.parts is None else {"parts_10": localisation.parts.map[0], "parts_20": localisation.parts.map[1]}
    true = localisation.boxes["true"]
    facts = {"gt_known_loc": true.gt_known_loc, "top1_loc": true.top1_loc, "box_acc_v2": true.box_acc_v2}
    facts |= {"max_box_acc_v2": true.max_box_acc_v2}
    return {name: round(value, 6) for name, value in (facts | shares).items()}


def graph_of(run: LoadedRun) -> Structural:
    """Compare the run's graph with the independent plain model's: the second of the export's three proofs. The other two
    are `fgvc export`'s, of the weights that are to ship."""
    recipe, classes = run.recipe, len(run.classes)
    if recipe.model.onnx is not None:  # what ships is that file
        graph = skeleton(recipe.model.onnx)
        return Structural(sha256=graph, reference_sha256=graph)
    assert recipe.model.backbone is not None
    backbone, kwargs, exporter = recipe.model.backbone, recipe.model.kwargs, recipe.export.exporter
    plain = strip(run.step.net.cpu(), backbone=backbone, num_classes=classes, kwargs=kwargs)
    interface = Interface.of(recipe.export, recipe.image.size)
    reference, positions, _ = cached_plain(
        backbone=backbone, num_classes=classes, kwargs=kwargs, interface=interface, exporter=exporter
    )
    structural = compare_structure(export_onnx(deployed(plain), exporter=exporter, **asdict(interface)), reference, positions)
    if structural.passed:
        return structural
    return untie(plain, structural, reference, positions, interface=interface, exporter=exporter)[1]
