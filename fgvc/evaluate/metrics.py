"""How good a net is on a part of the data: torchmetrics sums, right over any number of processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fgvc.types import FgvcError


@dataclass(frozen=True, slots=True)
class Scores:
    """Shares in [0,1] over `images` readable images."""

    images: int
    top1: float
    top5: float  # with fewer than five classes: as many as there are
    macro_f1: float
    loss: float  # mean cross-entropy against the hard label, no smoothing
    confusion: np.ndarray  # (K,K) counts: row = true class, column = predicted

    def numbers(self) -> dict[str, float]:
        """For JSON and tables."""
        return {
            "images": self.images,
            "top1": self.top1,
            "top5": self.top5,
            "macro_f1": self.macro_f1,
            "loss": self.loss,
        }


def evaluate(
    net: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    classes: int,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Scores:
    """Score a net in eval mode, in fp32, on batches of (x (B,3,H,W) float32, y (B,) int64).

    In a process group every process brings its share and all get the same result. Raises FgvcError without any image.
    """
    # Imported here because it takes longer to import than torch, and most verbs evaluate nothing.
    from torchmetrics import MetricCollection
    from torchmetrics.aggregation import MeanMetric
    from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

    metrics = MetricCollection(
        {
            "top1": MulticlassAccuracy(classes, average="micro"),
            "top5": MulticlassAccuracy(classes, average="micro", top_k=min(5, classes)),
            "macro_f1": MulticlassF1Score(classes, average="macro"),
            "confusion": MulticlassConfusionMatrix(classes),
        },
        compute_groups=False,
    ).to(device)
    loss = MeanMetric().to(device)
    with torch.inference_mode():
        for x, y in batches:
            labels = y.to(device)
            z = net(x.to(device, memory_format=memory_format)).float()
            metrics.update(z, labels)
            loss.update(nn.functional.cross_entropy(z, labels), weight=len(y))
    with warnings.catch_warnings():  # a process may have no share of a small part; its zeros are right
        warnings.filterwarnings("ignore", message=".*was called before the ``update`` method")
        values, mean_loss = metrics.compute(), float(loss.compute())
    confusion = values["confusion"].cpu().numpy()
    if not confusion.sum():
        raise FgvcError("nothing to evaluate: no readable image in this part of the data")
    shares = {name: float(values[name]) for name in ("top1", "top5", "macro_f1")}
    return Scores(images=int(confusion.sum()), loss=mean_loss, confusion=confusion, **shares)
