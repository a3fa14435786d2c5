"""Tables of a study's runs: means over seeds, and differences to the base arm, paired by seed.

Runs of one seed that validate on folds of train are pooled, as one run on the images of all folds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student

from fgvc.io.bits import unpack

CONFIDENCE = 0.95
Row = Mapping[str, Any]  # of runs.csv: one run on one split; numbers may be text, as read from the file
FLOOR = "floor"  # the line of the logistic regression on the frozen net that the base arm's runs began with
MEASURED = ("macro_f1", "ece", "loss", "box_acc_v2", "max_box_acc_v2", "parts_10")  # beside top1


class Interval(NamedTuple):
    """95 % interval, in the score's unit."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean over seeds of one arm's score minus the base arm's of the same seed, in the score's unit."""

    mean: float
    over_seeds: Interval | None  # Student's: would other seeds say so? None of one, or where all differences are equal
    over_images: Interval | None  # would other images say so? None where it isn't known which images were right
    seeds: int

    @property
    def verdict(self) -> str:
        """Verdict: a gain or a loss where no interval includes 0, else unclear."""
        intervals = [interval for interval in (self.over_seeds, self.over_images) if interval is not None]
        if intervals and all(interval.low > 0 for interval in intervals):
            return "gain"
        return "loss" if intervals and all(interval.high < 0 for interval in intervals) else "unclear"


@dataclass(frozen=True, slots=True)
class Line:
    """A row of a table: one arm under one budget, by the trial that validation chose; shares in [0,1]."""

    arm: str
    trial: int
    trials: int  # that were tried
    settings: str  # as overrides, over what all arms share
    epochs: int
    seeds: int
    folds: int  # of which there are runs; 0: the study has none
    images: int
    top1: float  # mean over seeds
    spread: float  # standard deviation over seeds, NaN of one
    to_base: Difference | None  # None: the base arm itself, or no seed in common with it
    over_floor: Difference | None  # to the floor of the same runs; None: they have none
    cost: float  # seconds of training steps, over the base line's
    means: Mapping[str, float]  # of MEASURED, NaN: not measured
    graphs: tuple[str, ...]  # SHA-256 of the exported graphs: one, where the contract holds in every run


def lines(rows: Iterable[Row], *, split: str, budget: str, base: str | None = None) -> list[Line]:
    """Make the table of one split and budget. `base`: an arm's name, by default the first row's. Arms keep the rows' order."""
    of_budget = [row for row in rows if budget in str(row["budget"]).split("+")]
    trial_counts = {arm: len(trials) for arm, trials in _by_arm(of_budget).items()}
    of_split = _by_arm(row for row in of_budget if row["split"] == split)
    if not of_split:
        return []
    first = base or next(iter(of_split))
    of_base = _best(of_split[first])[1] if first in of_split else []  # its runs
    base_cost = _mean(row["cost"] for row in of_base) if of_base else 1.0
    table = []
    if floors := floor_rows(of_base):
        table = [_line(FLOOR, 0, 1, floors, to_base=paired_difference(floors, of_base), cost=0.0)]
    for arm, trials in of_split.items():
        number, runs = _best(trials)
        to_base, over = None if arm == first else paired_difference(runs, of_base), paired_difference(runs, floor_rows(runs))
        cost = _mean(row["cost"] for row in pool_folds(runs)) / base_cost
        table.append(_line(arm, number, trial_counts[arm], runs, to_base=to_base, over_floor=over, cost=cost))
    return table


def _line(
    arm: str,
    number: int,
    tried: int,
    runs: Sequence[Row],
    *,
    to_base: Difference | None,
    over_floor: Difference | None = None,
    cost: float,
) -> Line:
    seeds_pooled = pool_folds(runs)
    tops = [float(row["top1"]) for row in seeds_pooled]
    return Line(
        arm=arm, trial=number, trials=tried, settings=str(seeds_pooled[0]["settings"]), epochs=int(seeds_pooled[0]["epochs"]),
        seeds=len(seeds_pooled), images=int(float(seeds_pooled[0]["images"])), top1=statistics.mean(tops), spread=_spread(tops),
        folds=len({fold_of(row) for row in runs} - {None}), to_base=to_base, over_floor=over_floor, cost=cost,
        means={name: _mean(row.get(name) for row in seeds_pooled) for name in MEASURED},
        graphs=tuple(dict.fromkeys(str(row["graph"]) for row in seeds_pooled if row["graph"])),
    )  # fmt: skip


