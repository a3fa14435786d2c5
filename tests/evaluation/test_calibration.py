"""Calibration against its definitions: other libraries, known temperatures, tables worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from fgvc.config.calibration import HIGHEST, LOWEST
from fgvc.evaluation.calibration import (
    BINS,
    FEWEST,
    MAX_IMAGES,
    calibrate,
    confidence_of,
    fit_temperature,
    fitting_sample,
    rejection_threshold,
    reliability,
    risk_coverage,
)
from fgvc.evaluation.png_plots import plot_calibration


def honest(count: int, *, classes: int = 6, scale: float = 1.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax are the true probabilities of the labels."""
    rng = np.random.default_rng(seed)
    z = scale * rng.normal(size=(count, classes))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return z, (rng.random((count, 1)) > p.cumsum(1)).sum(1).clip(max=classes - 1)


@pytest.mark.parametrize("true", [0.3, 1.0, 2.5])
def test_the_temperature_of_overconfident_logits_is_found_again(true: float) -> None:
    z, y = honest(20_000)
    calibrated = calibrate((true * z).astype(np.float32), y)
    assert calibrated.temperature == pytest.approx(true, rel=0.03)
    assert calibrated.note == "" or true == 1.0  # where there is nothing to mend, the fit is a little worse than none
    assert calibrated.after.ece < 0.01
    if true != 1:
        assert calibrated.before.ece > 0.1
        assert calibrated.nll_after < calibrated.nll
    assert calibrated.threshold == pytest.approx(calibrate(z, y).threshold, abs=1e-3)  # the scale of the logits is gone


def test_the_loss_is_torchs_and_least_at_the_temperature() -> None:
    z, y = honest(400)
    z *= 3
    calibrated = calibrate(z, y)
    one, labels = torch.tensor(z), torch.tensor(y)
    assert calibrated.nll == pytest.approx(F.cross_entropy(one, labels).item(), rel=1e-12)
    at = [F.cross_entropy(one / t, labels).item() for t in calibrated.temperature * np.array([0.99, 1, 1.01])]
    assert at[1] < min(at[0], at[2])
    log_t = torch.tensor(math.log(calibrated.temperature), dtype=torch.float64, requires_grad=True)
    F.cross_entropy(one / log_t.exp(), labels).backward()
    assert abs(log_t.grad.item()) < 1e-5


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 200), scale=st.floats(0.1, 20))
def test_the_calibration_error_is_torchmetrics(seed: int, count: int, scale: float) -> None:
    z, y = honest(count, scale=scale, seed=seed)
    p = torch.tensor(z, dtype=torch.float64).softmax(1)
    expected = multiclass_calibration_error(p, torch.tensor(y), num_classes=6, n_bins=BINS, norm="l1").item()
    bins = reliability(confidence_of(z, 1.0), z.argmax(1) == y)
    assert bins.ece == pytest.approx(expected, abs=1e-5)
    assert bins.images.sum() == count


def test_bins_by_hand() -> None:
    bins = reliability(np.array([1 / BINS, 1 / BINS + 1e-9, 1.0, 0.99]), np.array([True, False, True, False]))
    assert bins.images.tolist() == [1, 1, *[0] * (BINS - 3), 2]  # (k/BINS, (k+1)/BINS]
    assert bins.accuracy[[0, 1, -1]].tolist() == [1, 0, 0.5]
    assert np.isnan(bins.accuracy[2:-1]).all()
    assert bins.ece == pytest.approx((1 - 1 / BINS + 1 / BINS + 2 * 0.495) / 4)


def test_risk_and_coverage_by_hand() -> None:
    curve = risk_coverage(np.array([0.6, 0.9, 0.7, 0.8]), np.array([False, True, False, True]))
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert curve.confidence.tolist() == [0.9, 0.8, 0.7, 0.6]
    assert curve.risk.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 2])
    assert curve.area == pytest.approx((0 + 0 + 1 / 3 + 1 / 2) / 4)
    assert curve.rows(2) == [
        {"coverage": 0.5, "risk": 0.0, "confidence": 0.8},
        {"coverage": 1.0, "risk": 0.5, "confidence": 0.6},
    ]
    for right in ([True, False, False, True], [False, True, True, False]):  # no ranking: the error rate at any coverage
        assert risk_coverage(np.full(4, 0.5), np.array(right)).risk.tolist() == [0.5] * 4


@pytest.mark.parametrize(
    ("count", "keep", "place"), [(19, 0.95, 1), (18, 0.95, None), (39, 0.95, 2), (38, 0.95, 1), (9, 0.8, 2), (50, 1, None)]
)  # fmt: skip
def test_the_threshold_by_hand(count: int, keep: float, place: int | None) -> None:
    confidences = np.random.default_rng(0).permutation(np.arange(1, count + 1) / 100)
    expected = 0.0 if place is None else place / 100
    assert rejection_threshold(confidences, keep=keep) == expected


