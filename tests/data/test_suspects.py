"""Wrong labels: planted in drawn features, and held against scikit-learn's own folds."""

from __future__ import annotations

import numpy as np
import pytest

from fgvc.data.suspects import suspects
from fgvc.types import FgvcError


def clusters(images: int = 200, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    centres = rng.normal(0, 3, (classes, 16))
    return (centres[labels] + rng.normal(0, 1, (images, 16))).astype(np.float32), labels.astype(np.int32)


def test_swapped_labels_come_first_with_their_true_class() -> None:
    x, true = clusters()
    given = true.copy()
    wrong = np.random.default_rng(1).choice(len(x), 12, replace=False)
    given[wrong] = (given[wrong] + 1) % 4
    rows = np.arange(len(x)) + 1000
    found = suspects(x, given, rows=rows, families=np.arange(len(x))).listed
    assert {one.row - 1000 for one in found[:12]} == set(wrong.tolist())
    assert all(one.suggested == true[one.row - 1000] and one.label == given[one.row - 1000] for one in found[:12])
    assert all(one.own < 0.5 < one.other for one in found[:12])
    assert [one.own for one in found] == sorted(one.own for one in found)
    assert found == suspects(x, given, rows=rows, families=np.arange(len(x))).listed


def test_a_copy_does_not_vouch_for_its_label() -> None:
    """Pairs of equal images, both with the same wrong label: found only where they are held out together."""
    x, true = clusters(120)
    x, given = np.concatenate([x, x]), np.concatenate([true, true])
    wrong = np.arange(0, 120, 10)
    given[wrong] = given[wrong + 120] = (given[wrong] + 1) % 4
    x = np.concatenate(
        [x, 40 * np.eye(240, dtype=np.float32)[np.arange(240) % 120]], axis=1
    )  # each pair is easily told apart
    together = suspects(x, given, rows=np.arange(240), families=np.arange(240) % 120).listed
    assert {one.row % 120 for one in together[:24]} == set(wrong.tolist())


def test_a_class_without_images_and_one_with_a_single_image() -> None:
    x, labels = clusters(120, 3)
    labels = labels * 2  # 0, 2, 4 of five classes
    labels[7] = 3
    found = suspects(x, labels, rows=np.arange(120), families=np.arange(120)).listed
    assert all({one.label, one.suggested} <= {0, 2, 3, 4} for one in found)


def test_too_few_images_are_refused() -> None:
    x, labels = clusters(4, 2)
    with pytest.raises(FgvcError, match="too few"):
        suspects(x, labels, rows=np.arange(4), families=np.arange(4))
