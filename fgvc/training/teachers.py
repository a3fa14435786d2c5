"""Loading of a run's teachers: where each comes from, and checks that it can teach these classes."""

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
from fgvc.config.teachers import AnyTeacher, BundleTeacher, EmaTeacher, ProbeTeacher, RunTeacher, TimmTeacher
from fgvc.data.index import ImageIndex
from fgvc.errors import FgvcError
from fgvc.io.names import some
from fgvc.models.backbone import deployed, feature_map, memory_format, plain_model, refuse_size, zeros_through
from fgvc.models.net import shipped_net
from fgvc.models.onnxnet.classes import change_classes
from fgvc.models.onnxnet.net import open_onnx
from fgvc.models.probe import linear_head, require_linear_head, zero_head
from fgvc.models.weights import Weights, load_weights, unlikely
from fgvc.reparam.plain import strip_to
from fgvc.runs.checkpoint import read_progress
from fgvc.runs.deployed import record_of
from fgvc.runs.images import held_out_overlap
from fgvc.runs.loaded import load_run
from fgvc.runtime.bundle import load_bundle
from fgvc.runtime.engine import OnnxSession, available_cpus, refuse_misfit, session_of
from fgvc.runtime.stack import stack_of
from fgvc.techniques.plan import Attachments
from fgvc.techniques.teacher import (
    ProbedNet,
    Teacher,
    TeacherOutput,
    conversion,
    digest,
    in_order,
    teacher_output,
)

