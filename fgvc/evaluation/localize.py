"""Localisation by a run's class maps, beside the boxes and parts of objects that its data name (`fgvc localize`)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fgvc.config.data import Split
from fgvc.config.images import Preprocess
from fgvc.config.recipe import Selected
from fgvc.data.loader import EvaluationBatch, evaluation_loader
from fgvc.data.quality.stored import refuse_shares
from fgvc.errors import FgvcError
from fgvc.evaluation.localization import (
    OVERLAPS,
    SHARES,
    USUAL,
    Boxes,
    BoxScores,
    MapBoxes,
    Thresholds,
    box_scores,
    boxes_of_maps,
    centre_map,
    choose_thresholds,
    compare_boxes,
    concatenate,
    map_boxes,
    point_coverage,
)
from fgvc.evaluation.png_plots import plot_localisation
from fgvc.images.preprocess import placed
from fgvc.io.display import Display
from fgvc.io.tables import as_csv
from fgvc.models.cam.offline import ClassMaps, class_maps_of, method_name
from fgvc.models.class_maps import normalised
from fgvc.runs.loaded import LoadedRun
from fgvc.runtime.engine import refuse_no_numbers

BATCH = 32
RECORD = "localisation.json"  # in the run
Row = dict[str, str | float]  # of a table
MAPS = ("true", "predicted", "centre")  # of the image's own class, of the predicted class, of no image at all


@dataclass(frozen=True, slots=True)
class Coverage:
    """Part coverage: shares in [0,1] of `visible` parts inside the highest 10 and 20 % of a map's area."""

    visible: int  # visible, and inside the crop
    map: tuple[float, ...]  # of the true class
    centre: tuple[float, ...]  # a control: a round map in the middle of the crop
    uniform: tuple[float, ...] = SHARES  # a control: chance


@dataclass(frozen=True, slots=True, repr=False)
class Localisation(Display):
    """Localisation of a run on one split; also in `<run>/localisation.json` under `<split>.<select>.<method>`."""

    run: Path
    split: Split
    select: Selected
    method: str  # one of fgvc.models.cam.offline.METHODS
    images: int  # that could be read
    top1: float  # of these
    left_out: int  # of these, for their boxes: not known, empty, or wholly outside of the crop
    silent: int  # of these: the map of the true class is flat or not finite
    chosen_from: Split  # whose images chose the thresholds; where it is `split`, the numbers are optimistic
    boxes: Mapping[str, BoxScores]
    parts: Coverage | None  # None: the data name no parts
    tables: tuple[Path, ...]
    unreadable: tuple[str, ...]
    stored: bool = True  # in the run; not where that can't be written

    def numbers(self) -> dict[str, Any]:
        """Numbers for JSON."""
        facts = {key: getattr(self, key) for key in ("images", "top1", "left_out", "silent", "chosen_from")}
        boxes = {name: scores.numbers() for name, scores in self.boxes.items()}
        return facts | {"boxes": boxes, "parts": None if self.parts is None else asdict(self.parts)}

    @property
    def facts(self) -> Mapping[str, object]:
        true = self.boxes["true"]
        of = {"": self.run, "split": f"{self.split}, {true.images} boxes", "method": self.method}
        return of | {"GT-known Loc": f"{100 * true.gt_known_loc:.1f} %", "mean IoU": f"{100 * true.iou:.1f} %"}


@dataclass(frozen=True, slots=True)
class Localizations:
    """Localisation of N readable images of one split, image by image; M of them have a box in the crop."""

    labels: Tensor  # (N,)
    right: Tensor  # (N,) bool
    boxed: Tensor  # (N,) bool
    silent: Tensor  # (N,) bool
    map_boxes: Mapping[str, MapBoxes]  # by MAPS, of the M
    parts: Mapping[str, Tensor]  # (N,P,2) float64: share of a part inside the highest SHARES of the map, NaN: not visible
    unreadable: tuple[str, ...]


