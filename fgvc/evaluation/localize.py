"""`fgvc localize`: where a run's class maps lie, beside the objects' boxes and parts that its data name."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
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
    around,
    around_each,
    centre_map,
    choose,
    compare_boxes,
    covered,
    joined,
    score,
)
from fgvc.evaluation.plot import plot_localisation
from fgvc.images.preprocess import placed
from fgvc.io.tables import as_csv
from fgvc.models.cam.offline import ClassMaps, class_maps_of, method_name
from fgvc.models.class_maps import normalised
from fgvc.runs.loaded import LoadedRun
from fgvc.runtime.engine import refuse_no_numbers

BATCH = 32
RECORD = "localisation.json"  # in the run
Row = dict[str, str | float]  # of a table
OF = (
    "true",
    "predicted",
    "centre",
)  # whose map: of the image's own class, of the class that is said, of no image at all


@dataclass(frozen=True, slots=True)
class Coverage:
    """Shares in [0,1] of `visible` parts inside the highest 10 and 20 % of a map's area."""

    visible: int  # visible, and inside the crop
    map: tuple[float, ...]  # of the true class
    centre: tuple[float, ...]  # a control: a round map in the middle of the crop
    uniform: tuple[float, ...] = SHARES  # a control: chance


@dataclass(frozen=True, slots=True)
class Localisation:
    """Also in `<run>/localisation.json` under `<split>.<select>.<method>`."""

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
        """For JSON."""
        facts = {key: getattr(self, key) for key in ("images", "top1", "left_out", "silent", "chosen_from")}
        boxes = {name: scores.numbers() for name, scores in self.boxes.items()}
        return facts | {"boxes": boxes, "parts": None if self.parts is None else asdict(self.parts)}


