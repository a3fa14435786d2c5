"""Type of the soft labels that losses and techniques take."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Target = Sequence[tuple[Tensor, Tensor | None]]
"""A soft label as a list of (labels (B,) int64, weights (B,) float32); the loss is sum_j weight_j * CE(label_j).
None stands for weights of one. Weights need not sum to one (SnapMix)."""
