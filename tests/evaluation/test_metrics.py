"""Scores against their definitions, written with loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fgvc.errors import FgvcError
from fgvc.evaluation.calibration import confidence_of, reliability
from fgvc.evaluation.metrics import BINS, Scores, evaluate, score_logits
from fgvc.evaluation.png_plots import plot_confusion

CPU = torch.device("cpu")
NAMES = ["a", "b", "c", "d", "e", "f", "g"]


def scored(count: int = 300, classes: int = 7, absent: int | None = None) -> tuple[Scores, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(count, classes, generator=rng)
    y = torch.randint(0, classes, (count,), generator=rng)
    z[torch.arange(count), y] += 1.5
    if absent is not None:
        keep = y != absent
        z, y = z[keep], y[keep]
    parts = [(z[at : at + 64], y[at : at + 64]) for at in range(0, len(y), 64)]
    return evaluate(lambda x: x, parts, classes=classes, device=CPU), z, y


@pytest.mark.parametrize("absent", [None, 3])
def test_every_score_is_its_definition(absent: int | None) -> None:
    scores, z, y = scored(absent=absent)
    answers, top5 = z.argmax(1), z.topk(5).indices
    assert scores.images == len(y)
    assert scores.top1 == pytest.approx((answers == y).float().mean().item())
    assert scores.top5 == pytest.approx((top5 == y[:, None]).any(1).float().mean().item())
    recalls = [(answers[y == k] == k).float().mean().item() for k in range(7) if (y == k).any()]
    assert scores.balanced_accuracy == pytest.approx(np.mean(recalls))
    assert scores.loss == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-5)
    confidence, right = z.softmax(1).max(1).values.double(), (answers == y).double()
    error = 0.0
    for k in range(BINS):
        inside = (confidence > k / BINS) & (confidence <= (k + 1) / BINS)
        if inside.any():
            error += inside.double().mean() * (confidence[inside].mean() - right[inside].mean()).abs()
    assert scores.ece == pytest.approx(float(error), abs=1e-6)


def test_answers_that_are_there_already_score_the_same_and_their_bins_are_those_of_the_calibration_error() -> None:
    scores, z, y = scored()
    again = score_logits(z.numpy(), y.numpy())
    assert again.numbers() == pytest.approx(scores.numbers(), rel=1e-6)
    assert (again.confusion == scores.confusion).all()
    bins = reliability(confidence_of(z.double().numpy(), 1.0), (z.argmax(1) == y).numpy())
    assert bins.ece == pytest.approx(scores.ece, abs=1e-6)
    with pytest.raises(FgvcError, match="no readable image"):
        score_logits(z[:0].numpy(), y[:0].numpy())


def test_rows_of_classes_and_confused_pairs_by_hand() -> None:
    confusion = np.array([[5, 3, 0], [1, 4, 0], [0, 0, 0]])
    scores = Scores(13, 9 / 13, 1, 0.5, 0.7, 0.1, 1.0, confusion)
    first, second, third = scores.by_class(["a", "b", "c"])
    assert first == {
        "class": "a", "images": 8, "recall": 0.625, "precision": round(5 / 6, 6), "f1": round(10 / 14, 6),
        "taken_for": "b", "times": 3,
    }  # fmt: skip
    assert (second["recall"], second["taken_for"]) == (0.8, "a")
    assert third == {
        "class": "c", "images": 0, "recall": "", "precision": "", "f1": "", "taken_for": "", "times": 0
    }  # fmt: skip
    assert scores.confused(["a", "b", "c"]) == [
        {"class": "a", "other": "b", "times": 4, "class_as_other": 3, "other_as_class": 1}
    ]


def test_the_most_confused_come_first_and_all_mistakes_are_there() -> None:
    scores, z, y = scored()
    pairs = scores.confused(NAMES)
    times = [pair["times"] for pair in pairs]
    assert times == sorted(times, reverse=True)
    assert sum(times) == int((z.argmax(1) != y).sum())


def test_nothing_to_score_is_an_error_with_a_name() -> None:
    with pytest.raises(FgvcError, match="no readable image"):
        evaluate(lambda x: x, [], classes=3, device=CPU)


def test_a_confusion_matrix_of_classes_in_chinese_warns_of_nothing() -> None:
    assert len(plot_confusion(np.eye(3, dtype=int), ["麻雀", "Spatz", "воробей"], title="validation")) > 1000
