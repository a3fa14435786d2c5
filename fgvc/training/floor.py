"""The floor of a run: a logistic regression on the frozen net, from exactly the images that the run learns from.

A run should not end below it, since anyone has it in minutes from embeddings and scikit-learn: it stands beside every result. It
is fitted before the first step, whatever head the run itself begins with, and lies in `ckpt/start`.
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
from fgvc.evaluation.paired import Paired, compare_answers
from fgvc.models.probe import Probe, fit_probe, linear_head, put_head
from fgvc.runs import checkpoint
from fgvc.training.session import Answers, Session
from fgvc.training.start import HeadFit, ViewFeatures, fitted_probe, view_features

CHOSEN = "the epoch was chosen by these images, which flatters it a little"
FOLDS = 5  # of the training images, where there is no validation split


@dataclass(frozen=True, slots=True)
class Floor:
    """A head, and what it says of images that it was not fitted to."""

    fit: HeadFit
    probe: Probe
    answers: Answers  # of validation, or of each training image by the fold that did not learn from it
    labels: NDArray[np.int64]  # (N,)
    folds: int | None  # None: there is a validation split

    @property
    def top1(self) -> float:
        """Share in [0,1]."""
        return float((self.answers.said == self.labels).mean())

    @property
    def facts(self) -> dict[str, Any]:
        """For events.jsonl."""
        on = "val" if self.folds is None else f"{self.folds} folds of train"
        return {"top1": round(self.top1, 6), "on": on, "of": len(self.labels), **asdict(self.fit)}

    @property
    def record(self) -> dict[str, Any]:
        """For the checkpoint."""
        return self.facts | {
            "folds": self.folds, "answers": self.answers.tensor(), "labels": torch.from_numpy(self.labels)
        }  # fmt: skip

    def __str__(self) -> str:
        of = "validation" if self.folds is None else f"training images, in {self.folds} folds"
        return f"floor: {100 * self.top1:.2f} % of {len(self.labels)} {of}: {self.fit}"


def fit_floor(session: Session) -> Floor | str:
    """Fit it on rank 0; every rank has it afterwards. What stands against it, in words, where the net's head is not linear or its
    weights are random. Raises that as FgvcError where the run's own head is to be this one (model.head: probe)."""
    if session.recipe.model.weights == "none":
        return "no floor: the first weights are random"
    process, found = session.runtime, list[Floor | str]()

    def fit() -> None:
        session.step.net.eval()
        try:
            found.append(_fit(session))
        except FgvcError as error:
            if session.recipe.model.head == "probe":
                raise
            found.append(f"no floor: {error}")
        finally:
            session.step.train()

    process.first(fit)
    return process.gather(found[0] if found else "")[0]


def start_with(session: Session, floor: Floor) -> None:
    """Make it the head that the run begins with, in the moving average, too."""
    put_head(session.step.net, torch.from_numpy(floor.probe.weight), torch.from_numpy(floor.probe.bias))
    if session.ema is not None:
        session.ema.set(session.step.net)


def _fit(session: Session) -> Floor:
    net, spec, index = session.step.net, session.preprocess, session.index
    linear_head(net)
    probe, fit, seen = fitted_probe(session, net, spec, where="model.head")
    held_out = index.rows("val")
    if len(held_out):
        held = view_features(net, spec, index, held_out, recipe=session.recipe, device=session.runtime.device, views=0)
        said = probe.logits(held.vectors).argmax(1)
        return Floor(fit, probe, Answers(held.rows, said), held.labels, None)
    rows, first = np.unique(seen.rows, return_index=True)  # as evaluation sees them: these come first
    said = _across(session, seen, probe.strength)
    judged = said[first] >= 0
    return Floor(fit, probe, Answers(rows[judged], said[first][judged]), seen.labels[first][judged], FOLDS)