def floor_rows(runs: Sequence[Row]) -> list[Row]:
    """Make rows of the runs' floors on the same images, where they have one; only top-1 of it is measured."""
    common_keys = ("arm", "trial", "seed", "fold", "folds", "split", "images")
    return [
        {key: row[key] for key in common_keys if key in row}
        | {"top1": row["floor"], "right": row.get("floor_right", ""), "settings": "", "epochs": 0, "cost": 0, "graph": ""}
        for row in runs
        if row.get("floor") not in (None, "")
    ]


def best_trials(rows: Iterable[Row], *, budget: str) -> dict[str, int]:
    """Best trial by arm: that of the highest mean top-1 on validation under a budget; of equals the first."""
    return {line.arm: line.trial for line in lines(rows, split="val", budget=budget)}


def fold_of(row: Row) -> tuple[int, int] | None:
    """Fold that a run validated on, with their number; None: the data's own validation split."""
    return (int(row["fold"]), int(row["folds"])) if row.get("folds") else None


def pool_folds(runs: Sequence[Row]) -> list[Row]:
    """Pool the runs of a seed's folds into one row, by means over all their images, which in a test split are the same."""
    pooled: list[Row] = []
    for fold_rows in _by_seed(runs).values():
        if len(fold_rows) == 1:
            pooled += fold_rows
            continue
        images = [int(float(row["images"])) for row in fold_rows]
        measured = [key for key in ("top1", *MEASURED) if all(row.get(key) not in (None, "") for row in fold_rows)]
        means = {key: float(np.average([float(row[key]) for row in fold_rows], weights=images)) for key in measured}
        pooled.append({**fold_rows[0], **means, "images": sum(images) if fold_rows[0]["split"] == "val" else max(images)})
    return pooled


def _by_seed(runs: Iterable[Row]) -> dict[int, list[Row]]:
    by_seed: dict[int, list[Row]] = {}
    for row in runs:
        by_seed.setdefault(int(row["seed"]), []).append(row)
    return by_seed


def paired_difference(runs: Sequence[Row], base_runs: Sequence[Row]) -> Difference | None:
    """Difference of two arms' top-1 by the seeds, and folds, that both have.

    Over seeds: mean d +- t(0.975, n-1) sd(d) / sqrt(n), d a seed's difference, over the images of all its folds. Over images:
    mean e +- z(0.975) sd(e) / sqrt(N), e one image's difference (1: right in `runs` alone), mean over the seeds. None: the arms
    have no seed in common. Raises ValueError where a seed and fold has two rows.
    """
    for rows in (runs, base_runs):
        if len({_run(row) for row in rows}) < len(rows):
            raise ValueError("one row a seed and fold; the same run twice would narrow the interval")
    base_by_run = {_run(row): row for row in base_runs}
    pairs = [(row, base_by_run[_run(row)]) for row in runs if _run(row) in base_by_run]
    if not pairs:
        return None
    seeds = _by_seed(row for row, _ in pairs)
    differences = [_seed_difference([(row, base_by_run[_run(row)]) for row in seed_rows]) for seed_rows in seeds.values()]
    mean, count = statistics.mean(differences), len(differences)
    over_seeds = None
    if count > 1 and (spread := _spread(differences)):
        half = float(student.ppf((1 + CONFIDENCE) / 2, count - 1)) * spread / count**0.5
        over_seeds = Interval(mean - half, mean + half)
    return Difference(mean, over_seeds, _over_images(pairs), count)


def _run(row: Row) -> tuple[int, tuple[int, int] | None]:
    return int(row["seed"]), fold_of(row)


def _seed_difference(pairs: Sequence[tuple[Row, Row]]) -> float:
    """Difference of one seed, in whole images where both have as many, so that equal differences are equal in floating point,
    too."""
    images = np.array([[int(float(row["images"])) for row in pair] for pair in pairs])  # (folds, 2)
    right = np.array([[float(row["top1"]) for row in pair] for pair in pairs]) * images
    if (images[:, 0] == images[:, 1]).all():
        right = np.rint(right)
        return float((right[:, 0] - right[:, 1]).sum() / images[:, 0].sum())
    a, b = right.sum(axis=0) / images.sum(axis=0)
    return float(a - b)


def _unpack(row: Row) -> NDArray[np.int64] | None:
    """Unpack which images were right, (N,) of 0 and 1; None where the row does not say."""
    if not row.get("right"):
        return None
    return unpack(str(row["right"]), int(float(row["images"]))).astype(np.int64)


