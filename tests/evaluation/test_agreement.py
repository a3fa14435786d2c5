"""Agreement against figures worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fgvc.errors import FgvcError
from fgvc.evaluation.agreement import INT8, AgreementLimits, measure_agreement


def test_figures_worked_by_hand() -> None:
    z = np.array([[3, 1, 0], [0, 2, 1.5], [1, 0, 5], [0, 4, 1]], np.float32)
    z_variant = np.array([[2.5, 1, 0], [0, 1, 1.5], [1, 0, 5], [5, 4, 1]], np.float32)
    agreement = measure_agreement(np.array([5, 6, 8, 9]), np.array([0, 2, 2, 1]), z, z_variant, split="val")
    assert (agreement.images, agreement.share, agreement.top1_float, agreement.top1) == (4, 0.5, 0.75, 0.75)
    assert agreement.loss == 0
    assert agreement.worst == 5
    assert agreement.typical == pytest.approx(np.sqrt((0.25 + 1 + 25) / 12))
    # Wilson 1927, at 1.96: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    assert (agreement.low, agreement.high) == pytest.approx((0.150036, 0.849964), abs=1e-5)
    assert [(one.row, one.label, one.by_float, one.by_variant) for one in agreement.differing] == [
        (9, 1, 1, 0),
        (6, 2, 1, 2),
    ]
    assert [one.margin for one in agreement.differing] == [4, 0.5]


def test_limits_of_agreement_and_loss() -> None:
    labels = np.zeros(100, np.int64)
    z = np.tile(np.array([[1, 0]], np.float32), (100, 1))
    z_variant = z.copy()
    z_variant[:2] = [0, 1]
    agreement = measure_agreement(np.arange(100), labels, z, z_variant, split="train")
    assert agreement.share == 0.98
    (line,) = agreement.failures(INT8)
    assert "top-1 falls from 100.00 to 98.00 %" in line
    (line,) = agreement.failures(AgreementLimits(agreement=0.99, loss=0.02))
    assert "98.00 % of 100 train images (95 % interval 93.0 to 99.4)" in line
    assert measure_agreement(np.arange(100), labels, z, z, split="val").failures(INT8) == []
    with pytest.raises(FgvcError, match="no val images"):
        measure_agreement(np.arange(0), labels[:0], z[:0], z[:0], split="val")
