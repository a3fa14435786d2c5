"""Tables of studies, against numbers worked by hand."""

from __future__ import annotations

import csv
import io
import statistics
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from fgvc.io.bits import pack
from fgvc.io.tables import as_csv
from fgvc.studies.page import write_tables
from fgvc.studies.study import Plan
from fgvc.studies.table import best_trials, lines, markdown, paired_difference

SHARES = st.integers(0, 100).map(lambda right: right / 100)  # of 100 images
PLAIN, OTHER = (0.70, 0.68, 0.69), (0.73, 0.70, 0.72)  # apart by 3, 2 and 3 points


def row(arm: str, seed: int, top1: float, **keys: Any) -> dict[str, Any]:
    return {
        "arm": arm, "trial": 1, "budget": "epochs", "seed": seed, "split": "val", "images": 100, "top1": top1, "ece": 0.05,
        "loss": 1.2, "macro_f1": top1, "epochs": 12, "cost": 1.0, "graph": "a" * 64, "settings": "optim.lr=0.5",
    } | keys  # fmt: skip


def rows(**keys: Any) -> list[dict[str, Any]]:
    plain = [row("plain", seed, top1, **keys) for seed, top1 in enumerate(PLAIN)]
    return plain + [row("other", seed, top1, cost=2.0, **keys) for seed, top1 in enumerate(OTHER)]


def test_the_interval_is_students_over_the_seeds() -> None:
    # d = 0.03, 0.02, 0.03: mean 0.0266667, sd 0.0057735, t(0.975, 2) = 4.30265, half = 4.30265 * 0.0057735 / sqrt(3)
    runs, base_runs = ([row(arm, s, x) for s, x in enumerate(tops)] for arm, tops in (("other", OTHER), ("plain", PLAIN)))
    difference = paired_difference(runs, base_runs)
    assert difference is not None
    assert difference.mean == pytest.approx(0.0266667, abs=1e-6)
    assert difference.over_seeds == pytest.approx((0.0266667 - 0.0143422, 0.0266667 + 0.0143422), abs=1e-6)
    assert difference.over_images is None
    assert (difference.seeds, difference.verdict) == (3, "gain")


@given(st.lists(st.tuples(SHARES, SHARES), min_size=2, max_size=8), st.randoms())
def test_pairs_are_by_seed_whatever_the_order(pairs: list[tuple[float, float]], random: Any) -> None:
    mine = [row("other", seed, a) for seed, (a, _) in enumerate(pairs)]
    theirs = [row("plain", seed, b) for seed, (_, b) in enumerate(pairs)]
    random.shuffle(theirs)
    difference = paired_difference(mine, theirs)
    assert difference is not None
    assert difference.mean == pytest.approx(statistics.mean(a - b for a, b in pairs), abs=1e-12)
    back = paired_difference(theirs, mine)
    assert back is not None
    assert back.mean == pytest.approx(-difference.mean, abs=1e-12)
    if difference.over_seeds is None:
        assert back.over_seeds is None
    else:
        assert back.over_seeds == pytest.approx((-difference.over_seeds.high, -difference.over_seeds.low), abs=1e-12)


def test_one_seed_has_no_interval_and_no_verdict() -> None:
    difference = paired_difference([row("other", 0, 0.9), row("other", 5, 0.1)], [row("plain", 0, 0.5)])
    assert difference is not None
    assert (difference.seeds, difference.verdict) == (1, "unclear")
    assert difference.mean == pytest.approx(0.4)
    assert difference.over_seeds is None
    assert paired_difference([row("other", 1, 0.9)], [row("plain", 0, 0.5)]) is None


def test_a_table_has_a_line_an_arm_and_the_base_is_compared_with_nothing() -> None:
    plain, other = lines(rows(), split="val", budget="epochs")
    assert (plain.arm, plain.to_base, plain.seeds) == ("plain", None, 3)
    assert plain.top1 == pytest.approx(0.69)
    assert plain.spread == pytest.approx(0.01)
    assert other.to_base is not None
    assert other.cost == 2.0
    assert other.graphs == ("a" * 64,)
    assert lines(rows(), split="test", budget="epochs") == []
    assert lines(rows(), split="val", budget="seconds") == []
    assert len(lines(rows(budget="epochs+seconds"), split="val", budget="seconds")) == 2