@dataclass(frozen=True, slots=True)
class Localizations:
    """What was found in N readable images of one part; of M of them the crop has a box."""

    labels: Tensor  # (N,)
    right: Tensor  # (N,) bool
    boxed: Tensor  # (N,) bool
    silent: Tensor  # (N,) bool
    found: Mapping[str, MapBoxes]  # of the M
    parts: Mapping[str, Tensor]  # (N,P,2) float64: how much of a part lies in each of SHARES, NaN: unseen
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

    `method`, `channels`: as those of `fgvc explain`; what an expensive one costs is said on stderr first. Writes
    `localisation.json`, `tables/localisation-<split>.csv` (classes), `tables/parts-<split>.csv` and
    `plots/localisation-<split>.png` into the run; another method than gradcam and another selection than the recipe's are in the
    names. Of a run that can't be written nothing is stored, and stderr says so. Raises FgvcError where the data have no boxes or
    no validation split, or the net no such maps.
    """
    chosen_method = method_name(method)
    run.measured(RECORD)  # can be added to
    if run.index.boxes is None:
        raise FgvcError(
            f"{run.folder}: its data name no boxes ({run.index.recognised}); localisation needs a set in CUB layout with "
            "bounding_boxes.txt"
        )
    refuse_shares(run.index)
    split, rows = run.rows_of(split)
    if not len(validation := run.rows("val")):
        raise FgvcError(f"{run.folder}: its data has no val split, on whose images the thresholds of the maps are chosen")
    looked = look(run, rows, method=chosen_method, channels=channels, device=device)
    source = looked
    if split != "val":
        source = look(run, validation, method=chosen_method, channels=channels, device=device)
    of_map = choose(source.found["true"])
    chosen: dict[str, Thresholds] = {"true": of_map, "predicted": of_map, "centre": choose(source.found["centre"])}
    name = "-".join([split, *[chosen_method] * (chosen_method != "gradcam"), *run.suffix])
    tables: dict[str, list[Row]] = {"localisation": by_class(looked, run.classes, of_map)}
    if looked.parts:
        tables["parts"] = by_part(looked, run.index.part_names)
    result = Localisation(
        run=run.folder, split=split, select=run.select, method=chosen_method, images=len(looked.labels),
        top1=float(looked.right.double().mean()), left_out=int((~looked.boxed).sum()), silent=int(looked.silent.sum()),
        chosen_from="val", boxes={of: score(looked.found[of], looked.right[looked.boxed], chosen[of]) for of in OF},
        parts=coverage(looked), tables=tuple(run.folder / "tables" / f"{table}-{name}.csv" for table in tables),
        unreadable=looked.unreadable,
    )  # fmt: skip
    true = result.boxes["true"]
    shares = f"BoxAccV2 {100 * true.box_acc_v2:.1f} % by val's thresholds, MaxBoxAccV2 (oracle) {100 * true.max_box_acc_v2:.1f} %"
    title = f"{split}: {shares}; {true.images} images ({chosen_method})"
    files = {f"plots/localisation-{name}.png": plot_localisation(looked.found, chosen, title=title)}
    files |= {f"tables/{table}-{name}.csv": as_csv(lines).encode() for table, lines in tables.items()}
    measured_now = {RECORD: {f"{split}.{run.select}.{chosen_method}": result.numbers()}}
    return replace(result, stored=run.leave(files, measured_now))


def look(
    run: LoadedRun, rows: NDArray[np.int64], *, method: str, channels: int | None = None, device: str | None = None
) -> Localizations:
    """Maps of every readable image, beside its box and parts. Raises FgvcError where the net has no such maps or gives logits
    that are no numbers, or not one image has a box in the crop."""
    loader = evaluation_loader(
        run.index, rows, spec=run.preprocess, batch_size=BATCH, workers=run.recipe.train.workers
    )
    console = Console(stderr=True)
    total, silent = -(-len(rows) // BATCH), not console.is_terminal
    centre = centre_map(run.preprocess.size)
    around_centre = around(centre.numpy())
    with (
        run.placed(device) as (where, layout),
        class_maps_of(run.step.net, run.preprocess.size, [method], channels=channels) as maps,
    ):
        if (cost := maps.cost(method)) is not None:
            print(f"{run.folder}: {method} of {len(rows)} images: {cost}", file=sys.stderr)
        looked = [
            _look(run, batch, batch.images.to(where, memory_format=layout), maps, method, (centre, around_centre))
            for batch in track(loader, "maps", total=total, console=console, transient=True, disable=silent)
        ]
    whole = _joined(looked)
    if not whole.boxed.any():
        raise FgvcError(f"{run.folder}: none of its {len(whole.boxed)} images has a box in what evaluation sees of it")
    return whole


def _look(
    run: LoadedRun, batch: EvaluationBatch, x: Tensor, look: ClassMaps, method: str, centre: tuple[Tensor, Boxes]
) -> Localizations:
    """One batch; its images `x` on the net's device."""
    logits = look.logits(x).float().cpu()
    refuse_no_numbers(logits.numpy(), run.folder)
    said = logits.argmax(1)
    right = said == batch.labels
    maps, _ = look(x, batch.labels, method)
    of: dict[str, list[Boxes]] = {"true": around_each(maps), "centre": [centre[1]] * len(maps)}
    of["predicted"] = list(of["true"])
    if len(wrong := (~right).nonzero()[:, 0]):
        others, _ = look(x[wrong.to(x.device)], said[wrong], method)
        for at, boxes in zip(wrong.tolist(), around_each(others), strict=True):
            of["predicted"][at] = boxes
    true, points = in_input(batch, run.preprocess)
    boxed = (true[:, 2] > true[:, 0]) & (true[:, 3] > true[:, 1])
    kept = boxed.nonzero()[:, 0].tolist()
    found = {name: compare_boxes([boxes[at] for at in kept], true[boxed]) for name, boxes in of.items()}
    parts: dict[str, Tensor] = {}
    if points is not None:
        both: dict[str, Tensor] = {"true": maps, "centre": centre[0].expand(len(maps), -1, -1)}
        parts = {
            name: torch.stack([covered(which, points, share) for share in SHARES], dim=2)
            for name, which in both.items()
        }
    silent = normalised(maps).amax((1, 2)) == 0
    return Localizations(batch.labels, right, boxed, silent, found, parts, tuple(str(error) for error in batch.bad))