def localize(
    run: LoadedRun,
    split: Split | None = None,
    *,
    method: str = "gradcam",
    channels: int | None = None,
    device: str | None = None,
) -> Localisation:
    """Measure where the class maps of a run's weights lie on `split` (default: val where there is one, else test), in what
    evaluation sees of each image. Thresholds are always those that suit the validation split best.

    `method`, `channels`: as those of `fgvc explain`; stderr gets the cost of an expensive one first. Writes
    `localisation.json`, `tables/localisation-<split>.csv` (classes), `tables/parts-<split>.csv` and
    `plots/localisation-<split>.png` into the run; another method than gradcam and another selection than the recipe's are in the
    names. Of a run that can't be written nothing is stored, and stderr says so. Raises FgvcError where the data have no boxes or
    no validation split, or the net no such maps.
    """
    method = method_name(method)
    run.measured(RECORD)  # can be added to
    if run.index.boxes is None:
        raise FgvcError(
            f"{run.folder}: its data name no boxes ({run.index.recognised}); localisation needs a set in CUB layout with "
            "bounding_boxes.txt"
        )
    refuse_shares(run.index)
    split, rows = run.rows_of(split)
    if not len(validation_rows := run.rows("val")):
        raise FgvcError(f"{run.folder}: its data has no val split, on whose images the thresholds of the maps are chosen")
    per_image = localize_rows(run, rows, method=method, channels=channels, device=device)
    on_validation = per_image
    if split != "val":
        on_validation = localize_rows(run, validation_rows, method=method, channels=channels, device=device)
    map_thresholds = choose_thresholds(on_validation.map_boxes["true"])
    of_centre = choose_thresholds(on_validation.map_boxes["centre"])
    thresholds: dict[str, Thresholds] = {"true": map_thresholds, "predicted": map_thresholds, "centre": of_centre}
    name = "-".join([split, *[method] * (method != "gradcam"), *run.suffix])
    tables: dict[str, list[Row]] = {"localisation": by_class(per_image, run.classes, map_thresholds)}
    if per_image.parts:
        tables["parts"] = by_part(per_image, run.index.part_names)
    right = per_image.right[per_image.boxed]
    result = Localisation(
        run=run.folder, split=split, select=run.select, method=method, images=len(per_image.labels),
        top1=float(per_image.right.double().mean()), left_out=int((~per_image.boxed).sum()), silent=int(per_image.silent.sum()),
        chosen_from="val", boxes={of: box_scores(per_image.map_boxes[of], right, thresholds[of]) for of in MAPS},
        parts=coverage(per_image), tables=tuple(run.folder / "tables" / f"{table}-{name}.csv" for table in tables),
        unreadable=per_image.unreadable,
    )  # fmt: skip
    true = result.boxes["true"]
    shares = f"BoxAccV2 {100 * true.box_acc_v2:.1f} % by val's thresholds, MaxBoxAccV2 (oracle) {100 * true.max_box_acc_v2:.1f} %"
    title = f"{split}: {shares}; {true.images} images ({method})"
    files = {f"plots/localisation-{name}.png": plot_localisation(per_image.map_boxes, thresholds, title=title)}
    files |= {f"tables/{table}-{name}.csv": as_csv(lines).encode() for table, lines in tables.items()}
    numbers = {RECORD: {f"{split}.{run.select}.{method}": result.numbers()}}
    return replace(result, stored=run.store(files, numbers))


def localize_rows(
    run: LoadedRun, rows: NDArray[np.int64], *, method: str, channels: int | None = None, device: str | None = None
) -> Localizations:
    """Localise every readable image of `rows`, beside its box and parts. Raises FgvcError where the net has no such maps or gives
    logits that are no numbers, or not one image has a box in the crop."""
    loader = evaluation_loader(
        run.index, rows, spec=run.preprocess, batch_size=BATCH, workers=run.recipe.train.workers, what="maps"
    )
    centre = centre_map(run.preprocess.size)
    centre_boxes = map_boxes(centre.numpy())
    with (
        run.on_device(device) as (place, layout),
        class_maps_of(run.step.net, run.preprocess.size, [method], channels=channels) as maps,
    ):
        if (cost := maps.cost(method)) is not None:
            print(f"{run.folder}: {method} of {len(rows)} images: {cost}", file=sys.stderr)
        batches = [
            _localize_batch(run, batch, batch.images.to(place, memory_format=layout), maps, method, (centre, centre_boxes))
            for batch in loader
        ]
    whole = _concatenate(batches)
    if not whole.boxed.any():
        raise FgvcError(f"{run.folder}: none of its {len(whole.boxed)} images has a box in what evaluation sees of it")
    return whole


def _localize_batch(
    run: LoadedRun, batch: EvaluationBatch, x: Tensor, class_maps: ClassMaps, method: str, centre: tuple[Tensor, Boxes]
) -> Localizations:
    """Localise one batch; its images `x` on the net's device."""
    logits = class_maps.logits(x).float().cpu()
    refuse_no_numbers(logits.numpy(), run.folder)
    predicted = logits.argmax(1)
    right = predicted == batch.labels
    maps, _ = class_maps(x, batch.labels, method)
    component_boxes: dict[str, list[Boxes]] = {"true": boxes_of_maps(maps), "centre": [centre[1]] * len(maps)}
    component_boxes["predicted"] = list(component_boxes["true"])
    if len(wrong := (~right).nonzero()[:, 0]):
        others, _ = class_maps(x[wrong.to(x.device)], predicted[wrong], method)
        for at, boxes in zip(wrong.tolist(), boxes_of_maps(others), strict=True):
            component_boxes["predicted"][at] = boxes
    true, points = annotations_in_input(batch, run.preprocess)
    boxed = (true[:, 2] > true[:, 0]) & (true[:, 3] > true[:, 1])
    boxed_rows = boxed.nonzero()[:, 0].tolist()
    compared = {name: compare_boxes([boxes[at] for at in boxed_rows], true[boxed]) for name, boxes in component_boxes.items()}
    parts: dict[str, Tensor] = {}
    if points is not None:
        maps_by: dict[str, Tensor] = {"true": maps, "centre": centre[0].expand(len(maps), -1, -1)}
        parts = {
            name: torch.stack([point_coverage(heat, points, share) for share in SHARES], dim=2)
            for name, heat in maps_by.items()
        }
    silent = normalised(maps).amax((1, 2)) == 0
    return Localizations(batch.labels, right, boxed, silent, compared, parts, tuple(str(error) for error in batch.bad))


