"""Opening the teachers of a run: where each comes from, and that it can teach these classes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from fgvc.config.images import Preprocess
from fgvc.config.models import Model, run_of
from fgvc.data.index import ImageIndex
from fgvc.errors import FgvcError
from fgvc.io.names import some
from fgvc.models.backbone import deployed, feature_map, memory_format, plain_model, refuse_size, zeros_through
from fgvc.models.probe import linear_head, refuse_unprobed, zero_head
from fgvc.models.weights import Weights, load_weights, unlikely
from fgvc.reparam.plain import strip
from fgvc.runs.checkpoint import read_progress
from fgvc.runs.images import learnt_of_aside
from fgvc.runs.loaded import load_run
from fgvc.runtime.bundle import load_bundle
from fgvc.runtime.engine import Engine, available_cpus
from fgvc.techniques.distill.settings import (
    AnyTeacher,
    BundleTeacher,
    EmaTeacher,
    ProbeTeacher,
    RunTeacher,
    TimmTeacher,
)
from fgvc.techniques.distill.teacher import (
    ProbedNet,
    Teacher,
    TeacherOutput,
    conversion,
    digest,
    in_order,
    teacher_output,
)
from fgvc.techniques.plan import Attachments

Opened = Literal["to teach", "to time", "not"]
"""What for teachers are opened: to time a step, one whose head would be fitted has random weights and needs no file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherLoader:
    """Opens what the student of one run is to learn from. Each process opens its own."""

    classes: tuple[str, ...]  # the student's
    device: torch.device
    averaged: bool  # whether the student has a moving average
    preprocess: Preprocess | None = None  # of a run that goes on
    out: Path | None = None  # the student's folder
    index: ImageIndex | None = None  # the student's images
    timed: bool = False  # see Opened

    def __call__(self, wanted: AnyTeacher, attachments: Attachments, student: Preprocess) -> Teacher:
        """`student`: the preprocessing that its weights ask for. Raises FgvcError for a teacher that is not there, does not
        know the student's classes, or has no trained head."""
        student = self.preprocess or student
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # or the student's own branches would start with other weights
            match wanted:
                case EmaTeacher():
                    return self._average(attachments)
                case TimmTeacher():
                    return self._timm(wanted, student)
                case ProbeTeacher():
                    return self._probe(wanted, student)
                case RunTeacher():
                    return self._run(wanted, student)
                case BundleTeacher():
                    return self._bundle(wanted, student)

    def _average(self, attachments: Attachments) -> Teacher:
        if not self.averaged:
            raise FgvcError("kind: ema is the moving average, and there is no `ema:` section; give ema.decay=0.99")
        channels = _channels(attachments.net, attachments.size)
        average = attachments.average  # filled once the average is made, and changed in place by every step
        return Teacher(
            name="its own moving average",
            forward=lambda x: teacher_output(average[0], x, maps=channels is not None),
            size=None,
            channels=channels,
            convert=lambda x: x,
        )

    def _timm(self, wanted: TimmTeacher, student: Preprocess) -> Teacher:
        one = self._loaded(wanted, student)
        if fresh := [key for key in one.weights.fresh if not key.endswith("num_batches_tracked")]:
            raise FgvcError(
                f"{one.weights.origin}: its head does not have {len(self.classes)} outputs, one for each class of this run; "
                f"a teacher must be trained on these classes ({', '.join(fresh[:2])}), or be of kind: probe"
            )
        return self._of_timm(one, student, name=f"{wanted.backbone} of {one.weights.origin}")

    def _probe(self, wanted: ProbeTeacher, student: Preprocess) -> Teacher:
        if self.timed:
            wanted = wanted.model_copy(update={"weights": "none"})
        one = self._loaded(wanted, student)
        refuse_size(one.net, one.spec.size, len(self.classes), wanted.backbone)
        refuse_unprobed(one.net, one.spec.size, wanted.backbone)
        last = set(map(id, linear_head(one.net).parameters()))
        rest = {name for name, value in one.net.named_parameters() if id(value) not in last}
        if lost := [name for name in one.weights.fresh if name in rest]:
            raise FgvcError(f"{one.weights.origin}: lacks what comes before the last layer: {some(lost)}")
        zero_head(one.net)  # that of the weights is of other classes, or random
        origin = digest(one.net, one.model.backbone, one.model.kwargs, one.spec.model_dump())
        name = f"{wanted.backbone} of {one.weights.origin}, frozen, its head fitted"
        return self._of_timm(one, student, name=name, origin=origin)

    def _loaded(self, wanted: TimmTeacher | ProbeTeacher, student: Preprocess) -> _Loaded:
        model = Model(backbone=wanted.backbone, kwargs=wanted.kwargs, weights=wanted.weights)
        net = plain_model(wanted.backbone, len(self.classes), wanted.kwargs)
        weights = load_weights(net, model, stated=[key for key in ("mean", "std") if getattr(wanted, key) is not None])
        size = wanted.size or tuple(net.pretrained_cfg["input_size"][1:])  # type: ignore[index]
        own = student.model_copy(
            update={
                "mean": wanted.mean or weights.mean,
                "std": wanted.std or weights.std,
                "input_range": 1,
                "channel_order": "rgb",
                "size": size,
            }
        )
        return _Loaded(net, model, weights, own)

    def _of_timm(self, one: _Loaded, student: Preprocess, *, name: str, origin: str | None = None) -> Teacher:
        doubts = [*one.weights.doubts, *unlikely(one.spec, one.weights)]
        run = run_of(Path(one.model.weights).expanduser())
        if run is not None and self.index is not None and (seen := learnt_of_aside(run, self.index)):
            doubts.append(f"it was trained on {seen} of the images that this run validates or tests on")
        notes, order = tuple(f"WARNING: {doubt}" for doubt in doubts), list(range(len(self.classes)))
        return self._of_net(one.net, one.model, student, one.spec, order, name=name, notes=notes, origin=origin)

    def _run(self, wanted: RunTeacher, student: Preprocess) -> Teacher:
        if self.out is not None and wanted.path.resolve() == self.out.resolve():
            raise FgvcError(f"{wanted.path}: is this run's own folder; kind: ema learns from its own average")
        loaded = load_run(wanted.path, wanted.select)
        recipe, labels = loaded.recipe, loaded.classes
        order = in_order(labels, self.classes, where=str(wanted.path))
        smoothing, warnings = recipe.loss.label_smoothing, []
        if smoothing:
            warnings.append(
                f"WARNING: it was trained with loss.label_smoothing {smoothing:g}, which makes a worse teacher"
            )
        if not read_progress(wanted.path / "ckpt").finished:
            warnings.append("WARNING: its training is not finished")
        if self.index is not None and (seen := learnt_of_aside(wanted.path, self.index)):
            warnings.append(f"WARNING: it was trained on {seen} of the images that this run validates or tests on")
        # As it would ship: re-parameterised blocks are folded, and cost nothing.
        net = strip(loaded.step.net, backbone=recipe.model.backbone, num_classes=len(labels), kwargs=recipe.model.kwargs)
        return self._of_net(
            net,
            recipe.model,
            student,
            loaded.preprocess,
            order,
            name=f"{wanted.path} ({recipe.model.backbone}, {loaded.select})",
            notes=tuple(warnings),
        )

    def _of_net(
        self,
        net: nn.Module,
        model: Model,
        student: Preprocess,
        own: Preprocess,
        order: list[int],
        *,
        name: str,
        notes: tuple[str, ...],
        origin: str | None = None,
    ) -> Teacher:
        """`origin`: of a net whose head is still to be fitted, what it was before that."""
        net = deployed(net).requires_grad_(False)
        channels = _channels(net, own.size)  # and that the net takes the size
        identity = partial(digest, net, model.backbone, model.kwargs, own.model_dump(), order)
        layout = memory_format(net)
        net.to(self.device).to(memory_format=layout)

        def answer(x: Tensor) -> TeacherOutput:
            said = teacher_output(net, x.contiguous(memory_format=layout), maps=channels is not None)
            return TeacherOutput(said.logits[:, order], said.features)

        return Teacher(
            name=f"{name}, {own.size[0]} x {own.size[1]} px",
            forward=answer,
            size=own.size,
            channels=channels,
            convert=conversion(student, own),
            identity=cache(identity) if origin is None else identity,
            notes=notes,
            probed=None if origin is None else ProbedNet(net, own, origin),
        )

    def _bundle(self, wanted: BundleTeacher, student: Preprocess) -> Teacher:
        bundle = load_bundle(wanted.path)
        own, order = bundle.preprocess, in_order(bundle.labels, self.classes, where=str(wanted.path))
        # It computes while torch waits: as many threads as torch has, which torchrun keeps down, within the CPUs allowed.
        engine = Engine(bundle, threads=min(torch.get_num_threads(), available_cpus()))
        facts = f"{bundle.files['model.onnx']} {own.model_dump()} {order}"

        def answer(x: Tensor) -> TeacherOutput:
            logits = torch.from_numpy(engine.logits(x.contiguous().cpu().numpy()))
            return TeacherOutput(logits[:, order].to(x.device), None)

        return Teacher(
            name=f"{wanted.path} (a bundle), {own.size[0]} x {own.size[1]} px",
            forward=answer,
            size=own.size,
            channels=None,
            convert=conversion(student, own),
            identity=lambda: hashlib.sha256(facts.encode()).hexdigest(),
        )


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A timm net with its weights, and the preprocessing of its input."""

    net: nn.Module
    model: Model
    weights: Weights
    spec: Preprocess


def _channels(net: nn.Module, size: tuple[int, int]) -> int | None:
    """Of the last feature map; None where the features are no map. Raises FgvcError where the net can't take the size."""
    try:
        features, _ = zeros_through(net, size)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise FgvcError(f"{type(net).__name__} can't take images of {size[0]} x {size[1]}: {error}") from error
    try:
        return int(feature_map(net, features, size).shape[1])
    except FgvcError:
        return None