def in_input(batch: EvaluationBatch, spec: Preprocess) -> tuple[Tensor, Tensor | None]:
    """Where boxes and parts of a batch's images lie in the network's input, in continuous pixels, float64: left, top, right,
    bottom (B,4), cut at its borders, of no area or NaN where nothing is left; x and y (B,P,2), NaN where a part can't be
    seen, or None."""
    assert batch.boxes is not None  # `localize` looked
    height, width = spec.size
    sizes = [(int(h), int(w)) for h, w in batch.sizes]
    left_top, sides = np.split(batch.boxes.astype(np.float64), 2, axis=1)
    corners = np.stack([left_top, left_top + sides], axis=1)
    moved = np.stack([placed(both, size, spec) for both, size in zip(corners, sizes, strict=True)])
    boxes = torch.from_numpy(moved.clip(0, (width, height)).reshape(-1, 4))
    if batch.parts is None:
        return boxes, None
    parts = batch.parts.astype(np.float64)
    points = np.where(parts[:, :, 2:] > 0, parts[:, :, :2], np.nan)
    return boxes, torch.from_numpy(
        np.stack([placed(some, size, spec) for some, size in zip(points, sizes, strict=True)])
    )


def _joined(looked: Sequence[Localizations]) -> Localizations:
    """Those of several batches as one."""
    return Localizations(
        labels=torch.cat([one.labels for one in looked]),
        right=torch.cat([one.right for one in looked]),
        boxed=torch.cat([one.boxed for one in looked]),
        silent=torch.cat([one.silent for one in looked]),
        found={of: joined([one.found[of] for one in looked]) for of in OF},
        parts={of: torch.cat([one.parts[of] for one in looked]) for of in looked[0].parts},
        unreadable=tuple(error for one in looked for error in one.unreadable),
    )


def coverage(looked: Localizations) -> Coverage | None:
    """Over all parts that can be seen; None without any."""
    if not looked.parts or not (visible := int(looked.parts["true"][:, :, 0].isfinite().sum())):
        return None
    whole, centre = (tuple(looked.parts[of].nanmean((0, 1)).tolist()) for of in ("true", "centre"))
    return Coverage(visible, whole, centre)


def by_class(looked: Localizations, classes: Sequence[str], chosen: Thresholds) -> list[Row]:
    """One row a class; empty where there is nothing to tell."""
    iou = torch.full((len(looked.labels),), torch.nan, dtype=torch.float64)
    iou[looked.boxed] = looked.found["true"].largest[:, chosen.largest]
    located = (iou >= OVERLAPS[USUAL]).double().where(looked.boxed, torch.nan)
    rows: list[Row] = []
    for number, name in enumerate(classes):
        mine = looked.labels == number
        row: Row = {
            "class": name,
            "images": int(mine.sum()),
            "top1": _mean(looked.right[mine].double()),
            "gt_known_loc": _mean(located[mine]),
            "top1_loc": _mean(located[mine] * looked.right[mine]),
            "iou": _mean(iou[mine]),
        }
        if looked.parts:
            row |= _shares("top", looked.parts["true"][mine])
        rows.append(row)
    return rows


def by_part(looked: Localizations, names: Sequence[str]) -> list[Row]:
    """One row a part: how often it can be seen, and lies in the highest 10 and 20 % of the maps, and of a round map in the
    middle. Chance has 10 and 20 %."""
    rows: list[Row] = []
    for at, name in enumerate(names):
        mine, centre = (looked.parts[of][:, at] for of in ("true", "centre"))
        seen = int(mine[:, 0].isfinite().sum())
        row: Row = {"part": name, "visible": seen}
        rows.append(row | _shares("top", mine) | _shares("centre", centre))
    return rows


def _shares(prefix: str, weights: Tensor) -> Row:
    return {f"{prefix}_{round(100 * share)}": _mean(weights[..., at]) for at, share in enumerate(SHARES)}


def _mean(values: Tensor) -> str | float:
    """Of those that are not NaN; empty without any."""
    return round(float(values.nanmean()), 6) if values.isfinite().any() else ""