def annotations_in_input(batch: EvaluationBatch, spec: Preprocess) -> tuple[Tensor, Tensor | None]:
    """Map the boxes and parts of a batch's images to continuous pixels of the network's input.

    Returns boxes (B,4) float64, cut at the input's borders, of no area or NaN where nothing is left; and the places (B,P,2)
    float64 of the parts, x and y, NaN where a part is not visible. None: the data have no parts.
    """
    assert batch.boxes is not None  # `localize` checked
    height, width = spec.size
    sizes = [(int(h), int(w)) for h, w in batch.sizes]
    corners = batch.boxes.astype(np.float64).reshape(-1, 2, 2)
    moved = np.stack([placed(both, size, spec) for both, size in zip(corners, sizes, strict=True)])
    boxes = torch.from_numpy(moved.clip(0, (width, height)).reshape(-1, 4))
    if batch.parts is None:
        return boxes, None
    parts = batch.parts.astype(np.float64)
    points = np.where(parts[:, :, 2:] > 0, parts[:, :, :2], np.nan)
    return boxes, torch.from_numpy(
        np.stack([placed(some, size, spec) for some, size in zip(points, sizes, strict=True)])
    )


def _concatenate(batches: Sequence[Localizations]) -> Localizations:
    """Concatenate several batches."""
    return Localizations(
        labels=torch.cat([batch.labels for batch in batches]),
        right=torch.cat([batch.right for batch in batches]),
        boxed=torch.cat([batch.boxed for batch in batches]),
        silent=torch.cat([batch.silent for batch in batches]),
        map_boxes={of: concatenate([batch.map_boxes[of] for batch in batches]) for of in MAPS},
        parts={of: torch.cat([batch.parts[of] for batch in batches]) for of in batches[0].parts},
        unreadable=tuple(error for batch in batches for error in batch.unreadable),
    )


def coverage(per_image: Localizations) -> Coverage | None:
    """Coverage of all visible parts; None without any."""
    if not per_image.parts or not (visible := int(per_image.parts["true"][:, :, 0].isfinite().sum())):
        return None
    whole, centre = (tuple(per_image.parts[of].nanmean((0, 1)).tolist()) for of in ("true", "centre"))
    return Coverage(visible, whole, centre)


def by_class(per_image: Localizations, classes: Sequence[str], thresholds: Thresholds) -> list[Row]:
    """Table of one row a class; cells without any image are empty."""
    iou = torch.full((len(per_image.labels),), torch.nan, dtype=torch.float64)
    iou[per_image.boxed] = per_image.map_boxes["true"].largest[:, thresholds.largest]
    located = (iou >= OVERLAPS[USUAL]).double().where(per_image.boxed, torch.nan)
    rows: list[Row] = []
    for number, name in enumerate(classes):
        of_class = per_image.labels == number
        row: Row = {
            "class": name,
            "images": int(of_class.sum()),
            "top1": _mean(per_image.right[of_class].double()),
            "gt_known_loc": _mean(located[of_class]),
            "top1_loc": _mean(located[of_class] * per_image.right[of_class]),
            "iou": _mean(iou[of_class]),
        }
        if per_image.parts:
            row |= _shares("top", per_image.parts["true"][of_class])
        rows.append(row)
    return rows


def by_part(per_image: Localizations, names: Sequence[str]) -> list[Row]:
    """Table of one row a part: how often it is visible, and lies in the highest 10 and 20 % of the maps, and of a round map in
    the middle. Chance has 10 and 20 %."""
    rows: list[Row] = []
    for at, name in enumerate(names):
        weights, centre = (per_image.parts[of][:, at] for of in ("true", "centre"))
        visible = int(weights[:, 0].isfinite().sum())
        row: Row = {"part": name, "visible": visible}
        rows.append(row | _shares("top", weights) | _shares("centre", centre))
    return rows


def _shares(prefix: str, weights: Tensor) -> Row:
    return {f"{prefix}_{round(100 * share)}": _mean(weights[..., at]) for at, share in enumerate(SHARES)}


def _mean(values: Tensor) -> str | float:
    """Mean of the values that are not NaN; empty without any."""
    return round(float(values.nanmean()), 6) if values.isfinite().any() else ""
