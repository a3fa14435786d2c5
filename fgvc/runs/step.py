"""One training step as a module, which is all that DDP and autocast wrap (docs/design.md).

The order of phases is fixed here and the step calls no technique by name:
on_batch -> views -> forward (shared group, own groups) -> views_after -> losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fgvc.config.knots import value_at
from fgvc.config.teachers import AnyTeacher
from fgvc.errors import FgvcError
from fgvc.models.class_maps import ClassMapper, evaluating
from fgvc.models.classifier import as_classifier
from fgvc.models.loss import cross_entropy
from fgvc.models.norms import batch_statistics, momenta, running_norms
from fgvc.models.target import Target
from fgvc.rng import STEP, generator
from fgvc.techniques.api import MAIN, Batch, Draws, Output, Technique, View, overrides
from fgvc.techniques.checks import (
    NetParts,
    Outputs,
    call,
    naming,
    require_added,
    require_batch,
    require_described,
    require_gated,
    require_terms,
    require_views,
)
from fgvc.techniques.plan import Attachments, Context, Plan, context_of
from fgvc.techniques.settings import FEATURES
from fgvc.techniques.teacher import Teacher


class StepModule(nn.Module):
    """The backbone with everything that training adds to it.

    `net` is the timm model, some of its modules replaced; `branches` is what is stripped. Both are ordinary submodules, so
    their parameters reach the optimizer and DDP; they are separate parts of the checkpoint.
    """

    def __init__(
        self,
        net: nn.Module,
        techniques: Mapping[str, Technique],
        *,
        size: tuple[int, int],
        criterion: Callable[[Tensor, Target], Tensor] = cross_entropy,
        l1: float = 0.0,
        frozen: Sequence[nn.Module] = (),
        grad_checkpointing: bool = False,
        opener: Callable[[AnyTeacher, Attachments], Teacher] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self._frozen = tuple(frozen)  # modules of `net` that stay in eval mode
        self.l1 = l1
        plain = {id(parameter) for parameter in net.parameters()}
        self.techniques = dict(techniques)
        self.criterion = criterion
        self.attachments = Attachments(net=net, size=size, grad_checkpointing=grad_checkpointing, opener=opener)
        self.branches = self.attachments.branches
        for kind, technique in self.techniques.items():
            require_described(kind, technique)
            parts = NetParts(net)
            call(kind, "setup", technique.setup, Plan(kind, self.attachments))
            parts.require_same(kind, self.attachments.replaced)
            require_added(kind, technique, self)
        self._added_checked = False  # once more after the first forward: a hook may make a module, too
        new = (name for name, value in self.named_parameters() if id(value) not in plain)
        self.added = {name: "added" if name.startswith("branches.") else "replaced" for name in new}
        self._grad_checkpointing = grad_checkpointing
        self._norms = running_norms(net) if grad_checkpointing else []
        self._momenta = [norm.momentum for norm in self._norms]
        if grad_checkpointing:
            _checkpoint_activations(net)
            # Of the forward only: recomputed batch norms see the batch again and must not count it twice.
            for norm in self._norms:
                norm.momentum = 0.0
        self._handles: list[RemovableHandle] = []
        self._hooked: dict[str, Tensor] = {}
        self._fired: set[tuple[str, str]] = set()
        self._group: list[View] = []
        self._inside = False  # False in the backward, where checkpointed blocks of the net run once more
        self.contexts: dict[str, Context] = {}
        self.eval_logits: list[Tensor] = []  # (B,K) each, of the eval passes since this was last emptied
        self._mapper = ClassMapper(net)
        # In a list, so that it is no submodule: it has its own place in a checkpoint.
        self._average = self.attachments.average

    def hooks(self, name: str) -> list[tuple[str, Callable[..., Any]]]:
        """Techniques that override this hook, in their order, each with its bound method, whose errors name both."""
        return [
            (kind, partial(call, kind, name, getattr(technique, name)))
            for kind, technique in self.techniques.items()
            if overrides(technique, name)
        ]

    def draw(self, batch: Batch, progress: float, *, seed: int, step: int, micro_batch: int = 0, rank: int = 0) -> Draws:
        """Draw all random numbers of one step. Each technique has a stream of its own: what it draws does not depend on what
        else is switched on, so runs with and without another technique can be compared step by step. Of the techniques
        that mix one at most draws, the same one in all micro-batches and on all ranks."""
        mixers = {kind: mixes(progress) for kind, mixes in self.hooks("mixes")}
        mixer = _pick_by_share(mixers, generator(STEP, seed, step, 0, 0, crc32(b"which one mixes")).random())
        drawn = {}
        for kind, draw in self.hooks("draw"):
            if kind not in mixers or kind == mixer:
                drawn[kind] = draw(generator(STEP, seed, step, micro_batch, rank, crc32(kind.encode())), batch)
        return Draws(progress, drawn)

    def forward(
        self, batch: Batch, draws: Draws, views: Sequence[View] | None = None
    ) -> tuple[dict[str, Tensor], list[View]]:
        """Compute the losses, and return the views that they were taken on.

        `batch.x` (B,3,H,W) float32 normalised. The dict holds "loss" (the scalar to minimise), "base", every term whose
        weight is not 0, unweighted, and what these techniques measure. Given the views of an earlier call, makes none anew (SAM's
        second pass): on_batch, views and views_after see a batch once, and `Context.second_pass` tells the other hooks.
        Raises FgvcError where a declared hook or gate did not fire, or a technique returns an undeclared term.
        """
        eval_pass, second_pass = cache(lambda of: self._eval_pass(of, batch)), views is not None
        self.contexts = {
            kind: context_of(kind, self.attachments, draws, eval_pass, batch, second_pass=second_pass) for kind in self.techniques
        }
        self._inside = True
        with momenta(self._norms, self._momenta):
            losses, step_views = self._forward(batch, draws, views)
        self._inside = False
        if not self._added_checked:
            for kind, technique in self.techniques.items():
                require_added(kind, technique, self, in_step=True)
            self._added_checked = True
        return losses, step_views

    def _forward(
        self, batch: Batch, draws: Draws, views: Sequence[View] | None
    ) -> tuple[dict[str, Tensor], list[View]]:
        if views is None:
            early, late = self._early_views(batch), None
        else:
            early, late = ([v for v in views if v.stage == stage] for stage in ("before", "after"))
        outputs = Outputs(self._run([v for v in early if v.bn == "shared"]))
        for view in early:
            if view.bn == "own":
                outputs |= self._run([view])
        if late is None:
            late = self._late_views(batch, outputs)
        for view in late:
            outputs |= self._run([view])
        return self._losses(outputs, draws.progress), [*early, *late]

    def set_average(self, average: nn.Module | None) -> None:
        """Set the moving average of the net, for techniques that ask for a pass through it."""
        self._average[:] = [] if average is None else [average]

    def _eval_pass(self, of: str, batch: Batch) -> Output:
        net = self.net if of == "net" else self._average[0]
        with torch.no_grad(), evaluating(net):
            features = as_classifier(net).forward_features(batch.x_clean)
            logits = as_classifier(net).forward_head(features)
        self.eval_logits.append(logits)
        view = View(of, batch.x_clean, [(batch.labels, None)])
        return Output(view, features, logits, mapper=self._mapper if of == "net" else ClassMapper(net))

    def logits_and_crops(self, x: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        """Compute the logits of x, and return a function that makes a technique's crops, for evaluation in two passes.
        Raises FgvcError where none of them refines."""
        refiners = self.hooks("refine")
        if not refiners:
            raise FgvcError("--views refined needs a technique that looks twice, such as attention_crop_drop")
        kind, refine = refiners[0]
        features = as_classifier(self.net).forward_features(x)
        logits = as_classifier(self.net).forward_head(features)
        output = Output(View(MAIN, x, [(logits.argmax(1), None)]), features, logits, mapper=self._mapper)
        return logits, lambda: refine(output, context_of(kind, self.attachments, Draws(1.0), size=x.shape[2:]))

    def train(self, mode: bool = True) -> StepModule:
        """Set the mode of all modules but the frozen ones, which stay in eval mode: their batch norms keep their statistics."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def attach_hooks(self) -> None:
        """Register hooks and gates. Called once, after any copy of the net (EMA) is taken: a copy has none."""
        for name in sorted(self.attachments.hooked):
            self._handles.append(self.net.get_submodule(name).register_forward_hook(self._capture_hook(name)))
        for kind, name, gate in self.attachments.gates:
            if name == FEATURES:
                continue
            self._handles.append(self.net.get_submodule(name).register_forward_hook(self._gate_hook(kind, name, gate)))

    def _early_views(self, batch: Batch) -> list[View]:
        mixed = batch
        for kind, on_batch in self.hooks("on_batch"):
            mixed = require_batch(kind, on_batch(mixed, self.contexts[kind]), batch)
        views = [View(MAIN, mixed.x, mixed.target)]
        for kind, make in self.hooks("views"):
            views += require_views(kind, make(mixed, self.contexts[kind]), batch)
        return views

    def _late_views(self, batch: Batch, outputs: Mapping[str, Output]) -> list[View]:
        views = []
        for kind, make in self.hooks("views_after"):
            for view in require_views(kind, make(batch, outputs, self.contexts[kind]), batch):
                view.stage = "after"
                if view.bn == "shared":
                    raise FgvcError(
                        f"{view.name}: a view made from outputs can't share the clean forward; use bn='own'"
                    )
                views.append(view)
        return views

    def _run(self, group: list[View]) -> dict[str, Output]:
        """Run one forward of the views of a group, concatenated, and return an output for each."""
        x = group[0].x if len(group) == 1 else torch.cat([view.x for view in group])
        self._group, self._hooked, self._fired = group, {}, set()
        own_norms = group[0].bn == "own"
        with batch_statistics(self.net, recompute=self._grad_checkpointing) if own_norms else nullcontext():
            features = as_classifier(self.net).forward_features(x)
            if self._grad_checkpointing and features.requires_grad:
                features.register_hook(partial(self._enter_group, group))
            for kind, name, gate in self.attachments.gates:
                if name == FEATURES and self.net.training:
                    features = self._apply_gate(kind, name, features, gate, group)
                    self._fired.add((f"gate of {kind}", name))
            logits = as_classifier(self.net).forward_head(features)
        self._check_fired()
        if len(group) == 1:  # nothing to slice, whose backward would fill and add a whole map
            return {group[0].name: Output(group[0], features, logits, dict(self._hooked), self._mapper)}
        outputs, start = {}, 0
        for view in group:
            rows = slice(start, start := start + len(view.x))
            hooked = {name: output[rows] for name, output in self._hooked.items()}
            outputs[view.name] = Output(view, features[rows], logits[rows], hooked, self._mapper)
        return outputs

    def _losses(self, outputs: Mapping[str, Output], progress: float) -> dict[str, Tensor]:
        classify = [o for o in outputs.values() if o.view.classifies]
        base = sum(o.view.weight * self.criterion(o.logits, o.view.target) for o in classify)
        losses: dict[str, Tensor] = {"base": base / sum(o.view.weight for o in classify)}  # type: ignore[dict-item]
        total = losses["base"]
        for kind, hook in self.hooks("losses"):
            weights = {name: value_at(value, progress) for name, value in self.techniques[kind].weights.items()}
            if weights and not any(weights.values()):
                continue
            for name, term in require_terms(kind, self.techniques[kind], hook(outputs, self.contexts[kind])).items():
                if name in self.techniques[kind].measures:
                    losses[f"{kind}.{name}"] = term.detach().float()
                elif weights[name]:
                    losses[f"{kind}.{name}"] = term
                    total = total + weights[name] * term
        if self.l1:  # of weights of rank >= 2 only, as the decay
            weights_of_net = (p for p in self.net.parameters() if p.ndim >= 2 and p.requires_grad)
            losses["l1"] = torch.stack([p.abs().sum() for p in weights_of_net]).sum()
            total = total + self.l1 * losses["l1"]
        return losses | {"loss": total}

    def _capture_hook(self, name: str) -> Callable[..., None]:
        def record(module: nn.Module, _args: Any, output: Tensor) -> None:
            if self.net.training and self._inside:
                self._hooked[name] = output
                self._fired.add(("hook", name))

        return record

    def _gate_hook(
        self, kind: str, name: str, gate: Callable[[Tensor, Context], Tensor]
    ) -> Callable[..., Tensor | None]:
        def change(module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            if not self.net.training:
                return None
            self._fired.add((f"gate of {kind}", name))
            return self._apply_gate(kind, name, output, gate, self._group)

        return change

    def _apply_gate(
        self, kind: str, name: str, output: Tensor, gate: Callable[[Tensor, Context], Tensor], group: Sequence[View]
    ) -> Tensor:
        context = self.contexts[kind].sized(group[0].x.shape[2:])
        with naming(kind, f"gate at {name}"):
            if all(view.gated for view in group):
                return require_gated(kind, name, gate(output, context), output)
            parts = output.split([len(view.x) for view in group])
            pairs = zip(group, parts, strict=True)
            gated = [require_gated(kind, name, gate(f, context), f) if view.gated else f for view, f in pairs]
            return torch.cat(gated)

    def _enter_group(self, group: list[View], _gradient: Tensor) -> None:
        """Set the group whose features the backward reaches: what is recomputed from here on is of its views. Autograd goes back
        through one group after the other, the last first, since the nodes of a forward are newer than those of the one before."""
        self._group = group

    def _check_fired(self) -> None:
        if not self.net.training:
            return
        declared = {("hook", name) for name in self.attachments.hooked}
        declared |= {(f"gate of {kind}", name) for kind, name, _ in self.attachments.gates}
        for what, name in sorted(declared - self._fired):
            raise FgvcError(f"the {what} at {name!r} did not fire: this backbone's forward never calls that module")


def _pick_by_share(shares: Mapping[str, float], drawn: float) -> str | None:
    """Pick by `drawn`, uniform in [0,1): each kind has its share, divided by the sum of all where that is above 1."""
    drawn *= max(1.0, sum(shares.values()))
    for kind, share in shares.items():
        if drawn < share:
            return kind
        drawn -= share
    return None


def _checkpoint_activations(net: nn.Module) -> None:
    """Switch on timm's activation checkpointing. Raises FgvcError where the backbone has none."""
    try:
        as_classifier(net).set_grad_checkpointing(True)
    except (AssertionError, AttributeError, TypeError) as error:
        raise FgvcError(f"train.grad_checkpointing: timm can't checkpoint a {type(net).__name__}; set it to false") from error