def test_validation_chooses_the_trial_and_few_seeds_do_not_win() -> None:
    trials = [row("plain", seed, 0.5) for seed in range(2)]
    trials += [row("other", seed, 0.6 + 0.1 * number, trial=number) for number in (1, 2) for seed in range(2)]
    trials += [row("other", 0, 0.99, trial=3)]  # one seed so far
    assert best_trials(trials, budget="epochs") == {"plain": 1, "other": 2}
    line = lines(trials, split="val", budget="epochs")[1]
    assert (line.trial, line.trials, line.top1) == (2, 3, pytest.approx(0.8))


def test_a_run_that_is_there_twice_narrows_no_interval() -> None:
    plain = [row("plain", seed, 0.5) for seed in (0, 1)]
    with pytest.raises(ValueError, match="one row a seed"):
        paired_difference([row("other", 0, 0.6), row("other", 0, 0.6), row("other", 1, 0.7)], plain)


def test_equal_differences_are_no_verdict() -> None:
    for images, tops in ((100, (0.5, 0.5)), (100, (0.7, 0.68)), (750, (0.472, 0.456))):
        plain = [row("plain", s, top1, images=images) for s, top1 in enumerate(tops)]
        other = [row("other", s, round(top1 + 3 / images, 6), images=images) for s, top1 in enumerate(tops)]
        difference = paired_difference(other, plain)
        assert difference is not None
        assert difference.mean == pytest.approx(3 / images)
        assert (difference.over_seeds, difference.verdict) == (None, "unclear")


@given(st.integers(2, 60), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_the_interval_over_images_is_that_of_the_paired_images(images: int, seeds: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    mine, theirs = draw.random((2, seeds, images)) < 0.6
    a, b = (
        [row(arm, s, bits.mean(), images=images, right=pack(bits)) for s, bits in enumerate(right)]
        for arm, right in (("other", mine), ("plain", theirs))
    )
    difference = paired_difference(a, b)
    assert difference is not None
    assert difference.over_images is not None
    apart = (mine.astype(float) - theirs).mean(0)
    error = scipy.stats.sem(apart)
    assert difference.over_images == pytest.approx(
        (apart.mean() - 1.959964 * error, apart.mean() + 1.959964 * error), abs=1e-6
    )
    assert sum(difference.over_images) / 2 == pytest.approx(difference.mean, abs=1e-12)


def test_one_seed_and_many_images_are_a_verdict_about_the_images() -> None:
    right = np.arange(1000) < 700
    rows = [row("plain", 0, 0.7, images=1000, right=pack(right)), row("other", 0, 0.8, images=1000)]
    difference = paired_difference([rows[1] | {"right": pack(np.arange(1000) < 800)}], rows[:1])
    assert difference is not None
    assert (difference.over_seeds, difference.verdict) == (None, "gain")
    # Of the other row it isn't known which were right.
    assert paired_difference(rows[1:], rows[:1]).verdict == "unclear"  # type: ignore[union-attr]
    other = [rows[1] | {"right": pack(right[:999]), "images": 999}]
    assert paired_difference(other, rows[:1]).over_images is None  # type: ignore[union-attr]  # other images


def test_bits_of_a_cell_survive_a_csv_whatever_they_look_like() -> None:
    for digits in ("00000000", "12345678", "1e100000"):  # none is a number
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8)).astype(bool)
        assert pack(bits) == digits
        written = as_csv([row("plain", 0, bits.mean(), images=32, right=pack(bits))])
        assert next(csv.DictReader(io.StringIO(written)))["right"] == digits


def test_the_test_part_chooses_nothing_and_says_how_many_were_tried() -> None:
    rows_ = [row("plain", 0, 0.5), row("other", 0, 0.6, trial=1), row("other", 0, 0.7, trial=2)]
    rows_ += [row("plain", 0, 0.4, split="test"), row("other", 0, 0.3, split="test", trial=2)]
    line = lines(rows_, split="test", budget="epochs")[1]
    assert (line.trial, line.trials, line.top1) == (2, 2, pytest.approx(0.3))


def test_costs_are_in_units_of_the_trial_of_the_base_that_was_chosen() -> None:
    rows_ = [row("plain", 0, 0.5), row("plain", 0, 0.6, trial=2, cost=2.0), row("other", 0, 0.6, cost=3.0)]
    assert [line.cost for line in lines(rows_, split="val", budget="epochs")] == [1.0, 1.5]