def _across(session: Session, seen: ViewFeatures, strength: float) -> NDArray[np.int64]:
    """(N,) what is said of each view by a head that was fitted without its image; -1 where a class would have no other."""
    rows, place = np.unique(seen.rows, return_inverse=True)
    index, source = session.index, session.recipe.data
    groups = None if index.groups is None else index.groups[rows]
    fold = fold_numbers(index.labels[rows], folds=FOLDS, seed=source.split_seed, groups=groups)[place]
    said = np.full(len(seen.rows), -1, np.int64)
    for number in range(FOLDS):
        held, learn = fold == number, fold != number
        if held.any():
            probe = fit_probe(
                seen.vectors[learn], seen.labels[learn], classes=len(index.classes), strengths=(strength,)
            )
            said[held] = probe.logits(seen.vectors[held]).argmax(1)
    return said


def head_of(net: nn.Module, floor: Floor) -> dict[str, Tensor]:
    """The floor's head by the names that it has in the net."""
    head = linear_head(net)
    prefix = next(name for name, module in net.named_modules() if module is head)
    weight, bias = torch.from_numpy(floor.probe.weight), torch.from_numpy(floor.probe.bias)
    return {f"{prefix}.weight": weight.reshape(head.weight.shape), f"{prefix}.bias": bias}


@dataclass(frozen=True, slots=True)
class FloorComparison:
    """A run's result beside its floor, on the images of its validation split that both could read."""

    pair: Paired  # A: the floor, B: what the run ships
    step: int  # of the weights that it ships

    @property
    def facts(self) -> dict[str, float]:
        """Shares in [0,1]; the gain is the result's minus the floor's."""
        pair = self.pair
        shares = {"top1": pair.b_right.mean(), "floor": pair.a_right.mean(), "gain": pair.gain}
        return {name: round(float(value), 6) for name, value in (shares | {"low": pair.low, "high": pair.high}).items()}

    def lines(self, recipe: Recipe) -> list[str]:
        """For people: the result, and what to change where it is below the floor."""
        pair = self.pair
        said = (
            f"validation top-1 {100 * pair.b_right.mean():.2f} % of {pair.images} images, the floor (logistic regression on the "
            f"frozen net) {100 * pair.a_right.mean():.2f} %: {100 * pair.gain:+.2f} points, 95 % interval {100 * pair.low:+.1f} "
            f"to {100 * pair.high:+.1f}"
        )
        if recipe.selected == "best":
            said += "; " + (CHOSEN if self.step else "the start ships, since no epoch was better")
        return [said, *([f"WARNING: that is below the floor: {_mend(recipe)}"] if pair.gain < 0 else [])]


def _mend(recipe: Recipe) -> str:
    """The setting that most likely lost what the frozen net knows."""
    if recipe.model.head != "probe" or recipe.model.batch_norm != "frozen":
        return "model.head=probe and model.batch_norm=frozen keep what the frozen net knows"
    if recipe.selected != "best":
        return "select=best has validation choose among the epochs and the start"
    return "a lower optim.lr keeps more of what the frozen net knows"


def standing(out: Path, recipe: Recipe) -> FloorComparison | None:
    """What the weights that a run ships gained over its floor on validation, by the answers that its checkpoints hold: nothing is
    computed anew. None where it has no floor, no validation split, or its checkpoints are of an earlier fgvc."""
    try:
        floor = checkpoint.load(out / "ckpt", "start", say=lambda _: None).rest.get("floor")
        state = checkpoint.load(out / "ckpt", checkpoint.slot(recipe.selected), say=lambda _: None)
    except FgvcError:
        return None
    result = state.rest.get("answers")
    if not isinstance(floor, Mapping) or floor["folds"] is not None or result is None:
        return None
    ours, theirs, labels = floor["answers"].numpy(), result.numpy(), floor["labels"].numpy()
    _, a, b = np.intersect1d(ours[0], theirs[0], return_indices=True)
    return FloorComparison(compare_answers(labels[a], ours[1, a], theirs[1, b]), state.progress.step) if len(a) else None
