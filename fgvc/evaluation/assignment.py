"""Assignment of a network's outputs to classes, by its answers about labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.special import log_expit, log_softmax

from fgvc.config.images import Ending
from fgvc.errors import FgvcError
from fgvc.evaluation.paired import mean_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Assignment of the network's outputs to classes: as stated, and as its answers show."""

    stated: tuple[str, ...]  # a name an output, as they are stated or follow from the folder; () where none are
    assigned: tuple[str | None, ...]  # (K,) the class of each output; None: of no class among the images
    other: tuple[str, ...]  # classes whose output is another than stated, alike in both halves of their images
    low: float = 0.0  # interval of the mean loss of their images as stated less as assigned, nats
    high: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether the stated order is that of the outputs."""
        return bool(self.stated) and not self.other

    @property
    def decided(self) -> bool:
        """Whether the images decide: the stated order holds, none is stated, or the other one is likelier for certain."""
        return self.holds or not self.stated or self.low > 0


def log_probabilities(logits: NDArray[np.floating], ending: Ending | None) -> NDArray[np.float64]:
    """Log-probabilities (N,K) of each class among all classes, so that each row's probabilities add up to 1, from logits (N,K).

    `ending`: of the network's file. With a sigmoid each class has a probability p_k of its own, and p_k / sum_j p_j counts here;
    the binary cross-entropy, by which `fgvc.evaluation.calibration` fits a temperature to such a file, is another measure.
    """
    z = logits.astype(np.float64)
    return np.asarray(log_softmax(log_expit(z) if ending == "sigmoid" else z, axis=1))


def halved(labels: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Masks (N,) of two halves, with every second image of each class in each."""
    first = np.zeros(len(labels), dtype=bool)
    for k in np.unique(labels):
        first[np.flatnonzero(labels == k)[::2]] = True
    return first, ~first


def assign(answers: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[int, int]:
    """Assign outputs to classes one to one so that the labels (N,) are likeliest; returns class -> output.

    `answers` (N,K) log-probabilities. Raises FgvcError where there are more classes than outputs.
    """
    present = np.unique(labels)
    if len(present) > answers.shape[1]:
        raise FgvcError(f"the images are of {len(present)} classes, and the network has {answers.shape[1]} outputs")
    likelihood = np.stack([answers[labels == k].sum(0) for k in present])
    rows, outputs = linear_sum_assignment(likelihood, maximize=True)
    return {int(present[row]): int(output) for row, output in zip(rows, outputs, strict=True)}


def cross_scored(
    answers: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Losses (N,) in nats, and whether the largest output is the class's, each image under the assignment that was fitted on
    the other half."""
    losses, right = np.empty(len(labels)), np.empty(len(labels), dtype=bool)
    halves = halved(labels)
    for ours, theirs in (halves, halves[::-1]):
        outputs = assign(answers[theirs], labels[theirs])
        of = np.array([outputs[int(k)] for k in labels[ours]])
        losses[ours] = -answers[np.flatnonzero(ours), of]
        right[ours] = answers[ours].argmax(1) == of
    return losses, right


def output_order(
    answers: NDArray[np.float64], labels: NDArray[np.int64], classes: Sequence[str], stated: Sequence[str]
) -> Order:
    """Compare the stated order of the outputs with the one that their answers (N,K) show. `labels` (N,) are numbers of `classes`;
    `stated`: the class of each output, or () where that is not known."""
    present = np.unique(labels)
    halves = [assign(answers[half], labels[half]) for half in halved(labels)]
    whole = assign(answers, labels)
    assigned: list[str | None] = [None] * answers.shape[1]
    for label, output in whole.items():
        assigned[output] = classes[label]
    places = {name: at for at, name in enumerate(stated)}
    other = [
        k for k in present.tolist()
        if stated and halves[0][k] == halves[1][k] == whole[k] != places.get(classes[k], -1)
    ]  # fmt: skip
    rows = np.flatnonzero(np.isin(labels, other))
    as_shown = np.array([whole[k] for k in labels[rows]], dtype=np.int64)
    as_stated = np.array([places.get(classes[k], whole[k]) for k in labels[rows]], dtype=np.int64)
    low, high = mean_interval(answers[rows, as_shown] - answers[rows, as_stated]) if len(rows) else (0.0, 0.0)
    return Order(
        stated=tuple(stated), assigned=tuple(assigned), other=tuple(classes[k] for k in other), low=low, high=high
    )
