"""Verbs that score and compare trained nets, and show what they look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fgvc.config.data import Split
from fgvc.config.recipe import Selected
from fgvc.data.unseen import parse_seen
from fgvc.evaluation import evaluate as evaluation
from fgvc.evaluation import localize as localization
from fgvc.evaluation.compared import PairedAnswers, collect_answers
from fgvc.evaluation.evaluate import Evaluation
from fgvc.evaluation.judging import select_images
from fgvc.evaluation.localize import Localisation
from fgvc.evaluation.side import open_sides
from fgvc.evaluation.tta import Views
from fgvc.io.files import StrPath, as_path, as_paths, refuse_file
from fgvc.report import document
from fgvc.report.document import Page
from fgvc.runs.loaded import load_run
from fgvc.runtime.bundle import load_bundle


def evaluate(
    run: StrPath,
    split: Literal["val", "test"] | None = None,
    *,
    select: Selected | None = None,
    device: str | None = None,
    views: Views | None = None,
    root: StrPath | None = None,
    max_pixels: int | None = None,
    floor: bool = True,
) -> Evaluation:
    """Score a run's weights, and its floor where it has one: see `fgvc.evaluation.evaluate.evaluate`. `select`: others than it
    ships; `root`: where its set lies now, where that has moved; `max_pixels`: of a picture, in place of the recipe's limit."""
    loaded = load_run(Path(run), select, branches=views == "refined", root=as_path(root), max_pixels=max_pixels)
    return evaluation.evaluate(loaded, split, device=device, views=views, floor=floor)


def localize(
    run: StrPath,
    split: Split | None = None,
    *,
    method: str = "gradcam",
    channels: int | None = None,
    select: Selected | None = None,
    device: str | None = None,
    root: StrPath | None = None,
    max_pixels: int | None = None,
) -> Localisation:
    """Measure where a run's class maps lie, see `fgvc.evaluation.localize.localize`; `select`, `root`, `max_pixels`: as in
    `evaluate`."""
    loaded = load_run(Path(run), select, root=as_path(root), max_pixels=max_pixels)
    return localization.localize(loaded, split, method=method, channels=channels, device=device)


def report(
    runs: StrPath | Sequence[StrPath],
    out: StrPath | None = None,
    *,
    bundles: StrPath | Sequence[StrPath] = (),
    split: Split | None = None,
    select: Selected | None = None,
    device: str | None = None,
    images: int = 10,
    root: StrPath | None = None,
    max_pixels: int | None = None,
) -> Page:
    """Write all that runs show into one page, by default `report.html` in the run, or in the working folder where there are
    several; see `fgvc.report.document.report`. `select`, `root`, `max_pixels`: as in
    `evaluate`, for all of them."""
    folders = as_paths(runs)
    page = (folders[0] if len(folders) == 1 else Path()) / "report.html" if out is None else Path(out)
    refuse_file(page)
    loaded = [load_run(folder, select, root=as_path(root), max_pixels=max_pixels) for folder in folders]
    opened = [load_bundle(bundle) for bundle in as_paths(bundles)]
    return document.report(loaded, page, bundles=opened, split=split, device=device, images=images)


def compare(
    a: StrPath,
    b: StrPath,
    *,
    data: StrPath | None = None,
    split: Split | None = None,
    labels: StrPath | Sequence[StrPath] | None = None,
    preprocess: StrPath | Sequence[StrPath] | None = None,
    certain: bool = False,
    max_pixels: int | None = None,
    root: StrPath | None = None,
    seen: StrPath | None = None,
    unseen: StrPath | None = None,
) -> PairedAnswers:
    """Compare two classifiers - runs, bundles or .onnx files - on the same images: what B gains over A, and what it breaks.

    `data`: a recipe, or a folder of class folders; by default the data of the first that is a run. `split`: by default val where
    there is one, else test; with a deployed file, those of its images that it was not trained on, for which `seen` (train, none,
    or a file) and `unseen` are, too: see `fgvc.evaluation.judging.select_images`. `labels`, `preprocess`: for .onnx files that
    have none beside them, one for whichever needs it, or A's and B's. `certain`: assume no preprocessing, as a gate must not.
    `max_pixels`: of a picture, in place of the data's own limit. `root`: where the set of the runs lies now. Raises FgvcError
    where their classes differ, and NoUnseenImagesError where the deployed file may have been trained on all of the images.
    """
    stated = {"labels": labels, "preprocess": preprocess}
    files = {name: None if given is None else as_paths(given) for name, given in stated.items()}
    sides = open_sides(Path(a), Path(b), **files, certain=certain, root=as_path(root))
    named, seen_text = (None if value is None else str(value) for value in (data, seen))
    images = select_images(named, sides, split, seen=parse_seen(seen_text), unseen=as_path(unseen), max_pixels=max_pixels)
    return collect_answers(*sides, images)


