"""Verbs on sets of images: what is wrong with them, and what a frozen net makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fgvc.api.recipes import as_recipe
from fgvc.config.recipe import Recipe
from fgvc.data.quality import checks
from fgvc.data.quality.duplicates import LIKENESS
from fgvc.data.quality.suspects import suspects as find_suspects
from fgvc.errors import FgvcError
from fgvc.evaluation.features import compute_features, input_normalisation, load_frozen
from fgvc.io.files import StrPath, as_path, refuse_file, write_atomic, writing
from fgvc.io.progress import ticking
from fgvc.io.tables import as_csv
from fgvc.report import preview as sheets
from fgvc.report.data import data_page
from fgvc.report.preview import Preview
from fgvc.runs.images import read_index
from fgvc.studies.probe import IMAGES, ProbeResults, Size
from fgvc.studies.probe import probe as run_probe


def check(
    recipe: Recipe | StrPath,
    *,
    suspects: bool = False,
    likeness: float = LIKENESS,
    page: StrPath | None = None,
    table: StrPath | None = None,
    clean: StrPath | None = None,
    **settings: Any,
) -> checks.Report:
    """Read every image of a recipe's data and report what is wrong with it. A bar on stderr where that is a terminal.

    `recipe`, `settings`: as in `train`; a folder of classes will do.
    `suspects`: look for wrong labels, too, with a forward per image through the recipe's backbone and its first weights.
    `likeness`: the correlation of thumbnails from which two pictures are near copies. `page`: an HTML file to write, with the
    images; `table`: a CSV file, a line for each finding about an image; `clean`: a CSV file of the images that are fit to learn
    from, for data.kind: csv, see `fgvc.data.quality.checks.clean_rows`. Raises FgvcError where suspects are wanted and the
    weights are not within reach.
    """
    recipe, page, table, clean = as_recipe(recipe, settings), as_path(page), as_path(table), as_path(clean)
    outs = [out for out in (page, table, clean) if out is not None]
    for out in outs:
        refuse_file(out)
    if len({out.resolve() for out in outs}) < len(outs):
        raise FgvcError(f"{outs[0]}: the page and the tables can't be one file; name others")
    if clean is not None and recipe.data.kind == "hf":
        raise FgvcError("--write-clean: a list of paths is for sets of files, and data.kind: hf has tables")
    index, expected = read_index(recipe), input_normalisation(recipe)
    backbone = load_frozen(recipe, len(index.classes)) if suspects else None
    with ticking() as tick:
        report = checks.check(
            index,
            max_unreadable=recipe.data.max_unreadable,
            expected=expected,
            likeness=likeness,
            progress=tick,
        )
    if backbone is not None:
        with ticking() as tick:
            rows = np.flatnonzero(report.sizes[:, 0] > 0)
            features = compute_features(recipe, backbone, index, rows, progress=partial(tick, "features"))
        families = report.families[features.rows]
        suspect_report = find_suspects(features.vectors, index.labels[features.rows], rows=features.rows, families=families)
        report = checks.with_suspects(report, suspect_report)
    if page is not None:
        _write(page, data_page(report))
    if table is not None:
        _write(table, as_csv(checks.findings(report), checks.COLUMNS))
    if clean is not None:
        _write(clean, checks.clean_list(report))
    return report


def _write(out: Path, text: str) -> None:
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, text)


def probe(
    data: StrPath,
    overrides: Sequence[str] = (),
    *,
    starts: Sequence[str] = (),
    sizes: Sequence[Size] = (),
    crops: Sequence[float] = (),
    images: int = IMAGES,
) -> ProbeResults:
    """Probe a set by logistic regressions on frozen nets, see `fgvc.studies.probe.probe`; `fgvc.studies.advice.advise` draws
    conclusions from the results. A bar on stderr where that is a terminal."""
    with ticking() as tick:
        return run_probe(str(data), overrides, starts=starts, sizes=sizes, crops=crops, images=images, progress=tick)


def preview(
    recipe: Recipe | StrPath,
    out: StrPath,
    *,
    images: int = 6,
    epoch: int = 0,
    run: StrPath | None = None,
    **settings: Any,
) -> Preview:
    """Write contact sheets of what training makes of a recipe's images, see `fgvc.report.preview.preview`. `recipe`, `settings`:
    as in `train`."""
    return sheets.preview(as_recipe(recipe, settings), Path(out), images=images, epoch=epoch, run=as_path(run))
