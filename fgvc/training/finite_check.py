"""Checks that neither a step nor a checkpoint holds values that are not finite, and the error for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgvc.config.recipe import Recipe
from fgvc.config.training import Optim
from fgvc.errors import FgvcError
from fgvc.io.names import some
from fgvc.models.finite import not_finite, suspicious
from fgvc.runs import checkpoint
from fgvc.runs.checkpoint import State
from fgvc.runs.distributed import ProcessGroup
from fgvc.runs.step import StepModule

TERM = "its term "  # before a term's name in messages about the loss
LEAST_SCALE = 1e-4  # of the loss under fp16; fairseq gives up there, too


class FiniteCheck:
    """The tensors that every step must leave finite, by name."""

    def __init__(self, step: StepModule, average: nn.Module | None, scaler: torch.amp.GradScaler) -> None:
        self.step, self.scaler = step, scaler
        self._scale = scaler.get_scale()
        self.uphill: list[Tensor] = []  # the losses of SAM's second pass, of this step
        self._weights = dict(step.named_parameters())
        self._moved = self._weights | dict(step.named_buffers())
        averaged = {} if average is None else average.state_dict(keep_vars=True)
        self._lasting = self._moved | {f"average.{name}": value for name, value in averaged.items()}

    def forget_step(self) -> None:
        """Forget the losses and logits of the step before."""
        self.uphill.clear()
        self.step.eval_logits.clear()

    def skipped(self, step: int, *, last: bool) -> str:
        """Reason why fp16 training learns nothing although all is finite: the scaler skips the steps; empty where it does not.

        Each skipped step halves its scale. It is at an end below LEAST_SCALE, where no gradient of use is left.
        """
        if not self.scaler.is_enabled():
            return ""
        scale = self.scaler.get_scale()
        if scale < LEAST_SCALE:
            return f"step {step}: the gradients overflow fp16 even at a loss scale of {scale:g}, so the steps are skipped"
        if last and scale <= self._scale * 0.5**step:
            return f"the gradients overflowed fp16 in all {step} steps, so each was skipped and nothing was learnt"
        return ""

    def tensors(self, loss: Tensor | None = None) -> dict[str, Tensor]:
        """Return a step's loss, the logits of its eval passes, its gradients, and what it has moved: weights and statistics.
        Without the gradients where a scaler looks at them, and skips the step. Without a loss: all that lasts, averages too."""
        if loss is None:
            return self._lasting
        tensors = {"the loss": loss}
        tensors |= {f"the loss uphill (optim.sam), micro-batch {at}": value for at, value in enumerate(self.uphill)}
        tensors |= {f"logits of eval pass {at}": value for at, value in enumerate(self.step.eval_logits)}
        if not self.scaler.is_enabled():
            graded = ((name, weight.grad) for name, weight in self._weights.items())
            tensors |= {f"the gradient of {name}": gradient for name, gradient in graded if gradient is not None}
        return tensors | self._moved


def state_tensors(state: State) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name."""
    parts = {"net": state.net, "branches": state.branches, "average": state.ema, **state.rest}
    return dict(_leaves("", parts))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
        return
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in pairs:
        yield from _leaves(f"{name}.{key}" if name else str(key), inner)


def refuse_not_finite(tensors: Mapping[str, Tensor], *, when: str, out: Path, recipe: Recipe, process: ProcessGroup) -> None:
    """Raise FgvcError on all processes where one of them holds a value that is not finite. Waits for the device."""
    if bool(process.anywhere(suspicious(tensors.values()))):
        names = list(dict.fromkeys(chain(*process.gather(not_finite(tensors)))))
        if names:
            terms = [name.removeprefix(TERM) for name in names if name.startswith(TERM)]
            reason = f"{when}: NaN or infinite, and not saved: {some(names)}"
            raise not_finite_error(reason, out=out, recipe=recipe, terms=[] if "base" in terms else terms)


def not_finite_error(reason: str, *, out: Path, recipe: Recipe, terms: Sequence[str] = ()) -> FgvcError:
    """The error that ends a run with such values: what there is to go back to, and what may help. `terms`: those of techniques
    that are not finite where the classification loss is."""
    reason = f"{reason}. {newest_finite_checkpoint(out / 'ckpt')}"
    if terms:
        alone = f"{' and '.join(terms)} alone {'are' if len(terms) > 1 else 'is'} not finite"
        return FgvcError(
            f"{out}: {reason}. {alone}: the classification loss is. Mend the technique, or set the weight of that term to 0, and "
            "begin anew, in another --out or with --overwrite"
        )
    optim = recipe.optim
    ways = [f"optim.lr={min(optim.lr / 10, Optim().lr):g} (it is {optim.lr:g})"]
    ways += ["optim.clip_grad=1"] * (optim.clip_grad is None)
    ways += ["train.precision=bf16"] * (recipe.train.precision == "fp16")
    ways += [f"optim.sam.rho={optim.sam.rho / 2:g} (it is {optim.sam.rho:g})"] if optim.sam is not None else []
    return FgvcError(
        f"{out}: {reason}. The same settings lead here again, and "
        f"a run that goes on keeps them: begin anew, in another --out or with --overwrite, with {', '.join(ways)}"
    )


def newest_finite_checkpoint(folder: Path) -> str:
    """A sentence about the newest checkpoint of a run that is intact and finite throughout."""
    for path, state in checkpoint.intact_checkpoints(folder):
        if not not_finite(state_tensors(state)):
            weights = f"model.weights={path / 'net.safetensors'}"
            newest = f"The newest checkpoint that is finite is {path}, of step {state.progress.step}"
            return f"{newest}; a new run may begin from its weights, {weights}"
    return f"There is no checkpoint in {folder} that is finite"