@pytest.mark.parametrize("count", [0, 1, 18, 50])
def test_keeping_next_to_nothing_rejects_all_but_the_surest(count: int) -> None:
    confidences = np.random.default_rng(0).random(count)
    assert rejection_threshold(confidences, keep=1e-12) == (confidences.max() if count else 0)


def test_a_fit_that_does_not_help_says_so() -> None:
    z, y = honest(60, seed=3)  # few images, and nothing to mend
    calibrated = calibrate(z, y)
    assert calibrated.nll_after > calibrated.nll
    assert calibrated.note == (
        f"no gain: on images that it was not fitted on the loss is {calibrated.nll_after:.4f}, "
        f"without it {calibrated.nll:.4f}"
    )
    assert calibrated.stored("val").note == calibrated.note
    z, y = honest(500)
    assert calibrate(2 * z, y).stored("val").note == ""


def test_the_threshold_keeps_its_promise_on_new_images() -> None:
    rng = np.random.default_rng(0)
    for count in (19, 60, 200):
        accepted = [(rng.random() >= rejection_threshold(rng.random(count), keep=0.95)) for _ in range(4000)]
        assert np.mean(accepted) > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 4000)


def test_cross_fitted_figures_are_near_what_new_images_give() -> None:
    z, y = honest(6000, scale=2.0)
    calibrated, new = calibrate(2 * z[:3000], y[:3000]), slice(3000, None)
    confidence = confidence_of(2 * z[new], calibrated.temperature)
    right, answered = z[new].argmax(1) == y[new], confidence >= calibrated.threshold
    assert calibrated.after.ece == pytest.approx(reliability(confidence, right).ece, abs=0.02)
    assert calibrated.kept == pytest.approx(answered[right].mean(), abs=0.02)
    assert calibrated.coverage == pytest.approx(answered.mean(), abs=0.02)
    assert calibrated.accuracy == pytest.approx(right[answered].mean(), abs=0.02)
    assert calibrated.kept == pytest.approx(0.95, abs=0.02)


def test_what_can_not_be_fitted_is_said_and_left_alone() -> None:
    z, y = honest(FEWEST - 1)
    few = calibrate(z, y)
    assert (few.temperature, few.threshold, few.kept, few.coverage) == (1, 0, 1, 1)
    assert f"fewer than {FEWEST}" in few.note
    np.testing.assert_array_equal(few.before.images, few.after.images)
    z, _ = honest(200)
    sure = calibrate(z, z.argmax(1))
    assert sure.temperature == 1
    assert "all 200 answers are right" in sure.note
    assert sure.accuracy == 1
    wrong = calibrate(9 * z, (z.argmax(1) + 1) % 6)
    assert wrong.temperature == HIGHEST
    assert "at the bound" in wrong.note
    assert not wrong.calibrated
    assert "not calibrated: at the bound" in wrong.source
    assert (wrong.threshold, wrong.kept, wrong.accuracy) == (0, 1, 0)
    z, y = honest(2000)
    assert fit_temperature(z / 100, y)[0] == LOWEST


def test_keeping_all_rejects_nothing() -> None:
    z, y = honest(300)
    calibrated = calibrate(z, y, keep=1)
    assert (calibrated.threshold, calibrated.coverage) == (0, 1)


@pytest.mark.parametrize("keep", [0.0, 1.5])
def test_senseless_demands_are_refused(keep: float) -> None:
    z, y = honest(60)
    with pytest.raises(ValueError, match="keep"):
        calibrate(z, y, keep=keep)
    with pytest.raises(ValueError, match="finite"):
        calibrate(np.full_like(z, np.nan), y)


def test_what_a_bundle_stores() -> None:
    z, y = honest(500)
    calibrated = calibrate(2 * z, y)
    stored = calibrated.stored("val")
    assert stored.temperature == pytest.approx(calibrated.temperature, abs=1e-6)
    assert 0 <= calibrated.threshold - stored.threshold < 1e-6
    assert (stored.fitted_on, stored.images) == ("val", 500)
    assert stored.ece_before == pytest.approx(calibrated.before.ece, abs=1e-6)


def test_a_sample_is_spread_and_bounded() -> None:
    rows = np.arange(100, 40_100)
    assert len(fitting_sample(rows, 10)) == MAX_IMAGES
    assert len(fitting_sample(rows, 20_000)) == 1000
    assert fitting_sample(rows, 10)[[0, -1]].tolist() == [100, 40_099]
    np.testing.assert_array_equal(fitting_sample(rows[:77], 10), rows[:77])


def test_tables_and_plots() -> None:
    z, y = honest(200)
    calibrated = calibrate(2 * z, y)
    rows = calibrated.rows()
    assert sum(row["before_images"] for row in rows) == sum(row["after_images"] for row in rows) == 200
    assert rows[0]["before_accuracy"] == ""
    pictures = plot_calibration(calibrated, split="val")
    assert pictures.keys() == {"reliability-val.png", "risk-coverage-val.png"}
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())
