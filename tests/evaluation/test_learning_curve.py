"""Cross-validated probes: against a loop by hand, and where nothing may be learned from what is judged."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from fgvc.errors import FgvcError
from fgvc.evaluation.learning_curve import FOLDS, SHARES, Curve, learning_curve, make_folds, weight_of
from fgvc.evaluation.paired import gain_interval
from fgvc.models.probe import fit_probe


def blobs(classes: int = 4, images: int = 25, *, spread: float = 1.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(classes), images)
    return (rng.normal(size=(classes, 8))[y] + rng.normal(0, spread, (len(y), 8))).astype(np.float32), y


def test_folds_are_disjoint_nested_and_balanced() -> None:
    _, y = blobs()
    folds = make_folds(y, None, seed=3)
    assert len(folds) == FOLDS
    assert sorted(np.concatenate([fold.held_out for fold in folds]).tolist()) == list(range(len(y)))
    for fold in folds:
        assert np.bincount(y[fold.held_out]).tolist() == [5] * 4
        assert [np.bincount(y[own]).tolist() for own in fold.train] == [[20] * 4, [10] * 4, [5] * 4]
        for larger, smaller in zip(fold.train, fold.train[1:], strict=False):
            assert set(smaller) < set(larger)
        assert set(fold.held_out).isdisjoint(fold.train[0])


def test_groups_are_never_on_both_sides() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(3), 40)
    groups = np.array([f"{label}-{rng.integers(12)}" for label in y])
    for fold in make_folds(y, groups, seed=0):
        for learned in fold.train:
            assert set(groups[learned]).isdisjoint(groups[fold.held_out])
        assert set(groups[fold.train[1]]).isdisjoint(groups[np.setdiff1d(fold.train[0], fold.train[1])]), "whole groups"


def test_an_image_alone_in_its_class_is_learned_and_never_judged() -> None:
    _, y = blobs(classes=2)
    y = np.append(y, 2)
    folds = make_folds(y, None, seed=0)
    assert all(50 in fold.train[0] and 50 not in fold.held_out for fold in folds)
    with pytest.raises(FgvcError, match="needs two images"):
        make_folds(np.arange(6), None, seed=0)


def test_images_of_one_class_alone_are_refused() -> None:
    x, y = blobs(classes=1)
    with pytest.raises(FgvcError, match="images of two classes to learn from"):
        learning_curve(x, y, make_folds(y, None, seed=0))


def test_equals_a_loop_by_hand() -> None:
    x, y = blobs()
    folds = make_folds(y, None, seed=0)
    curve = learning_curve(x, y, folds, strength=0.1)
    for at in range(len(SHARES)):
        right = np.zeros(len(y), bool)
        for fold in folds:
            own = fold.train[at]
            probe = fit_probe(x[own], y[own], classes=4, strengths=(0.1,))
            right[fold.held_out] = (x[fold.held_out] @ probe.weight.T + probe.bias).argmax(1) == y[fold.held_out]
        assert np.array_equal(curve.right[at], right)
    share = curve.accuracy()
    count = int(curve.right[0].sum())
    interval = binomtest(count, len(y)).proportion_ci(method="wilson")
    assert (share.value, share.low, share.high) == pytest.approx((count / len(y), interval.low, interval.high), abs=1e-6)
    assert curve.accuracy(0.25).value == curve.right[2].mean()


def test_the_penalty_is_chosen_within_what_the_first_fold_learns() -> None:
    x, y = blobs()
    folds = make_folds(y, None, seed=0)
    chosen = learning_curve(x, y, folds).strength
    own = folds[0].train[0]
    assert chosen == fit_probe(x[own], y[own], classes=4).strength
    spoiled = x.copy()
    spoiled[folds[0].held_out] = 1e4
    assert learning_curve(spoiled, y, folds[:1]).strength == chosen, "the judged had no say"


def test_noise_teaches_nothing() -> None:
    _, y = blobs(classes=2, images=200)
    x = np.random.default_rng(5).normal(size=(400, 8)).astype(np.float32)
    curve = learning_curve(x, y, make_folds(y, None, seed=0))
    assert curve.accuracy().low < 0.5 < curve.accuracy().high
    assert not curve.gain(share=0.5).low > 0


def test_more_images_gain_where_they_do() -> None:
    rng = np.random.default_rng(1)
    y = np.repeat(np.arange(20), 30)
    x = (rng.normal(size=(20, 60))[y] * 0.5 + rng.normal(size=(600, 60))).astype(np.float32)
    curve = learning_curve(x, y, make_folds(y, None, seed=0))
    gain = curve.gain(share=0.5)
    assert gain.value == pytest.approx(curve.accuracy().value - curve.accuracy(0.5).value)
    wins = int((curve.right[0] & ~curve.right[1]).sum())
    losses = int((curve.right[1] & ~curve.right[0]).sum())
    assert (gain.low, gain.high) == gain_interval(wins, losses, 600)
    assert gain.low > 0


def test_two_nets_are_compared_image_by_image() -> None:
    right = np.zeros((3, 10), bool)
    a, b = right.copy(), right.copy()
    a[0, :6], b[0, 2:10] = True, True
    judged = np.ones(10, bool)
    gain = Curve(b, judged, 0.1, None).gain(Curve(a, judged, 0.1, None))
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.2, *gain_interval(4, 2, 10)))


def test_images_of_a_group_count_as_one_where_they_agree() -> None:
    groups = np.repeat(np.arange(30), 4)
    right = np.repeat(np.random.default_rng(0).random(30) < 0.6, 4)
    assert weight_of(right - right.mean(), groups) == pytest.approx(1 / 4)
    together = Curve(np.stack([right] * 3), np.ones(120, bool), 0.1, groups).accuracy()
    interval = binomtest(int(right.sum()) // 4, 30).proportion_ci(method="wilson")
    assert (together.low, together.high) == pytest.approx((interval.low, interval.high), abs=1e-6)
    assert weight_of(right - right.mean(), None) == 1
    assert weight_of(np.zeros(120), groups) == pytest.approx(1 / 4), "all alike: nothing tells by how much"
