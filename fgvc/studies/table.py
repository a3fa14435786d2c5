"""The lines of a study's runs as tables: means over seeds, and differences to the base arm that are paired by seed.

Runs of one seed that validate on folds of train are judged together, as one that was asked about the images of all.
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

CONFIDENCE = 0.95
Row = Mapping[str, Any]  # of runs.csv: one run on one split; numbers may be text, as read from the file
FLOOR = "floor"  # the line of the logistic regression on the frozen net that the base arm's runs began with
MEASURED = ("macro_f1", "ece", "loss", "box_acc_v2", "max_box_acc_v2", "parts_10")  # beside top1


class Interval(NamedTuple):
    """95 %, in the score's unit."""

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
    def said(self) -> str:
        """How it reads: a gain or a loss where no interval has 0 in it."""
        known = [interval for interval in (self.over_seeds, self.over_images) if interval is not None]
        if known and all(interval.low > 0 for interval in known):
            return "gain"
        return "loss" if known and all(interval.high < 0 for interval in known) else "unclear"


@dataclass(frozen=True, slots=True)
class Line:
    """One arm under one budget, by the trial that validation chose. Shares in [0,1]."""

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
    against: Difference | None  # None: the base arm itself, or no seed in common with it
    over_floor: Difference | None  # to the floor of the same runs; None: they have none
    cost: float  # seconds of training steps, over the base line's
    means: Mapping[str, float]  # of MEASURED, NaN: not measured
    graphs: tuple[str, ...]  # SHA-256 of the exported graphs: one, where the contract holds in every run


def lines(rows: Iterable[Row], *, split: str, budget: str, base: str | None = None) -> list[Line]:
    """The table of one split and budget. `base`: an arm's name, by default the first row's. Arms keep the order of the rows."""
    meant = [row for row in rows if budget in str(row["budget"]).split("+")]
    tried = {arm: len(trials) for arm, trials in _by_arm(meant).items()}
    chosen = _by_arm(row for row in meant if row["split"] == split)
    if not chosen:
        return []
    first = base or next(iter(chosen))
    of_base = _best(chosen[first])[1] if first in chosen else []  # its runs
    whole = _mean(row["cost"] for row in of_base) if of_base else 1.0
    found = [_line(FLOOR, 0, 1, floors, against=paired(floors, of_base), cost=0.0)] if (floors := of_floor(of_base)) else []
    for arm, trials in chosen.items():
        number, runs = _best(trials)
        against, over = None if arm == first else paired(runs, of_base), paired(runs, of_floor(runs))
        cost = _mean(row["cost"] for row in pooled(runs)) / whole
        found.append(_line(arm, number, tried[arm], runs, against=against, over_floor=over, cost=cost))
    return found


def _line(
    arm: str,
    number: int,
    tried: int,
    runs: Sequence[Row],
    *,
    against: Difference | None,
    over_floor: Difference | None = None,
    cost: float,
) -> Line:
    mine = pooled(runs)
    tops = [float(row["top1"]) for row in mine]
    return Line(
        arm=arm, trial=number, trials=tried, settings=str(mine[0]["settings"]), epochs=int(mine[0]["epochs"]),
        seeds=len(mine), images=int(float(mine[0]["images"])), top1=statistics.mean(tops), spread=_spread(tops),
        folds=len({fold_of(row) for row in runs} - {None}), against=against, over_floor=over_floor, cost=cost,
        means={name: _mean(row.get(name) for row in mine) for name in MEASURED},
        graphs=tuple(dict.fromkeys(str(row["graph"]) for row in mine if row["graph"])),
    )  # fmt: skip


def of_floor(runs: Sequence[Row]) -> list[Row]:
    """The same runs by what their floor says of the same images, where they have one; nothing else of it is measured."""
    kept = ("arm", "trial", "seed", "fold", "folds", "split", "images")
    return [
        {key: row[key] for key in kept if key in row}
        | {"top1": row["floor"], "right": row.get("floor_right", ""), "settings": "", "epochs": 0, "cost": 0, "graph": ""}
        for row in runs
        if row.get("floor") not in (None, "")
    ]


