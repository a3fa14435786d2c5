"""Distillation: learn from the outputs of other networks for the same pixels.

By their softened probabilities (Hinton et al. 2015, arXiv:1503.02531), decoupled ones (DKD, Zhao et al., CVPR 2022,
arXiv:2203.08679), attention (AT, Zagoruyko & Komodakis, ICLR 2017, arXiv:1612.03928) or features (FitNets, Romero et al.,
ICLR 2015, arXiv:1412.6550); the formulas are in losses.py. After stripping nothing is left: teachers are outside of the net, and
the hints' regressors are branches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from fgvc.config.knots import ever, value_at
from fgvc.errors import FgvcError
from fgvc.models.class_maps import dominant
from fgvc.techniques.api import MAIN, EpochStart, Output, Technique
from fgvc.techniques.distill.ensemble import TeacherEnsemble
from fgvc.techniques.distill.losses import attention, decoupled, divergence, hint, softened
from fgvc.techniques.distill.settings import DistillSettings
from fgvc.techniques.plan import Context, Plan
from fgvc.techniques.teacher import Teacher


class Distill(Technique):
    """Distillation: `kd` = T^2 KL(q || p) or T^2 (alpha TCKD + beta NCKD), q the weighted mean of softmax(z_t / T), p =
    softmax(z_s / T)."""

    source: ClassVar[str] = (
        "Hinton et al. 2015, arXiv:1503.02531; DKD: Zhao et al., CVPR 2022, arXiv:2203.08679; AT: Zagoruyko & Komodakis, "
        "ICLR 2017, arXiv:1612.03928; hints: Romero et al., ICLR 2015, arXiv:1412.6550"
    )
    forwards: ClassVar[str] = "0 (and its teachers' own)"
    measures = ("teacher_accuracy",)

    def __init__(self, config: DistillSettings) -> None:
        self.config = config
        self.weights = {"kd": config.kd, "attention": config.attention, "hints": config.hints}
        self.teachers: list[Teacher] = []  # empty where a trained net is only rebuilt

    @override
    def setup(self, plan: Plan) -> None:
        """Open the teachers. Raises FgvcError where one can't teach, or none has the features that AT and hints need."""
        self.teachers = plan.teachers(self.config.teachers)
        self._ensemble = TeacherEnsemble(self.teachers, cache=self.config.cache, classes=plan.classes)
        for teacher in self.teachers:
            plan.note("; ".join([f"teacher {teacher.name}", *teacher.notes]))
            if teacher.size is not None:  # in whole eights of pixels, as images are rendered
                plan.render(max(8 * -(-theirs // 8) / ours for theirs, ours in zip(teacher.size, plan.size, strict=True)))
        feature_terms = [term for term in ("attention", "hints") if self.teachers and ever(self.weights[term])]
        if feature_terms and all(teacher.channels is None for teacher in self.teachers):
            raise FgvcError(
                f"techniques.distill.{feature_terms[0]}: {self.teachers[0].name} gives logits, no features; set "
                f"{feature_terms[0]} to 0, or give a teacher of kind run, timm or probe"
            )
        if "attention" in feature_terms and max(plan.map_shape[1:]) == 1:
            plan.note("the last map has one cell, whose attention (AT) says nothing: give larger images")
        if ever(self.config.hints):
            for number, teacher in enumerate(self.teachers):
                if teacher.channels is not None:
                    plan.add(f"hint{number}", nn.Conv2d(plan.map_shape[0], teacher.channels, 1))

    @override
    def before_epoch(self, start: EpochStart) -> None:
        self._ensemble.open(start)

    @override
    def losses(self, outputs: Mapping[str, Output], ctx: Context) -> dict[str, Tensor]:
        """Compute `kd`, `attention`, `hints`; measured: how often the teachers' mean is right on these images."""
        if not self.teachers:
            return {}
        main, config, terms = outputs[MAIN], self.config, {}
        weighted = {name for name, weight in self.weights.items() if value_at(weight, ctx.progress)}
        if "teacher_outputs" not in ctx.state:
            ctx.state["teacher_outputs"] = self._ensemble.outputs(main, ctx, features=bool(weighted - {"kd"}))
        teacher_outputs = ctx.state["teacher_outputs"]
        with torch.autocast(main.logits.device.type, enabled=False):
            shares = [teacher.weight for teacher in config.teachers]
            log_q = softened([output.logits for output in teacher_outputs], config.temperature, shares)
            if "kd" in weighted:
                log_p, target = softened([main.logits], config.temperature), main.view.target
                whole = len(target) == 1 and target[0][1] is None
                if config.method == "dkd" and whole:
                    kl = decoupled(log_p, log_q, target[0][0], alpha=config.alpha, beta=config.beta)
                else:
                    kl = divergence(log_p, log_q)
                terms["kd"] = config.temperature**2 * kl
            features = {number: o.features for number, o in enumerate(teacher_outputs) if o.features is not None}
            if "attention" in weighted:
                f = ctx.grid(main.features).float()
                terms["attention"] = torch.stack([attention(f, theirs) for theirs in features.values()]).mean()
            if "hints" in weighted:
                regressors = {number: cast("nn.Conv2d", ctx.branches[f"hint{number}"]) for number in features}
                hints = [hint(regressors[n], ctx.grid(main.features), theirs) for n, theirs in features.items()]
                terms["hints"] = torch.stack(hints).mean()
        right = log_q.argmax(1) == dominant(main.view.target)
        return terms | {"teacher_accuracy": right.float().mean()}