TeacherUse = Literal["to teach", "to time", "not"]
"""Purpose of loading teachers: to time a step, one whose head would be fitted has random weights and needs no file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherLoader:
    """Loader of the teachers of one run's student. Each process loads its own."""

    classes: tuple[str, ...]  # the student's
    device: torch.device
    averaged: bool  # whether the student has a moving average
    preprocess: Preprocess | None = None  # of a run that goes on
    out: Path | None = None  # the student's folder
    index: ImageIndex | None = None  # the student's images
    timed: bool = False  # see TeacherUse

    def __call__(self, settings: AnyTeacher, attachments: Attachments, student: Preprocess) -> Teacher:
        """Load one teacher. `student`: the preprocessing that the student's weights need. Raises FgvcError for a teacher that is
        missing, does not know the student's classes, or has no trained head."""
        student = self.preprocess or student
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # or the student's own branches would start with other weights
            match settings:
                case EmaTeacher():
                    return self._average(attachments)
                case TimmTeacher():
                    return self._timm(settings, student)
                case ProbeTeacher():
                    return self._probe(settings, student)
                case RunTeacher():
                    return self._run(settings, student)
                case BundleTeacher():
                    return self._bundle(settings, student)

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

    def _timm(self, settings: TimmTeacher, student: Preprocess) -> Teacher:
        loaded = self._load_timm(settings, student)
        if fresh := [key for key in loaded.weights.fresh if not key.endswith("num_batches_tracked")]:
            raise FgvcError(
                f"{loaded.weights.origin}: its head does not have {len(self.classes)} outputs, one for each class of this run; "
                f"a teacher must be trained on these classes ({', '.join(fresh[:2])}), or be of kind: probe"
            )
        return self._from_timm(loaded, student, name=f"{settings.backbone} of {loaded.weights.origin}")

    def _probe(self, settings: ProbeTeacher, student: Preprocess) -> Teacher:
        from_file = settings.onnx is not None
        loaded = self._load_file(settings, student) if from_file else self._load_timm(settings, student)
        refuse_size(loaded.net, loaded.spec.size, len(self.classes), loaded.model.name)
        way = "take another net, or one that was trained on these classes (kind: timm, run or bundle)"
        require_linear_head(loaded.net, loaded.spec.size, loaded.model.name, way=way)
        last = set(map(id, linear_head(loaded.net).parameters()))
        rest = {name for name, value in loaded.net.named_parameters() if id(value) not in last}
        if missing := [name for name in loaded.weights.fresh if name in rest]:
            raise FgvcError(f"{loaded.weights.origin}: lacks what comes before the last layer: {some(missing)}")
        zero_head(loaded.net)  # that of the weights is of other classes, or random
        origin = digest(loaded.net, loaded.model.name, loaded.model.kwargs, loaded.spec.model_dump())
        name = f"{loaded.model.name} of {loaded.weights.origin}, frozen, its head fitted"
        return self._from_timm(loaded, student, name=name, origin=origin)

    def _load_file(self, settings: ProbeTeacher, student: Preprocess) -> _Loaded:
        assert settings.onnx is not None
        path = settings.onnx.expanduser()
        if not path.is_file():
            raise FgvcError(f"{path}: no such file")
        model, stated = Model(onnx=path), stack_of(path).preprocess
        net = open_onnx(path, settings.size, output=None if stated is None else stated.output, resized=True)
        if net.num_classes != len(self.classes):
            change_classes(net, len(self.classes))
        size = settings.size or tuple(net.pretrained_cfg["input_size"][1:])
        same = {key: getattr(stated or student, key) for key in ("mean", "std", "input_range", "channel_order")}
        own = {key: value for key in ("mean", "std") if (value := getattr(settings, key)) is not None}
        spec = student.model_copy(update=same | own | {"size": size})
        return _Loaded(net, model, load_weights(net, model), spec)

    def _load_timm(self, settings: TimmTeacher | ProbeTeacher, student: Preprocess) -> _Loaded:
        assert settings.backbone is not None
        weights_of = "none" if self.timed and settings.kind == "probe" else settings.weights
        model = Model(backbone=settings.backbone, kwargs=settings.kwargs, weights=weights_of)
        net = plain_model(settings.backbone, len(self.classes), settings.kwargs)
        weights = load_weights(net, model, stated=[key for key in ("mean", "std") if getattr(settings, key) is not None])
        size = settings.size or tuple(net.pretrained_cfg["input_size"][1:])  # type: ignore[index]
        spec = student.model_copy(
            update={
                "mean": settings.mean or weights.mean,
                "std": settings.std or weights.std,
                "input_range": 1,
                "channel_order": "rgb",
                "size": size,
            }
        )
        return _Loaded(net, model, weights, spec)

    def _from_timm(self, loaded: _Loaded, student: Preprocess, *, name: str, origin: str | None = None) -> Teacher:
        doubts = [*loaded.weights.doubts, *unlikely(loaded.spec, loaded.weights)]
        run = run_of(Path(loaded.model.weights).expanduser())
        if run is not None and self.index is not None and (overlap := held_out_overlap(run, self.index)):
            doubts.append(f"it was trained on {overlap} of the images that this run validates or tests on")
        notes, order = tuple(f"WARNING: {doubt}" for doubt in doubts), list(range(len(self.classes)))
        return self._from_net(loaded.net, loaded.model, student, loaded.spec, order, name=name, notes=notes, origin=origin)

    def _run(self, settings: RunTeacher, student: Preprocess) -> Teacher:
        if self.out is not None and settings.path.resolve() == self.out.resolve():
            raise FgvcError(f"{settings.path}: is this run's own folder; kind: ema learns from its own average")
        run = load_run(settings.path, settings.select)
        recipe, labels = run.recipe, run.classes
        order = in_order(labels, self.classes, where=str(settings.path))
        smoothing, warnings = recipe.loss.label_smoothing, []
        if smoothing:
            warnings.append(
                f"WARNING: it was trained with loss.label_smoothing {smoothing:g}, which makes a worse teacher"
            )
        if not read_progress(settings.path / "ckpt").finished:
            warnings.append("WARNING: its training is not finished")
        if self.index is not None and (overlap := held_out_overlap(settings.path, self.index)):
            warnings.append(f"WARNING: it was trained on {overlap} of the images that this run validates or tests on")
        # As it would ship: re-parameterised blocks are folded, and cost nothing.
        net = strip_to(shipped_net(recipe.model, len(labels), recipe.image.size), run.step.net)
        return self._from_net(
            net,
            recipe.model,
            student,
            run.preprocess,
            order,
            name=f"{settings.path} ({recipe.model.name}, {run.select})",
            notes=tuple(warnings),
        )

    def _from_net(
        self,
        net: nn.Module,
        model: Model,
        student: Preprocess,
        spec: Preprocess,
        order: list[int],
        *,
        name: str,
        notes: tuple[str, ...],
        origin: str | None = None,
    ) -> Teacher:
        """Make the teacher of a net. `origin`: of a net whose head is still to be fitted, its digest before that."""
        net = deployed(net).requires_grad_(False)
        channels = _channels(net, spec.size)  # and that the net takes the size
        identity = partial(digest, net, model.name, model.kwargs, spec.model_dump(), order)
        layout = memory_format(net)
        net.to(self.device).to(memory_format=layout)

        def answer(x: Tensor) -> TeacherOutput:
            output = teacher_output(net, x.contiguous(memory_format=layout), maps=channels is not None)
            return TeacherOutput(output.logits[:, order], output.features)

        return Teacher(
            name=f"{name}, {spec.size[0]} x {spec.size[1]} px",
            forward=answer,
            size=spec.size,
            channels=channels,
            convert=conversion(student, spec),
            identity=cache(identity) if origin is None else identity,
            notes=notes,
            probed=None if origin is None else ProbedNet(net, spec, origin),
        )

    def _bundle(self, settings: BundleTeacher, student: Preprocess) -> Teacher:
        # It computes while torch waits: as many threads as torch has, which torchrun keeps down, within the CPUs allowed.
        threads, path = min(torch.get_num_threads(), available_cpus()), settings.path
        if path.is_file():
            spec, labels, session = _deployed_file(path, threads)
            content = repr(record_of(path)["sha256"])
        else:
            bundle = load_bundle(path)
            spec, labels, session = bundle.preprocess, bundle.labels, session_of(bundle, bundle.model, threads=threads)
            content = bundle.files["model.onnx"]
        order = in_order(labels, self.classes, where=str(path))
        facts = f"{content} {spec.model_dump()} {order}"

        def answer(x: Tensor) -> TeacherOutput:
            logits = torch.from_numpy(session.logits(x.contiguous().cpu().numpy()))
            return TeacherOutput(logits[:, order].to(x.device), None)

        return Teacher(
            name=f"{path} ({'a file' if path.is_file() else 'a bundle'}), {spec.size[0]} x {spec.size[1]} px",
            forward=answer,
            size=spec.size,
            channels=None,
            convert=conversion(student, spec),
            identity=lambda: hashlib.sha256(facts.encode()).hexdigest(),
        )


def _deployed_file(path: Path, threads: int) -> tuple[Preprocess, tuple[str, ...], OnnxSession]:
    """Preprocessing, classes and session of a deployed file. Raises FgvcError where nothing states the first two."""
    stack = stack_of(path)
    if stack.labels is None or stack.preprocess is None:
        lacks = "which classes it has" if stack.labels is None else "how it is fed"
        raise FgvcError(f"{path}: nothing says {lacks}: put labels.txt and preprocess.json beside it; `fgvc preprocess` helps")
    session = stack.session(threads=threads)
    refuse_misfit(session.file, stack.preprocess, model=path, where=path)
    return stack.preprocess, stack.labels, session


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A net with its weights and the preprocessing of its input."""

    net: nn.Module
    model: Model
    weights: Weights
    spec: Preprocess


def _channels(net: nn.Module, size: tuple[int, int]) -> int | None:
    """Channels of the last feature map; None where the features are no map. Raises FgvcError where the net refuses the size."""
    try:
        features, _ = zeros_through(net, size)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise FgvcError(f"{type(net).__name__} can't take images of {size[0]} x {size[1]}: {error}") from error
    try:
        return int(feature_map(net, features, size).shape[1])
    except FgvcError:
        return None
