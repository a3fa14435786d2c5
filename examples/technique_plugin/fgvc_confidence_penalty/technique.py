"""The confidence penalty (Pereyra et al. 2017, arXiv:1701.06548). After stripping nothing is left: it only adds a loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from fgvc.techniques.api import Output, Technique
from fgvc.techniques.plan import Context
from fgvc_confidence_penalty.settings import ConfidencePenaltySettings


class ConfidencePenalty(Technique):
    """Confidence penalty: log K - H(p), p = softmax(z): 0 where all classes are alike, log K where one is certain."""

    source: ClassVar[str] = "Pereyra et al. 2017, arXiv:1701.06548"

    def __init__(self, settings: ConfidencePenaltySettings) -> None:
        self.weights = {"penalty": settings.beta}

    @override
    def losses(self, outputs: Mapping[str, Output], ctx: Context) -> dict[str, Tensor]:
        log_p = F.log_softmax(outputs["main"].logits.float(), dim=1)
        entropy = -(log_p.exp() * log_p).sum(1)
        return {"penalty": (math.log(log_p.shape[1]) - entropy).mean()}
