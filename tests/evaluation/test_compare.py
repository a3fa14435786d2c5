"""A paired comparison against tables worked by hand, the likelihood and the bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from fgvc.errors import FgvcError
from fgvc.evaluation.paired import Gate, Paired, compare_predictions, gain_interval, paired_gain


def table(both: int, lost: int, won: int, neither: int) -> Paired:
    """A says 0, or 1 where it is wrong; so does B."""
    a = np.repeat([0, 0, 1, 1], [both, lost, won, neither])
    b = np.repeat([0, 1, 0, 1], [both, lost, won, neither])
    return compare_predictions(np.zeros(len(a)), a, b)


def test_a_table_by_hand() -> None:
    paired = table(80, 2, 8, 10)
    assert paired.images == 100
    assert paired.gain == pytest.approx(0.06)
    assert paired.negative_flip_rate == pytest.approx(0.02)
    assert (paired.negative.sum(), paired.positive.sum()) == (2, 8)
    assert np.flatnonzero(paired.negative).tolist() == [80, 81]
    # Of 10 images that changed sides, at most 2 or at least 8 one way: (1 + 10 + 45) * 2 of 1024.
    assert paired.p == pytest.approx(112 / 1024)
    assert paired.low < 0 < paired.gain < paired.high


@pytest.mark.parametrize(
    ("lost", "won", "verdict"),
    [
        (0, 6, "gain"), (6, 0, "loss"), (0, 5, "unclear"), (5, 0, "unclear"), (0, 0, "unclear"), (8, 22, "gain"),
        (9, 21, "gain"), (10, 20, "unclear"),
    ],
)  # fmt: skip
def test_one_is_better_where_chance_would_seldom_do_it(lost: int, won: int, verdict: str) -> None:
    """Exact and two-sided at 5 %, as binomial tables have it: of six flips all, of thirty 21."""
    labels = np.zeros(40, dtype=np.int64)
    a, b = (np.array([right] * lost + [1 - right] * won + [0] * (40 - lost - won)) for right in (0, 1))
    assert compare_predictions(labels, a, b).verdict == verdict


def test_the_same_answers_are_no_difference() -> None:
    rng = np.random.default_rng(0)
    y, a = rng.integers(0, 5, (2, 300))
    paired = compare_predictions(y, a, a)
    assert (paired.gain, paired.p, paired.negative.sum(), paired.positive.sum()) == (0, 1, 0, 0)
    assert paired.low == pytest.approx(-paired.high)
    assert paired.high == pytest.approx(1.959964**2 / (300 + 1.959964**2))  # the score interval of 0 of 300
    assert all(row["change"] == 0 for row in paired.by_class("abcde"))


counts = st.integers(0, 60)


@settings(max_examples=200, deadline=None)
@given(both=counts, lost=counts, won=counts, neither=counts)
def test_turned_round_all_signs_turn(both: int, lost: int, won: int, neither: int) -> None:
    if both + lost + won + neither == 0:
        return
    there, back = table(both, lost, won, neither), table(both, won, lost, neither)
    assert there.gain == pytest.approx(-back.gain)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=1e-9)
    assert there.p == back.p
    assert -1 <= there.low <= there.gain <= there.high <= 1
    assert there.negative.sum() == back.positive.sum()


def profile(wins: int, losses: int, images: int, d: float) -> float:
    """The score statistic at a difference d, its nuisance parameter found by maximising the likelihood with a search."""
    rest = images - wins - losses

    def unlikelihood(lost: float) -> float:
        p = lost + d, lost, 1 - 2 * lost - d
        return -sum(n * math.log(q) for n, q in zip((wins, losses, rest), p, strict=True) if n)

    low, high = max(0, -d) + 1e-12, (1 - d) / 2 - 1e-12
    lost = minimize_scalar(unlikelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (wins - losses - images * d) / math.sqrt(images * (2 * lost + d - d**2))


@pytest.mark.parametrize(
    ("wins", "losses", "images"), [(12, 2, 50), (8, 2, 100), (3, 9, 40), (150, 86, 1600), (1, 1, 30), (20, 19, 60)]
)
def test_the_interval_ends_where_the_score_test_does(wins: int, losses: int, images: int) -> None:
    low, high = gain_interval(wins, losses, images)
    assert profile(wins, losses, images, low) == pytest.approx(1.959964, abs=1e-3)
    assert profile(wins, losses, images, high) == pytest.approx(-1.959964, abs=1e-3)


def test_the_interval_is_near_the_bootstraps() -> None:
    rng = np.random.default_rng(0)
    wins, losses, images = 90, 60, 1000
    tables = rng.multinomial(images, [wins / images, losses / images, 1 - (wins + losses) / images], 40_000)
    low, high = np.quantile((tables[:, 0] - tables[:, 1]) / images, [0.025, 0.975])
    assert gain_interval(wins, losses, images) == pytest.approx((low, high), abs=0.002)


@pytest.mark.parametrize("p", [(0.1, 0.05), (0.02, 0.02), (0.3, 0.1)])
def test_the_interval_covers_the_truth_as_often_as_it_says(p: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    tables, times = np.unique(rng.multinomial(60, [*p, 1 - sum(p)], 4000)[:, :2], axis=0, return_counts=True)
    ends = [gain_interval(int(wins), int(losses), 60) for wins, losses in tables]
    covered = sum(n for n, (low, high) in zip(times, ends, strict=True) if low <= p[0] - p[1] <= high) / 4000
    assert 0.93 < covered < 0.98


@pytest.mark.parametrize(
    ("wins", "losses", "images"), [(0, 0, 1), (1, 0, 1), (0, 1, 1), (5, 0, 5), (0, 5, 5), (0, 3, 9)]
)
def test_extremes_have_intervals(wins: int, losses: int, images: int) -> None:
    low, high = gain_interval(wins, losses, images)
    assert -1 <= low <= (wins - losses) / images <= high <= 1
    assert high - low > 0.1


def test_classes_by_hand() -> None:
    y = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    a = np.array([0, 0, 0, 1, 1, 0, 2, 2])
    b = np.array([1, 1, 0, 0, 1, 1, 2, 2])
    rows = compare_predictions(y, a, b).by_class(["rose", "tulip", "lily", "none"])
    assert [row["class"] for row in rows] == ["rose", "lily", "tulip"]
    assert rows[0] == {
        "class": "rose", "images": 4, "a_recall": 0.75, "b_recall": 0.5, "change": -0.25, "negative_flips": 2,
        "positive_flips": 1,
    }  # fmt: skip
    assert rows[2]["change"] == 0.5


@pytest.mark.parametrize(
    ("gate", "failed"),
    [
        (Gate(), []),
        (Gate("2"), []),
        (Gate("1"), ["2 negative flips of 100 images (2.00 %), more than 1"]),
        (Gate("100%"), []),
        (Gate("2%"), []),
        (Gate("1.9 %"), ["2 negative flips of 100 images (2.00 %), more than 1.9 %"]),
        (Gate("1.999%"), ["2 negative flips of 100 images (2.00 %), more than 1.999%"]),
        (Gate("0"), ["2 negative flips of 100 images (2.00 %), more than 0"]),
        (Gate(min_gain=6), []),
        (Gate(min_gain=-1), []),
        (Gate(min_gain=6.5), ["a gain of +6.00 points, less than +6.5"]),
        (
            Gate("0", 7),
            ["2 negative flips of 100 images (2.00 %), more than 0", "a gain of +6.00 points, less than +7"],
        ),
    ],
)
def test_gates(gate: Gate, failed: list[str]) -> None:
    assert gate.failures(table(80, 2, 8, 10)) == failed


def test_a_gate_does_not_contradict_itself_near_its_limit() -> None:
    assert Gate("0.5%", 0.5).failures(table(395, 2, 4, 0)) == [  # 2 / 401 is 0.4988 %, within
        "a gain of +0.499 points, less than +0.5"
    ]
    assert Gate("0.5%").failures(table(397, 2, 0, 0)) == ["2 negative flips of 399 images (0.501 %), more than 0.5%"]
    assert Gate("0.5%").failures(table(199_990, 1001, 0, 8_209)) == []
    failures = Gate("50%").failures(table(14_999, 15_001, 0, 0))
    assert failures == ["15001 negative flips of 30000 images (50.003 %), more than 50%"]


@pytest.mark.parametrize(
    ("flips", "gain"),
    [("-1", None), ("0.5", None), ("few", None), ("", None), ("100.1%", None), ("250 %", None), (None, 101.0)],
)
def test_senseless_gates_are_refused(flips: str | None, gain: float | None) -> None:
    with pytest.raises(FgvcError, match=r"--max-negative-flips|--min-gain"):
        Gate(flips, gain)


def test_nothing_to_compare() -> None:
    with pytest.raises(FgvcError, match="nothing to compare"):
        compare_predictions(np.empty(0), np.empty(0), np.empty(0))


def test_a_gain_is_of_pairs_and_of_the_new_one() -> None:
    old, new = np.array([1, 1, 0, 0, 1, 0, 1, 1], bool), np.array([1, 0, 1, 1, 1, 0, 1, 1], bool)
    gain, low, high = paired_gain(old, new)
    assert gain == pytest.approx(1 / 8)  # two won, one lost
    assert (low, high) == gain_interval(2, 1, 8)
    assert paired_gain(new, old) == pytest.approx((-gain, -high, -low))
