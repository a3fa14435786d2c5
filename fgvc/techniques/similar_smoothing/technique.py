"""Label smoothing by class similarity: more of the label goes to classes that look alike.

Uniform smoothing (Szegedy et al., CVPR 2016, arXiv:1512.00567, section 7) gives every wrong class the same share; here it goes to
the classes whose mean features are alike. After stripping nothing is left: the means go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from fgvc.config.knots import ScheduledShare
from fgvc.models.target import Target
from fgvc.techniques.api import MAIN, Output, Technique
from fgvc.techniques.centres import FeatureBuffer, class_sums
from fgvc.techniques.plan import Context, Plan
from fgvc.techniques.similar_smoothing.settings import SimilarSmoothingSettings


class SimilarSmoothing(Technique):
    """Smoothing by similarity: term sum_k S[y,k] CE(k) - CE(y), mean over images and over views by their weight; CE(y) + e times
    it is the cross-entropy with (1 - e) onehot(y) + e S[y]."""

    source: ClassVar[str] = "after Szegedy et al., CVPR 2016, arXiv:1512.00567"

    def __init__(self, config: SimilarSmoothingSettings) -> None:
        self.config = config
        self.weights: Mapping[str, ScheduledShare] = {"similar": config.similar}
        self._buffer = FeatureBuffer()

    @override
    def setup(self, plan: Plan) -> None:
        plan.add("means", Means(plan.classes, plan.pooled_width))
        plan.note("beside loss.label_smoothing, which smooths evenly; set that to 0 to have similarity alone")

    @override
    def losses(self, outputs: Mapping[str, Output], ctx: Context) -> dict[str, Tensor]:
        """Compute `similar`, over the views that classify. Collects features for the means, on every rank."""
        main = outputs[MAIN]
        with torch.no_grad():
            self._buffer.add(ctx.pooled(main.features).float(), main.view.target, ctx)
        means = cast("Means", ctx.branches["means"])
        views = [output for output in outputs.values() if output.view.classifies]
        terms = [o.view.weight * _smoothing(o.logits.float(), o.view.target, means, self.config.temperature) for o in views]
        return {"similar": torch.stack(terms).sum() / sum(o.view.weight for o in views)}

    @override
    def after_step(self, ctx: Context) -> None:
        """Move the means by this step's features, those of all ranks and micro-batches together."""
        if features := self._buffer.take():
            cast("Means", ctx.branches["means"]).follow(*features, rate=self.config.rate)


class Means(nn.Module):
    """The mean features of each class, as a moving average."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(classes, width))
        self.register_buffer("initialised", torch.zeros(classes, dtype=torch.bool))
        self.values: Tensor
        self.initialised: Tensor

    @torch.no_grad()
    def follow(self, x: Tensor, labels: Tensor, *, rate: float) -> None:
        """Move the means towards x (B,D) of labels (B,), each in [0,K), or -1: left out. A class's first sets its mean."""
        present, counts, sums = class_sums(x, labels)
        fresh = (sums / counts[:, None]).to(self.values)
        old = torch.where(self.initialised[present, None], self.values[present], fresh)
        self.values[present] = torch.lerp(old, fresh, rate)
        self.initialised[present] = True

    @torch.no_grad()
    def similar(self, labels: Tensor, temperature: float) -> Tensor:
        """Shares S (B,K) float32 of the other classes, rows of sum 1.

        A class without a mean yet has the share of even smoothing, 1 / (K - 1), as has every class where the label has none;
        the others divide the rest by the softmax of cosine / temperature. The label's share is 0.
        """
        with torch.autocast(self.values.device.type, enabled=False):
            directions = F.normalize(self.values.float(), dim=1)
            cosines = directions[labels] @ directions.T
        others = F.one_hot(labels, len(self.values)) == 0
        even = others / (len(self.values) - 1)
        comparable = others & self.initialised & self.initialised[labels, None]
        shares = (cosines / temperature).masked_fill(~comparable, -torch.inf).softmax(1)
        return torch.where(comparable, shares * (even * comparable).sum(1, keepdim=True), even)


def _smoothing(logits: Tensor, target: Target, means: Means, temperature: float) -> Tensor:
    """Smoothing term of one view: mean_b sum_j w_j (sum_k S[y_j,k] CE(k) - CE(y_j)); logits (B,K) float32."""
    log_p = logits.log_softmax(1)
    terms = []
    for y, w in target:
        moved = F.one_hot(y, logits.shape[1]) - means.similar(y, temperature)
        terms.append((moved * log_p).sum(1) * (1.0 if w is None else w))
    return torch.stack(terms).sum(0).mean()
