"""Agreement of a smaller file with the float file on the same images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fgvc.errors import FgvcError
from fgvc.evaluation.paired import wilson

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreementLimits:
    """Limits that an agreement must keep; shares in [0,1]."""

    agreement: float
    loss: float  # largest loss of top-1


INT8, FP16 = AgreementLimits(agreement=0.98, loss=0.01), AgreementLimits(agreement=0.99, loss=0.005)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """An image that the two files assign to different classes."""

    row: int  # of the index
    label: int
    by_float: int
    by_variant: int
    margin: float  # between the float file's logits of these two classes


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Agreement of two files over N images; shares in [0,1]."""

    images: int
    split: str  # val, or train where there is no other
    share: float  # of the images with the same arg-max
    low: float  # 95 % interval of the share (Wilson 1927)
    high: float
    top1_float: float
    top1: float
    worst: float  # max |difference of logits|
    typical: float  # root of its mean square
    spread: float  # standard deviation of the float file's logits
    differing: tuple[Disagreement, ...]  # the surest of the float file first

    @property
    def loss(self) -> float:
        """Top-1 of the float file minus that of the smaller one, a share."""
        return self.top1_float - self.top1

    def failures(self, limits: AgreementLimits) -> list[str]:
        """Describe the limits that are not kept."""
        failures = []
        if self.share < limits.agreement:
            failures.append(
                f"answers as the float file for {100 * self.share:.2f} % of {self.images} {self.split} images (95 % interval "
                f"{100 * self.low:.1f} to {100 * self.high:.1f}), at least {100 * limits.agreement:g} % are asked for"
            )
        if self.loss > limits.loss + 1e-12:
            failures.append(
                f"top-1 falls from {100 * self.top1_float:.2f} to {100 * self.top1:.2f} %, at most {100 * limits.loss:g} "
                "points are allowed"
            )
        return failures

    def numbers(self) -> dict[str, Any]:
        """Numbers for contract.json."""
        names = ("images", "split", "share", "low", "high", "top1_float", "top1", "worst", "typical", "spread")
        return {name: getattr(self, name) for name in names}


def measure_agreement(
    rows: NDArray[np.int64], labels: NDArray[np.int64], z: Floats, z_variant: Floats, *, split: str
) -> Agreement:
    """Compare logits (N,K) of the float file and of a variant on the images `rows` (N,) with `labels` (N,).

    Raises FgvcError without any image.
    """
    count = len(rows)
    if not count:
        raise FgvcError(f"no {split} images to compare the files on")
    a, b = z.argmax(1), z_variant.argmax(1)
    same = int((a == b).sum())
    low, high = wilson(same / count, count)
    difference = z_variant.astype(np.float64) - z
    disagreements = [
        Disagreement(
            row=int(rows[n]), label=int(labels[n]), by_float=int(a[n]), by_variant=int(b[n]),
            margin=float(z[n, a[n]] - z[n, b[n]]),
        )
        for n in np.flatnonzero(a != b)
    ]  # fmt: skip
    return Agreement(
        images=count,
        split=split,
        share=same / count,
        low=float(low),
        high=float(high),
        top1_float=float((a == labels).mean()),
        top1=float((b == labels).mean()),
        worst=float(np.abs(difference).max()),
        typical=float(np.sqrt((difference**2).mean())),
        spread=float(z.astype(np.float64).std()),
        differing=tuple(sorted(disagreements, key=lambda image: (-image.margin, image.row))),
    )