def best_trials(rows: Iterable[Row], *, budget: str) -> dict[str, int]:
    """Arm -> the trial of the highest mean top-1 on validation under a budget; of equals the first."""
    return {line.arm: line.trial for line in lines(rows, split="val", budget=budget)}


def fold_of(row: Row) -> tuple[int, int] | None:
    """Which fold of how many a run validated on; None: the data's own validation split."""
    return (int(row["fold"]), int(row["folds"])) if row.get("folds") else None


def pooled(runs: Sequence[Row]) -> list[Row]:
    """One row a seed: of the runs of its folds the means over all their images, which in a test split are the same."""
    found: list[Row] = []
    for own in _by_seed(runs).values():
        if len(own) == 1:
            found += own
            continue
        images = [int(float(row["images"])) for row in own]
        known = [key for key in ("top1", *MEASURED) if all(row.get(key) not in (None, "") for row in own)]
        means = {key: float(np.average([float(row[key]) for row in own], weights=images)) for key in known}
        found.append({**own[0], **means, "images": sum(images) if own[0]["split"] == "val" else max(images)})
    return found


def _by_seed(runs: Iterable[Row]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    for row in runs:
        found.setdefault(int(row["seed"]), []).append(row)
    return found


def paired(mine: Sequence[Row], others: Sequence[Row]) -> Difference | None:
    """Top-1 of two arms by the seeds, and folds, that both have. Over seeds: mean d +- t(0.975, n-1) sd(d) / sqrt(n), d a seed's
    difference, over the images of all its folds. Over images: mean e +- z(0.975) sd(e) / sqrt(N), e one image's difference (1:
    right in mine alone), mean over the seeds."""
    for rows in (mine, others):
        if len({_run(row) for row in rows}) < len(rows):
            raise ValueError("one row a seed and fold; the same run twice would narrow the interval")
    theirs = {_run(row): row for row in others}
    pairs = [(row, theirs[_run(row)]) for row in mine if _run(row) in theirs]
    if not pairs:
        return None
    seeds = _by_seed(row for row, _ in pairs)
    apart = [_apart([(row, theirs[_run(row)]) for row in own]) for own in seeds.values()]
    mean, count = statistics.mean(apart), len(apart)
    found = None
    if count > 1 and (spread := _spread(apart)):
        half = float(student.ppf((1 + CONFIDENCE) / 2, count - 1)) * spread / count**0.5
        found = Interval(mean - half, mean + half)
    return Difference(mean, found, _over_images(pairs), count)


def _run(row: Row) -> tuple[int, tuple[int, int] | None]:
    return int(row["seed"]), fold_of(row)


def _apart(pairs: Sequence[tuple[Row, Row]]) -> float:
    """Of one seed. In whole images, where both were asked about as many: equal differences are to be equal in floating point,
    too."""
    images = np.array([[int(float(row["images"])) for row in pair] for pair in pairs])  # (folds, 2)
    right = np.array([[float(row["top1"]) for row in pair] for pair in pairs]) * images
    if (images[:, 0] == images[:, 1]).all():
        right = np.rint(right)
        return float((right[:, 0] - right[:, 1]).sum() / images[:, 0].sum())
    a, b = right.sum(axis=0) / images.sum(axis=0)
    return float(a - b)


def pack(right: NDArray[np.bool_]) -> str:
    """Which of the images (N,) were right, for a cell of a CSV: bits, the first one the highest, as hexadecimal digits."""
    return np.packbits(right).tobytes().hex()


def _unpack(row: Row) -> NDArray[np.int64] | None:
    """(N,) 1 where the image was right, or None where the row does not say."""
    if not row.get("right"):
        return None
    bits = np.frombuffer(bytes.fromhex(str(row["right"])), np.uint8)
    return np.unpackbits(bits, count=int(float(row["images"]))).astype(np.int64)


def _over_images(pairs: Sequence[tuple[Row, Row]]) -> Interval | None:
    """The images of a test split are the same in every fold; those that folds validate on are others in each."""
    apart: dict[tuple[int, int] | None, list[NDArray[np.int64]]] = {}
    for row, other in pairs:
        a, b = _unpack(row), _unpack(other)
        if a is None or b is None or len(a) != len(b):
            return None
        apart.setdefault(fold_of(row) if row["split"] == "val" else None, []).append(a - b)
    if any(len({len(one) for one in own}) > 1 for own in apart.values()):
        return None
    images = np.concatenate([np.mean(own, axis=0) for own in apart.values()])
    if len(images) < 2:
        return None
    half = float(norm.ppf((1 + CONFIDENCE) / 2)) * float(images.std(ddof=1)) / len(images) ** 0.5
    return Interval(float(images.mean()) - half, float(images.mean()) + half)


def boxes(found: Sequence[Line]) -> bool:
    """Whether it was measured where runs look."""
    return any(not math.isnan(line.means["max_box_acc_v2"]) for line in found)


def floored(found: Sequence[Line]) -> bool:
    """Whether any run had a floor."""
    return any(line.over_floor is not None for line in found)


def markdown(found: Sequence[Line]) -> str:
    """The table for people, in per cent and points."""
    boxed, beside = boxes(found), floored(found)
    head = ["arm", "settings", "epochs", "seeds", "top-1 %", "sd", "to the base, points", "over seeds", "over images",
            *(["to the floor, points", "over images"] if beside else []), "cost",
            "calibration error %", "loss",
            *(["BoxAccV2 %", "MaxBoxAccV2 (oracle) %", "parts in top 10 %"] if boxed else []), "graph"]  # fmt: skip
    body = [
        [
            line.arm, _settings(line), str(line.epochs), asked(line), _percent(line.top1, 2), _percent(line.spread, 2),
            *_against(line.against), *(_over_floor(line.over_floor) if beside else []), f"{line.cost:.2f}",
            _percent(line.means["ece"], 1), _number(line.means["loss"], 3),
            *([_percent(line.means[name], 1) for name in ("box_acc_v2", "max_box_acc_v2", "parts_10")] if boxed else []),
            ", ".join(graph[:12] for graph in line.graphs),
        ]
        for line in found
    ]  # fmt: skip
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, ["---"] * len(head), *body))


