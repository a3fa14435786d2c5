"""Agreement against figures worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fgvc.errors import FgvcError
from fgvc.evaluation.agreement import INT8, AgreementLimits, measure_agreement


def test_figures_worked_by_hand() -> None:
    z = np.array([[3, 1, 0], [0, 2, 1.5], [1, 0, 5], [0, 4, 1]], np.float32)
    said = np.array([[2.5, 1, 0], [0, 1, 1.5], [1, 0, 5], [5, 4, 1]], np.float32)
    found = measure_agreement(np.array([5, 6, 8, 9]), np.array([0, 2, 2, 1]), z, said, split="val")
    assert (found.images, found.share, found.top1_float, found.top1) == (4, 0.5, 0.75, 0.75)
    assert found.loss == 0
    assert found.worst == 5
    assert found.typical == pytest.approx(np.sqrt((0.25 + 1 + 25) / 12))
    # Wilson 1927, at 1.96: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    assert (found.low, found.high) == pytest.approx((0.150036, 0.849964), abs=1e-5)
    assert [(one.row, one.label, one.by_float, one.by_variant) for one in found.differing] == [
        (9, 1, 1, 0),
        (6, 2, 1, 2),
    ]
    assert [one.margin for one in found.differing] == [4, 0.5]


def test_bars() -> None:
    labels = np.zeros(100, np.int64)
    z = np.tile(np.array([[1, 0]], np.float32), (100, 1))
    said = z.copy()
    said[:2] = [0, 1]
    found = measure_agreement(np.arange(100), labels, z, said, split="train")
    assert found.share == 0.98
    (line,) = found.failures(INT8)
    assert "top-1 falls from 100.00 to 98.00 %" in line
    (line,) = found.failures(AgreementLimits(agreement=0.99, loss=0.02))
    assert "98.00 % of 100 train images (95 % interval 93.0 to 99.4)" in line
    assert measure_agreement(np.arange(100), labels, z, z, split="val").failures(INT8) == []
    with pytest.raises(FgvcError, match="no val images"):
        measure_agreement(np.arange(0), labels[:0], z[:0], z[:0], split="val")