def _over_images(pairs: Sequence[tuple[Row, Row]]) -> Interval | None:
    """Interval over images. Those of a test split are the same in every fold; those that folds validate on differ."""
    differences: dict[tuple[int, int] | None, list[NDArray[np.int64]]] = {}
    for row, other in pairs:
        a, b = _unpack(row), _unpack(other)
        if a is None or b is None or len(a) != len(b):
            return None
        differences.setdefault(fold_of(row) if row["split"] == "val" else None, []).append(a - b)
    if any(len({len(difference) for difference in fold_differences}) > 1 for fold_differences in differences.values()):
        return None
    images = np.concatenate([np.mean(fold_differences, axis=0) for fold_differences in differences.values()])
    if len(images) < 2:
        return None
    half = float(norm.ppf((1 + CONFIDENCE) / 2)) * float(images.std(ddof=1)) / len(images) ** 0.5
    return Interval(float(images.mean()) - half, float(images.mean()) + half)


def has_boxes(lines: Sequence[Line]) -> bool:
    """Whether localisation was measured."""
    return any(not math.isnan(line.means["max_box_acc_v2"]) for line in lines)


def has_floors(lines: Sequence[Line]) -> bool:
    """Whether any run had a floor."""
    return any(line.over_floor is not None for line in lines)


def markdown(lines: Sequence[Line]) -> str:
    """Format the table as markdown, in per cent and points."""
    with_boxes, with_floor = has_boxes(lines), has_floors(lines)
    head = ["arm", "settings", "epochs", "seeds", "top-1 %", "sd", "to the base, points", "over seeds", "over images",
            *(["to the floor, points", "over images"] if with_floor else []), "cost",
            "calibration error %", "loss",
            *(["BoxAccV2 %", "MaxBoxAccV2 (oracle) %", "parts in top 10 %"] if with_boxes else []), "graph"]  # fmt: skip
    body = [
        [
            line.arm, _settings(line), str(line.epochs), training_count(line), _percent(line.top1, 2), _percent(line.spread, 2),
            *_to_base(line.to_base), *(_over_floor(line.over_floor) if with_floor else []), f"{line.cost:.2f}",
            _percent(line.means["ece"], 1), _number(line.means["loss"], 3),
            *([_percent(line.means[name], 1) for name in ("box_acc_v2", "max_box_acc_v2", "parts_10")] if with_boxes else []),
            ", ".join(graph[:12] for graph in line.graphs),
        ]
        for line in lines
    ]  # fmt: skip
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, ["---"] * len(head), *body))


def _to_base(difference: Difference | None) -> tuple[str, str, str]:
    if difference is None:
        return "", "", ""
    return f"{100 * difference.mean:+.2f}", points(difference.over_seeds), points(difference.over_images)


def _over_floor(difference: Difference | None) -> tuple[str, str]:
    return ("", "") if difference is None else (f"{100 * difference.mean:+.2f}", points(difference.over_images))


def points(interval: Interval | None) -> str:
    """Text of an interval in points; empty for None."""
    return "" if interval is None else f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}"


def training_count(line: Line) -> str:
    """Text of how often an arm was trained."""
    return f"{line.seeds} x {line.folds} folds" if line.folds else str(line.seeds)


def _settings(line: Line) -> str:
    trial = f"({line.trial} of {line.trials} trials)" if line.trials > 1 else ""
    settings = f"`{line.settings}`".replace("|", "/") if line.settings else ""
    return f"{settings} {trial}".strip()


def _percent(share: float, places: int) -> str:
    return _number(100 * share, places)


def _number(value: float, places: int) -> str:
    return "" if math.isnan(value) else f"{value:.{places}f}"


def _by_arm(rows: Iterable[Row]) -> dict[str, dict[int, list[Row]]]:
    by_arm: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        by_arm.setdefault(str(row["arm"]), {}).setdefault(int(row["trial"]), []).append(row)
    return by_arm


def _best(trials: Mapping[int, list[Row]]) -> tuple[int, list[Row]]:
    """Best trial and its runs. Trials of more seeds come first: one lucky seed proves nothing."""

    def rank(trial: tuple[int, list[Row]]) -> tuple[int, float, int]:
        number, runs = trial
        return len(runs), _mean(row["top1"] for row in pool_folds(runs)), -number

    return max(trials.items(), key=rank)


def _mean(values: Iterable[Any]) -> float:
    numbers = [float(value) for value in values if value not in (None, "")]
    return statistics.mean(numbers) if numbers else math.nan


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan
