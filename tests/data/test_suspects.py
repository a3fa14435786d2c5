"""Wrong labels: planted in drawn features, and held against scikit-learn's own folds."""

from __future__ import annotations

import numpy as np
import pytest

from fgvc.data.quality.suspects import suspects
from fgvc.errors import FgvcError


def clusters(images: int = 200, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    centres = rng.normal(0, 3, (classes, 16))
    return (centres[labels] + rng.normal(0, 1, (images, 16))).astype(np.float32), labels.astype(np.int32)


def test_swapped_labels_come_first_with_their_true_class() -> None:
    x, true = clusters()
    labels = true.copy()
    wrong = np.random.default_rng(1).choice(len(x), 12, replace=False)
    labels[wrong] = (labels[wrong] + 1) % 4
    rows = np.arange(len(x)) + 1000
    listed = suspects(x, labels, rows=rows, families=np.arange(len(x))).listed
    assert {one.row - 1000 for one in listed[:12]} == set(wrong.tolist())
    assert all(one.suggested == true[one.row - 1000] and one.label == labels[one.row - 1000] for one in listed[:12])
    assert all(one.p_label < 0.5 < one.p_suggested for one in listed[:12])
    assert [one.p_label for one in listed] == sorted(one.p_label for one in listed)
    assert listed == suspects(x, labels, rows=rows, families=np.arange(len(x))).listed


def test_a_copy_does_not_vouch_for_its_label() -> None:
    """Pairs of equal images, both with the same wrong label: found only where they are held out together."""
    x, true = clusters(120)
    x, labels = np.concatenate([x, x]), np.concatenate([true, true])
    wrong = np.arange(0, 120, 10)
    labels[wrong] = labels[wrong + 120] = (labels[wrong] + 1) % 4
    x = np.concatenate(
        [x, 40 * np.eye(240, dtype=np.float32)[np.arange(240) % 120]], axis=1
    )  # each pair is easily told apart
    together = suspects(x, labels, rows=np.arange(240), families=np.arange(240) % 120).listed
    assert {one.row % 120 for one in together[:24]} == set(wrong.tolist())


def test_a_class_without_images_and_one_with_a_single_image() -> None:
    x, labels = clusters(120, 3)
    labels = labels * 2  # 0, 2, 4 of five classes
    labels[7] = 3
    labels[[11, 14]] = 0
    result = suspects(x, labels, rows=np.arange(120), families=np.arange(120))
    assert result.listed
    assert all({one.label, one.suggested} <= {0, 2, 4} for one in result.listed)
    assert result.unjudged == 1, "nothing is left of its class when it is held out"
    assert {one.row for one in result.listed} >= {11, 14}


def test_a_class_that_is_one_family_is_not_judged() -> None:
    x, labels = clusters(90, 3)
    families = np.where(labels == 2, 1000, np.arange(90))
    result = suspects(x, labels, rows=np.arange(90), families=families)
    assert result.unjudged == 30
    assert all(one.label != 2 for one in result.listed)


@pytest.mark.parametrize("counts", [(4, 4, 4, 4), (20, 1, 1), (5, 2), (30, 6), (3,) * 40])
def test_small_and_uneven_sets_are_judged_as_far_as_they_go(counts: tuple[int, ...]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    x = np.random.default_rng(0).normal(0, 1, (len(labels), 8)).astype(np.float32) + 4 * labels[:, None]
    several = sum(count for count in counts if count > 1)
    if sum(count > 1 for count in counts) < 2:
        with pytest.raises(FgvcError, match="too few to hold some of them out"):
            suspects(x, labels, rows=np.arange(len(labels)), families=np.arange(len(labels)))
        return
    result = suspects(x, labels, rows=np.arange(len(labels)), families=np.arange(len(labels)))
    assert result.unjudged == len(labels) - several


def test_features_that_are_no_numbers_are_refused() -> None:
    x, labels = clusters(40)
    x[3, 2] = np.nan
    with pytest.raises(FgvcError, match="no numbers"):
        suspects(x, labels, rows=np.arange(40), families=np.arange(40))


def test_too_few_images_are_refused() -> None:
    x, labels = clusters(2, 2)
    with pytest.raises(FgvcError, match="too few"):
        suspects(x, labels, rows=np.arange(2), families=np.arange(2))
