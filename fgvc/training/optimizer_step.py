"""One optimizer step: forward and backward over its micro-batches, and the update of weights and average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fgvc.data.loader import TrainBatch
from fgvc.runs.distributed import rng_state, set_rng_state
from fgvc.techniques.api import Batch, Draws, View
from fgvc.training.batch import to_batch
from fgvc.training.log import Events
from fgvc.training.sam import perturbed
from fgvc.training.session import Session


def optimizer_step(session: Session, micro_batches: Iterator[TrainBatch], events: Events) -> tuple[dict[str, Tensor], int]:
    """Forward, backward and update on one batch, in `train.grad_accum_steps` micro-batches; with SAM a second pass over all
    of them, from weights a small way uphill. Returns the losses, of the first pass, and the number of images of all processes."""
    recipe, process, step = session.recipe, session.process, session.step
    count, sam = recipe.train.grad_accum_steps, recipe.optim.sam
    first_pass: list[tuple[Mapping[str, Any], Batch, Draws, list[View]]] = []
    session.optimizer.zero_grad(set_to_none=True)
    session.finite_check.forget_step()
    losses_by_term: dict[str, list[Tensor]] = {}
    images = 0
    for number in range(count):
        raw = next(micro_batches)
        for error in raw.bad:
            events.say(f"skipped from now on: {error}")
            events.write("unreadable", path=error.path, reason=error.reason)
        batch = to_batch(raw, session.normalise, session.train_size)
        share_done = session.progress.step / (session.steps_per_epoch * recipe.train.epochs)
        draws = step.draw(
            batch, share_done, seed=recipe.train.seed, step=session.progress.step, micro_batch=number, rank=process.rank
        )
        if sam is None:
            losses, _ = forward_backward(session, batch, draws, last=number == count - 1)
        else:  # each rank goes uphill by its own images, as in the paper
            state = rng_state(process.device)
            losses, views = forward_backward(session, batch, draws, last=False)
            first_pass.append((state, batch, draws, views))
        images += len(batch.labels)
        for name, value in losses.items():
            losses_by_term.setdefault(name, []).append(value.detach())
    if sam is not None:
        with perturbed(step, sam):
            for number, (state, batch, draws, views) in enumerate(first_pass):
                set_rng_state(state, process.device)  # the net's own dropout draws the same
                uphill, _ = forward_backward(session, batch, draws, views, last=number == count - 1)
                session.finite_check.uphill.append(uphill["loss"].detach())
    if recipe.optim.clip_grad is not None:
        session.scaler.unscale_(session.optimizer)
        torch.nn.utils.clip_grad_norm_(step.parameters(), recipe.optim.clip_grad)
    session.scaler.step(session.optimizer)
    session.scaler.update()
    if session.ema is not None:
        session.ema.update(step.net, step=session.progress.step)
    for kind, after in step.hooks("after_step"):
        after(step.contexts[kind])
    # A term may be of some micro-batches only, as where labels are mixed: the mean is over those.
    return {name: torch.stack(values).mean() for name, values in losses_by_term.items()}, images * process.world


def forward_backward(
    session: Session, batch: Batch, draws: Draws, views: list[View] | None = None, *, last: bool
) -> tuple[dict[str, Tensor], list[View]]:
    """Forward and backward of one micro-batch; in the last one the ranks add up their gradients."""
    count, process = session.recipe.train.grad_accum_steps, session.process
    synchronise = nullcontext() if last or process.world == 1 else session.wrapped.no_sync()  # type: ignore[operator]
    with synchronise:
        with process.autocast():
            losses, step_views = session.wrapped(batch, draws, views)
        session.scaler.scale(losses["loss"] / count if count > 1 else losses["loss"]).backward()
    return losses, step_views
