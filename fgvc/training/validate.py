"""Validation of the net that would ship, between epochs and before the first step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fgvc.config.models import Model
from fgvc.data.loader import evaluation_loader
from fgvc.errors import NoNumbersError
from fgvc.evaluation.metrics import Scores, evaluate
from fgvc.models.backbone import memory_format
from fgvc.training.session import Session, spread
from fgvc.training.watch import lost

UNSCORED = 64  # training images that a net without a validation split is asked about
FAR = 1.2  # times ln K: a start whose cross-entropy is above that is worse than no answer


def score(session: Session, out: Path) -> Scores:
    """Of what would ship, on the validation split, whose answers the session keeps; without one on some training images, whether
    the net gives numbers at all."""
    rows, process, held_out = session.index.rows("val"), session.runtime, session.validated
    rows = rows if held_out else spread(session.index.rows("train"), UNSCORED)
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
    seen, said = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in loader:
            seen.append(batch.index)
            yield batch.images, batch.labels

    def answer(x: Tensor) -> Tensor:
        z: Tensor = net(x)
        said.append(z.argmax(1).cpu())
        return z

    try:
        scores = evaluate(
            answer,
            batches(),
            classes=len(session.index.classes),
            device=process.device,
            memory_format=memory_format(net),
        )
    except NoNumbersError as error:
        split = "validation" if held_out else "training"
        raise lost(
            f"step {session.progress.step}: of {split} images, {error}", out=out, recipe=session.recipe
        ) from error
    finally:
        session.step.train()
    if held_out:
        shares = process.gather(torch.stack([torch.cat(seen), torch.cat(said)]))
        session.answers = torch.cat(shares, dim=1)
    return scores


def far_from_even(scores: Scores, model: Model) -> str | None:
    """A doubt where the net begins with answers much worse than none: its first gradients are large, and undo what it knows."""
    even = math.log(len(scores.confusion))
    if scores.loss <= FAR * even:
        return None
    way = (
        "set model.head=probe (or zero)"
        if model.head == "timm"
        else "do its weights fit model.mean, model.std and deploy?"
    )
    return (
        f"the start's cross-entropy is {scores.loss:.2f} nats, where the same answer for all {len(scores.confusion)} classes has "
        f"{even:.2f}: {way}"
    )