def test_a_committed_csv_gives_the_same_table() -> None:
    all_rows = rows() + rows(split="test", box_acc_v2=0.5, max_box_acc_v2=0.6, parts_10=0.3)
    read = list(csv.DictReader(io.StringIO(as_csv(all_rows))))
    for split in ("val", "test"):
        table = markdown(lines(all_rows, split=split, budget="epochs"))
        assert table == markdown(lines(read, split=split, budget="epochs"))
        for words in ("| BoxAccV2 % | MaxBoxAccV2 (oracle) % |", "| 50.0 | 60.0 | 30.0 |"):  # by val's thresholds; by its own
            assert (words in table) is (split == "test")
    assert (
        "| other | `optim.lr=0.5` | 12 | 3 | 71.67 | 1.53 | +2.67 | +1.2 to +4.1 |  | 2.00 | 5.0 | 1.200 | aaaaaaaaaaaa |"
        in markdown(lines(read, split="val", budget="epochs"))
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_differences_are_drawn_where_there_are_any(tmp_path: Path, seed: int) -> None:
    trials = [SimpleNamespace(arm=arm, number=1) for arm in ("plain", "other")]
    plan = SimpleNamespace(name="s", trials=trials, base=trials[0], study=SimpleNamespace(budget=["epochs"], folds=None))
    write_tables(cast(Plan, plan), tmp_path, [row("plain", 0, 0.5), row("other", seed, 0.6)])
    assert ("<figure>" in (tmp_path / "table.html").read_text(encoding="utf-8")) is (seed == 0)


def test_arms_that_are_not_fed_alike_are_named(tmp_path: Path) -> None:
    """Their weights ask for other means, where `deploy` says none: equal graphs, but one could not take the other's place."""
    trials = [SimpleNamespace(arm=arm, number=1) for arm in ("plain", "other")]
    plan = SimpleNamespace(name="s", trials=trials, base=trials[0], study=SimpleNamespace(budget=["epochs"], folds=None))
    half, imagenet = "mean (0.5, 0.5, 0.5)", "mean (0.485, 0.456, 0.406)"
    for feeds, warned in ((["", half], False), ([half, half], False), ([imagenet, half], True)):
        rows_ = [row(arm, 0, 0.5, fed=fed) for arm, fed in zip(("plain", "other"), feeds, strict=True)]
        write_tables(cast(Plan, plan), tmp_path, rows_)
        for file in ("table.md", "table.html"):
            text = (tmp_path / file).read_text(encoding="utf-8")
            assert ("not fed alike" in text) is warned
            assert (imagenet in text) is warned


def folded(arm: str, seed: int, right: dict[int, np.ndarray], **keys: Any) -> list[dict[str, Any]]:
    """The rows of a study by folds, one a fold, of the images of that fold which were right."""
    return [
        row(arm, seed, bits.mean(), images=len(bits), right=pack(bits), fold=fold, folds=5, loss=1.0 + fold, **keys)
        for fold, bits in right.items()
    ]


@given(st.lists(st.integers(1, 30), min_size=2, max_size=5), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_folds_are_judged_as_if_one_net_had_been_asked_about_all(sizes: list[int], seeds: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    cuts = np.cumsum(sizes)[:-1]
    arms: dict[str, list[dict[str, Any]]] = {"other": [], "plain": []}
    whole: dict[str, list[dict[str, Any]]] = {"other": [], "plain": []}
    for arm, s in product(arms, range(seeds)):
        bits = draw.random(sum(sizes)) < 0.6
        arms[arm] += folded(arm, s, dict(enumerate(np.split(bits, cuts))))
        whole[arm].append(row(arm, s, bits.mean(), images=len(bits), right=pack(bits)))
    draw.shuffle(arms["other"])
    difference = paired_difference(arms["other"], arms["plain"])
    expected = paired_difference(whole["other"], whole["plain"])
    assert difference is not None
    assert expected is not None
    assert (difference.mean, difference.seeds) == (pytest.approx(expected.mean, abs=1e-12), seeds)
    assert difference.over_images == pytest.approx(expected.over_images, abs=1e-12)
    assert (difference.over_seeds is None) == (expected.over_seeds is None)
    if difference.over_seeds is not None:
        assert difference.over_seeds == pytest.approx(expected.over_seeds, abs=1e-9)
    pooled, alone = (lines([*of["plain"], *of["other"]], split="val", budget="epochs")[1] for of in (arms, whole))
    assert (pooled.seeds, pooled.folds, pooled.images) == (seeds, len(sizes), sum(sizes))
    assert (alone.folds, alone.images) == (0, sum(sizes))
    assert pooled.top1 == pytest.approx(alone.top1, abs=1e-12)
    assert pooled.means["loss"] == pytest.approx(np.average(1.0 + np.arange(len(sizes)), weights=sizes))


def test_an_arm_that_lacks_folds_is_compared_on_those_that_it_has() -> None:
    bits = [np.arange(10) < right for right in (5, 6, 7)]
    plain = folded("plain", 0, dict(enumerate(bits)))
    other = folded("other", 0, {0: np.arange(10) < 6, 2: np.arange(10) < 9})
    difference = paired_difference(other, plain)
    assert difference is not None
    assert difference.mean == pytest.approx((1 + 2) / 20)
    assert difference.over_images is not None
    assert sum(difference.over_images) / 2 == pytest.approx(3 / 20)
    table = lines([*plain, *other], split="val", budget="epochs")
    assert [(line.seeds, line.folds, line.images) for line in table] == [(1, 3, 30), (1, 2, 20)]
    assert "| 1 x 2 folds | 75.00 |" in markdown(table)
    with pytest.raises(ValueError, match="one row a seed and fold"):
        paired_difference([*other, other[0]], plain)


def test_nets_of_all_folds_are_asked_about_the_same_test_images() -> None:
    draw = np.random.default_rng(0)
    mine, theirs = draw.random((2, 2, 3, 40)) < 0.6  # seeds, folds, images
    a, b = (
        [one for seed in range(2) for one in folded(arm, seed, dict(enumerate(right[seed])), split="test")]
        for arm, right in (("other", mine), ("plain", theirs))
    )
    difference = paired_difference(a, b)
    assert difference is not None
    apart = (mine.astype(float) - theirs).mean((0, 1))
    assert difference.mean == pytest.approx(apart.mean())
    error = scipy.stats.sem(apart)
    low, high = apart.mean() - 1.959964 * error, apart.mean() + 1.959964 * error
    assert difference.over_images == pytest.approx((low, high), abs=1e-6)
    line = lines(a, split="test", budget="epochs")[0]
    assert (line.images, line.seeds, line.folds) == (40, 2, 3)
    assert line.top1 == pytest.approx(mine.mean())


def test_a_csv_of_folds_gives_the_same_table() -> None:
    rows_ = folded("plain", 0, {0: np.arange(9) < 4, 1: np.arange(8) < 4})
    rows_ += folded("other", 0, {0: np.arange(9) < 5, 1: np.arange(8) < 7})
    read = list(csv.DictReader(io.StringIO(as_csv(rows_))))
    assert markdown(lines(rows_, split="val", budget="epochs")) == markdown(lines(read, split="val", budget="epochs"))


def test_the_floor_is_a_line_and_every_arm_stands_beside_its_own() -> None:
    draw = np.random.default_rng(1)
    floor, plain, other = draw.random((3, 100)) < np.array([[0.6], [0.5], [0.8]])
    facts = {"floor": floor.mean(), "floor_right": pack(floor)}
    arms = {"plain": plain, "other": other}
    both = [row(arm, 0, right.mean(), right=pack(right), **facts) for arm, right in arms.items()]
    read = list(csv.DictReader(io.StringIO(as_csv(both))))
    for rows_ in (both, read):
        lines_ = lines(rows_, split="val", budget="epochs")
        assert [line.arm for line in lines_] == ["floor", "plain", "other"]
        assert lines_[0].top1 == pytest.approx(floor.mean())
        assert lines_[0].to_base is not None
        assert lines_[0].to_base.mean == pytest.approx(floor.mean() - plain.mean())
        for line, right in zip(lines_[1:], (plain, other), strict=True):
            assert line.over_floor is not None
            apart = right.astype(float) - floor
            assert line.over_floor.mean == pytest.approx(apart.mean())
            half = 1.959964 * scipy.stats.sem(apart)
            assert line.over_floor.over_images == pytest.approx((apart.mean() - half, apart.mean() + half), abs=1e-6)
        assert markdown(lines_).splitlines()[2].startswith("| floor | ")
    assert best_trials(both, budget="epochs")["plain"] == 1
    without = lines([row("plain", 0, 0.5), row("other", 0, 0.6)], split="val", budget="epochs")
    assert [line.arm for line in without] == ["plain", "other"]
    assert "floor" not in markdown(without)