def _against(found: Difference | None) -> tuple[str, str, str]:
    if found is None:
        return "", "", ""
    return f"{100 * found.mean:+.2f}", points(found.over_seeds), points(found.over_images)


def _over_floor(found: Difference | None) -> tuple[str, str]:
    return ("", "") if found is None else (f"{100 * found.mean:+.2f}", points(found.over_images))


def points(interval: Interval | None) -> str:
    return "" if interval is None else f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}"


def asked(line: Line) -> str:
    """How often an arm was trained."""
    return f"{line.seeds} x {line.folds} folds" if line.folds else str(line.seeds)


def _settings(line: Line) -> str:
    chosen = f"({line.trial} of {line.trials} trials)" if line.trials > 1 else ""
    said = f"`{line.settings}`".replace("|", "/") if line.settings else ""
    return f"{said} {chosen}".strip()


def _percent(share: float, places: int) -> str:
    return _number(100 * share, places)


def _number(value: float, places: int) -> str:
    return "" if math.isnan(value) else f"{value:.{places}f}"


def _by_arm(rows: Iterable[Row]) -> dict[str, dict[int, list[Row]]]:
    found: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        found.setdefault(str(row["arm"]), {}).setdefault(int(row["trial"]), []).append(row)
    return found


def _best(trials: Mapping[int, list[Row]]) -> tuple[int, list[Row]]:
    """Trials of more seeds come first: one lucky seed proves nothing."""
    return max(trials.items(), key=lambda one: (len(one[1]), _mean(row["top1"] for row in pooled(one[1])), -one[0]))


def _mean(values: Iterable[Any]) -> float:
    known = [float(value) for value in values if value not in (None, "")]
    return statistics.mean(known) if known else math.nan


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan
