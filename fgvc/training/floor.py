"""The floor of a run: a logistic regression on the frozen net's features of exactly the images that the run learns from.

A run should not end below it, since it takes minutes with embeddings and scikit-learn: it stands beside every result. It is
fitted before the first step, whatever head the run itself begins with, and lies in `ckpt/start`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fgvc.config.recipe import Recipe
from fgvc.data.splits import fold_numbers
from fgvc.errors import FgvcError
from fgvc.evaluation.paired import Paired, beside_floor, compare_predictions, standing
from fgvc.models.probe import Probe, fit_probe, linear_head, put_head
from fgvc.runs import checkpoint
from fgvc.training.session import Predictions, Session
from fgvc.training.settle import chooses_epochs, needs_margin
from fgvc.training.start import HeadFit, ViewFeatures, fit_net_probe, view_features

BEST_EPOCH_REMARK = "the epoch was chosen by these images, which flatters it a little"
NO_EPOCH_REMARK = "the start ships, since no epoch was better"
FEW_REMARK = "the end ships, since so few images choose no epoch"
FOLDS = 5  # of the training images, where there is no validation split


@dataclass(frozen=True, slots=True)
class Floor:
    """A fitted head, and its predictions for images that it was not fitted to."""

    fit: HeadFit
    probe: Probe
    predictions: Predictions  # N: for validation, or for each training image by the fold that did not learn from it
    labels: NDArray[np.int64]  # (N,)
    folds: int | None  # None: there is a validation split; 0: no image may score it, the net has seen all of these

    @property
    def top1(self) -> float | None:
        """Share of right predictions, in [0,1]; None: there are none."""
        return float((self.predictions.classes == self.labels).mean()) if len(self.labels) else None

    @property
    def facts(self) -> dict[str, Any]:
        """Row for events.jsonl."""
        if self.top1 is None:
            return asdict(self.fit)
        on = "val" if self.folds is None else f"{self.folds} folds of train"
        return {"top1": round(self.top1, 6), "on": on, "of": len(self.labels), **asdict(self.fit)}

    @property
    def record(self) -> dict[str, Any]:
        """Entry of the start's checkpoint."""
        return self.facts | {
            "folds": self.folds, "answers": self.predictions.tensor(), "labels": torch.from_numpy(self.labels)
        }  # fmt: skip

    def __str__(self) -> str:
        if self.top1 is None:
            reason = "no image that the deployed file has not seen could choose"
            if self.folds:
                reason = "no class has a second image, or group of images, to hold out"
            return f"floor: {self.fit}, not scored: {reason}"
        of = "validation" if self.folds is None else f"training images, in {self.folds} folds"
        return f"floor: {100 * self.top1:.2f} % of {len(self.labels)} {of}: {self.fit}"


def fit_floor(session: Session) -> Floor | str:
    """Fit the floor on rank 0; every rank has it afterwards. Returns the reason, in words, where there is none: the net's head is
    not linear, its weights are random, or train.floor is false. Raises FgvcError instead where the run's own head is to be this
    one (model.head: probe)."""
    if session.recipe.model.weights == "none":
        return "no floor: the first weights are random"
    if not session.recipe.train.floor and session.recipe.model.head != "probe":
        return "no floor: train.floor is false"
    process, results = session.process, list[Floor | str]()

    def fit() -> None:
        session.step.net.eval()
        try:
            results.append(_fit(session))
        except FgvcError as error:
            if session.recipe.model.head == "probe":
                raise
            results.append(f"no floor: {error}")
        finally:
            session.step.train()

    process.first(fit)
    return process.gather(results[0] if results else "")[0]


def put_floor_head(session: Session, floor: Floor) -> None:
    """Make the floor the head that the run begins with, in the moving average, too."""
    put_head(session.step.net, torch.from_numpy(floor.probe.weight), torch.from_numpy(floor.probe.bias))
    if session.ema is not None:
        session.ema.set(session.step.net)


def _fit(session: Session) -> Floor:
    net, spec, index = session.step.net, session.preprocess, session.index
    linear_head(net)
    probe, fit, features = fit_net_probe(session, net, spec, where="model.head")
    validation = index.rows("val")
    if len(validation):
        held_out = view_features(net, spec, index, validation, recipe=session.recipe, device=session.process.device, views=0)
        classes = probe.logits(held_out.vectors).argmax(1)
        return Floor(fit, probe, Predictions(held_out.rows, classes), held_out.labels, None)
    if index.unseen:
        none = np.empty(0, np.int64)
        return Floor(fit, probe, Predictions(none, none), none, 0)
    rows, first = np.unique(features.rows, return_index=True)  # as evaluation sees them: these come first
    classes = _cross_fitted(session, features, probe.strength)
    predicted = classes[first] >= 0
    return Floor(fit, probe, Predictions(rows[predicted], classes[first][predicted]), features.labels[first][predicted], FOLDS)


def _cross_fitted(session: Session, features: ViewFeatures, strength: float) -> NDArray[np.int64]:
    """Classes (N,) predicted for each view by a head that was fitted without its image; -1 where a class would have no other."""
    rows, place = np.unique(features.rows, return_inverse=True)
    index, source = session.index, session.recipe.data
    groups = None if index.groups is None else index.groups[rows]
    fold = fold_numbers(index.labels[rows], folds=FOLDS, seed=source.split_seed, groups=groups)[place]
    classes = np.full(len(features.rows), -1, np.int64)
    for number in range(FOLDS):
        held_out, learn = fold == number, fold != number
        if held_out.any():
            probe = fit_probe(
                features.vectors[learn], features.labels[learn], classes=len(index.classes), strengths=(strength,)
            )
            classes[held_out] = probe.logits(features.vectors[held_out]).argmax(1)
    return classes


def floor_head(net: nn.Module, floor: Floor) -> dict[str, Tensor]:
    """Tensors of the floor's head by their names in the net."""
    head = linear_head(net)
    prefix = next(name for name, module in net.named_modules() if module is head)
    weight, bias = torch.from_numpy(floor.probe.weight), torch.from_numpy(floor.probe.bias)
    return {f"{prefix}.weight": weight.reshape(head.weight.shape), f"{prefix}.bias": bias}


@dataclass(frozen=True, slots=True)
class FloorComparison:
    """Comparison of a run's result with its floor, on the validation images that both could read."""

    pair: Paired  # A: the floor, B: what the run ships
    step: int  # of the weights that the run ships

    @property
    def facts(self) -> dict[str, float]:
        """Top-1 of both and the gain, as `fgvc.evaluation.paired.standing` returns them."""
        return standing(self.pair)

    def lines(self, recipe: Recipe) -> list[str]:
        """The result in words, and what to change where it is below the floor."""
        pair = self.pair
        message = f"validation top-1 {100 * pair.b_right.mean():.2f} % of {pair.images} images, {beside_floor(pair)}"
        if recipe.selected == "best" and chooses_epochs(recipe, pair.images):
            margin = " by more than one standard error" * needs_margin(recipe, pair.images)
            message += "; " + (BEST_EPOCH_REMARK if self.step else NO_EPOCH_REMARK + margin)
        elif recipe.selected == "best":
            message += "; " + (FEW_REMARK if self.step else "the start ships")
        return [message, *([f"WARNING: that is below the floor: {_advice(recipe)}"] if pair.gain < 0 else [])]


def _advice(recipe: Recipe) -> str:
    """Advice on the setting that most likely lost what the frozen net knows."""
    if recipe.model.head != "probe" or recipe.model.batch_norm != "frozen":
        return "model.head=probe and model.batch_norm=frozen keep what the frozen net knows"
    if recipe.selected != "best":
        return "select=best has validation choose among the epochs and the start"
    return "a lower optim.lr keeps more of what the frozen net knows"


def floor_comparison(out: Path, recipe: Recipe) -> FloorComparison | None:
    """Compare the weights that a run ships with its floor on validation, by the predictions in its checkpoints. None where the
    run has no floor, no validation split, or its checkpoints are of an earlier fgvc."""
    try:
        floor = checkpoint.load(out / "ckpt", "start", say=lambda _: None).rest.get("floor")
        state = checkpoint.load(out / "ckpt", checkpoint.slot(recipe.selected), say=lambda _: None)
    except FgvcError:
        return None
    result = state.rest.get("answers")
    if not isinstance(floor, Mapping) or floor["folds"] is not None or result is None:
        return None
    of_floor, shipped, labels = floor["answers"].numpy(), result.numpy(), floor["labels"].numpy()
    _, a, b = np.intersect1d(of_floor[0], shipped[0], return_indices=True)
    return FloorComparison(compare_predictions(labels[a], of_floor[1, a], shipped[1, b]), state.progress.step) if len(a) else None
