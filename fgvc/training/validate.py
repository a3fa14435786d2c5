"""Validation of the net that would ship, between epochs and before the first step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fgvc.config.models import Model
from fgvc.data.index import spread
from fgvc.data.loader import evaluation_loader
from fgvc.errors import NoNumbersError
from fgvc.evaluation.metrics import Scores, evaluate
from fgvc.models.backbone import memory_format
from fgvc.training.finite_check import not_finite_error
from fgvc.training.session import Session

CHECKED_IMAGES = 64  # training images that a net without a validation split is checked on
FAR_FACTOR = 1.2  # times ln K: a start whose cross-entropy is above that is worse than no answer


def score(session: Session, out: Path) -> Scores:
    """Score what would ship on the validation split, whose predictions the session keeps; without one on some training images,
    to check that the net gives finite numbers. Raises FgvcError where it does not."""
    rows, process, held_out = session.index.rows("val"), session.process, session.validated
    rows = rows if held_out else spread(session.index.rows("train"), CHECKED_IMAGES)
    loader = evaluation_loader(
        session.index,
        rows,
        spec=session.preprocess,
        batch_size=64,
        workers=session.recipe.train.workers if held_out else 0,
        rank=process.rank,
        world=process.world,
    )
    net = session.shipping()
    net.eval()
    process.same_buffers(net)
    rows_read, classes = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in loader:
            rows_read.append(batch.index)
            yield batch.images, batch.labels

    def answer(x: Tensor) -> Tensor:
        z: Tensor = net(x)
        classes.append(z.argmax(1).cpu())
        return z

    try:
        scores = evaluate(
            answer,
            batches(),
            classes=len(session.index.classes),
            device=process.device,
            memory_format=memory_format(net),
            ending=session.preprocess.ending,
        )
    except NoNumbersError as error:
        split = "validation" if held_out else "training"
        raise not_finite_error(
            f"step {session.progress.step}: of {split} images, {error}", out=out, recipe=session.recipe
        ) from error
    finally:
        session.step.train()
    if held_out:
        shares = process.gather(torch.stack([torch.cat(rows_read), torch.cat(classes)]))
        session.predictions = torch.cat(shares, dim=1)
    return scores


def start_doubt(scores: Scores, model: Model) -> str | None:
    """A warning where the start's answers are much worse than uniform ones: the first gradients are large, and undo what the net
    knows."""
    uniform = math.log(len(scores.confusion))
    if scores.loss <= FAR_FACTOR * uniform:
        return None
    way = (
        "set model.head=probe (or zero)"
        if model.head == "timm"
        else "do deploy.mean, deploy.std and the rest of deploy fit its weights?"
    )
    return (
        f"the start's cross-entropy is {scores.loss:.2f} nats, where the same answer for all {len(scores.confusion)} classes has "
        f"{uniform:.2f}: {way}"
    )
