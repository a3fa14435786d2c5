"""What is no better is not called better, and what is better is."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from fgvc.evaluation.paired import Gate, beats, compare_predictions, compare_right, gain_interval
from fgvc.improvement.verdict import ALPHA, judge, least_gain, read_verdict


def test_answers_swapped_at_random_are_seldom_called_better() -> None:
    rng, images = np.random.default_rng(0), 690
    labels = np.zeros(images, int)
    old, new = ((rng.random(images) > share).astype(int) for share in (0.73, 0.79))
    called = 0
    for _ in range(1000):
        swap = rng.random(images) < 0.5
        pair = compare_predictions(labels, np.where(swap, new, old), np.where(swap, old, new))
        called += judge(pair, Gate(), {}).better
    assert called <= 25


@pytest.mark.parametrize("gate", [Gate(min_gain=20), Gate(max_negative_flips="1")])
def test_a_gain_that_is_shown_and_gates_that_hold(gate: Gate) -> None:
    labels, old = np.zeros(300, int), np.repeat([0, 1, 1], 100)
    new = old.copy()
    new[100:150], new[:5] = 0, 1
    pair = compare_predictions(labels, old, new)
    verdict = judge(pair, Gate(), {"floor": new == 0})
    assert verdict.better
    assert (verdict.repaired, verdict.broken) == (50, 5)
    assert verdict.others == {"floor": pytest.approx(145 / 300)}
    assert "33.3 % to 48.3 %" in verdict.sentence("net.onnx")
    assert read_verdict(verdict.record) == verdict
    shut = judge(pair, gate, {})
    assert not shut.better
    assert "Not shipped" in shut.sentence("net.onnx")


def test_a_small_gain_says_how_many_images_would_show_it() -> None:
    labels, old = np.zeros(200, int), np.repeat([0, 1], 100)
    new = old.copy()
    new[100:110], new[:5] = 0, 1
    verdict = judge(compare_predictions(labels, old, new), Gate(), {})
    assert not verdict.better
    assert verdict.would_decide is not None
    for times, decided in ((verdict.would_decide / 200, True), (0.9 * verdict.would_decide / 200, False)):
        p = binomtest(round(10 * times), round(15 * times)).pvalue
        assert (gain_interval(10 * times, 5 * times, 200 * times)[0] > 0 and p < ALPHA) == decided
    worse = judge(compare_predictions(labels, new, old), Gate(), {})
    assert worse.would_decide is None


def test_an_interval_above_0_that_the_exact_test_denies_needs_more_images() -> None:
    labels, old = np.zeros(200, int), np.repeat([0, 1], 100)
    new = old.copy()
    new[100:110], new[:2] = 0, 1
    verdict = judge(compare_predictions(labels, old, new), Gate(), {})
    assert verdict.low > 0
    assert verdict.p > ALPHA
    assert not verdict.better
    assert verdict.would_decide is not None
    times = verdict.would_decide / 200
    assert binomtest(round(10 * times), round(12 * times)).pvalue < ALPHA


def test_a_rung_must_win_by_more_than_one_standard_error() -> None:
    old = np.repeat([True, False], 100)
    same, little, much = old.copy(), old.copy(), old.copy()
    little[100:103], little[:2] = True, False
    much[100:112], much[:2] = True, False
    assert not beats(old, same)
    assert not beats(old, little)
    assert beats(old, much)
    assert not beats(much, old)


def test_the_least_gain_is_that_of_images_of_which_none_is_broken() -> None:
    assert least_gain(80) == 7 / 80  # of six alike, none the other way, chance has 2 / 2^6 = 0.031
    assert least_gain(1000) == 7 / 1000
    assert least_gain(5) > 1


def test_without_a_deployed_file_the_plain_recipe_is_what_was_to_be_beaten() -> None:
    right = np.arange(60) < 40
    verdict = judge(compare_right(np.zeros(60, np.int64), right, right), Gate(None, None), {}, deployed=False)
    sentence = verdict.sentence("resnet18")
    assert sentence.startswith("Not shown to be better than the plain recipe of resnet18: from 66.7 % to 66.7 %")
    assert "may be used all the same" in sentence
