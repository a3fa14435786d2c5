"""Scores of a net on one split of the data, summed by torchmetrics over any number of processes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from fgvc.config.images import Ending
from fgvc.errors import FgvcError, NoNumbersError
from fgvc.evaluation.calibration import BINS, bin_sums, reliability_of_sums
from fgvc.io.display import Display

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

SMALLER_IS_BETTER = ("loss", "ece")


@dataclass(frozen=True, slots=True, repr=False)
class Scores(Display):
    """Scores of a classifier on `images` readable images; shares in [0,1]."""

    images: int
    top1: float
    top5: float  # with fewer than five classes: as many as there are
    macro_f1: float
    balanced_accuracy: float  # mean recall of the classes that occur
    ece: float  # expected calibration error: mean |confidence - accuracy| over BINS equal bins, weighted by images
    loss: float  # mean cross-entropy against the hard label, no smoothing
    confusion: np.ndarray  # (K,K) counts: row = true class, column = predicted

    def numbers(self) -> dict[str, float]:
        """Numbers for JSON and tables."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "confusion"}

    def by_class(self, classes: Sequence[str]) -> list[dict[str, str | float]]:
        """Table of one row a class: images, recall, precision, F1 (empty without any image), and the class that it is taken for
        most often."""
        right, true, predicted = self.confusion.diagonal(), self.confusion.sum(1), self.confusion.sum(0)
        wrong = self.confusion - np.diag(right)
        rows: list[dict[str, str | float]] = []
        for at, name in enumerate(classes):
            worst = int(wrong[at].argmax())
            rows.append(
                {
                    "class": name,
                    "images": int(true[at]),
                    "recall": _share(right[at], true[at]),
                    "precision": _share(right[at], predicted[at]),
                    "f1": _share(2 * right[at], true[at] + predicted[at]),
                    "taken_for": classes[worst] if wrong[at, worst] else "",
                    "times": int(wrong[at, worst]),
                }
            )
        return rows

    def confused(self, classes: Sequence[str]) -> list[dict[str, str | float]]:
        """Table of pairs of classes by how often one is taken for the other, either way; most often first."""
        both = np.triu(self.confusion + self.confusion.T, 1)
        pairs = [(int(i), int(j)) for i, j in np.argwhere(both)]
        return [
            {
                "class": classes[i],
                "other": classes[j],
                "times": int(both[i, j]),
                "class_as_other": int(self.confusion[i, j]),
                "other_as_class": int(self.confusion[j, i]),
            }
            for i, j in sorted(pairs, key=lambda pair: -both[pair])
        ]

    @property
    def facts(self) -> Mapping[str, object]:
        return {"top-1": f"{100 * self.top1:.2f} %", "on": f"{self.images} images"}


def score_logits(logits: np.ndarray, labels: np.ndarray) -> Scores:
    """Score logits (N,K) with labels (N,). Raises as `evaluate` does."""
    z, y = torch.from_numpy(logits), torch.from_numpy(labels)
    batches = [(z, y)] if len(y) else []
    return evaluate(lambda x: x, batches, classes=z.shape[1], device=torch.device("cpu"))


def _share(part: int, whole: int) -> str | float:
    return round(float(part / whole), 6) if whole else ""


def evaluate(
    net: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    classes: int,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
    ending: Ending | None = None,
) -> Scores:
    """Score a net in eval mode, in fp32, on batches of (x (B,3,H,W) float32, y (B,) int64). `ending`: of the net's file, by which
    the confidence is that of softmax or sigmoid.

    In a process group every process brings its share and all get the same result. Raises FgvcError without any image, and
    NoNumbersError where the net's logits for one are not finite.
    """
    # Imported here because it takes longer to import than torch, and most verbs evaluate nothing.
    from torchmetrics.aggregation import MeanMetric

    metrics = _metrics(classes).to(device)
    loss = MeanMetric().to(device)
    bins = np.zeros((3, BINS))  # torchmetrics would keep every image
    nonfinite = torch.zeros((), dtype=torch.int64, device=device)  # images whose logits are not finite
    with torch.inference_mode():
        for x, y in batches:
            labels = y.to(device)
            z = net(x.to(device, memory_format=memory_format)).float()
            nonfinite += (~z.isfinite().all(1)).sum()
            z = z.nan_to_num()  # these scores are not used
            metrics.update(z, labels)
            confidence, predicted = (z.sigmoid() if ending == "sigmoid" else z.softmax(1)).max(1)
            bins += bin_sums(confidence.cpu().double().numpy(), (predicted == labels).cpu().numpy())
            loss.update(nn.functional.cross_entropy(z, labels), weight=len(y))
    with warnings.catch_warnings():  # a process may have no share of a small split; its zeros are right
        warnings.filterwarnings("ignore", message=".*was called before the ``update`` method")
        values, mean_loss = metrics.compute(), float(loss.compute())
    confusion = values["confusion"].cpu().numpy()
    if not confusion.sum():
        raise FgvcError("nothing to evaluate: no readable image in this split of the data")
    if dist.is_available() and dist.is_initialized():
        shared = torch.from_numpy(bins).to(device)
        dist.all_reduce(shared)
        dist.all_reduce(nonfinite)
        bins = shared.cpu().numpy()
    if nonfinite:
        raise NoNumbersError(
            f"the net gives logits that are no numbers (NaN or infinite) for {int(nonfinite)} of {int(confusion.sum())} images"
        )
    if not math.isfinite(mean_loss):
        raise NoNumbersError("the net gives logits so large that their mean loss is no number")
    return _scores(values, confusion, bins, mean_loss)


def _metrics(classes: int) -> MetricCollection:
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

    return MetricCollection(
        {
            "top1": MulticlassAccuracy(classes, average="micro"),
            "top5": MulticlassAccuracy(classes, average="micro", top_k=min(5, classes)),
            "macro_f1": MulticlassF1Score(classes, average="macro"),
            "confusion": MulticlassConfusionMatrix(classes),
        },
        compute_groups=False,
    )


def _scores(values: Mapping[str, Tensor], confusion: NDArray[np.int64], bins: NDArray[np.float64], mean_loss: float) -> Scores:
    occurs = confusion.sum(1) > 0
    recall = confusion.diagonal()[occurs] / confusion.sum(1)[occurs]
    return Scores(
        images=int(confusion.sum()),
        balanced_accuracy=float(recall.mean()),
        ece=reliability_of_sums(bins).ece,
        loss=mean_loss,
        confusion=confusion,
        **{name: float(values[name]) for name in ("top1", "top5", "macro_f1")},
    )
