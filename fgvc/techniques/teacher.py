"""Teachers: networks whose outputs a net learns from.

A teacher is no module: it is in no optimizer, no average and no DDP, and in a checkpoint only by a head that was fitted for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.config.images import Preprocess
from fgvc.errors import FgvcError
from fgvc.models.backbone import feature_map
from fgvc.models.class_maps import evaluating
from fgvc.models.classifier import as_classifier
from fgvc.models.probe import linear_head


@dataclass(frozen=True, slots=True)
class TeacherOutput:
    """Output of a teacher for a batch, without gradient."""

    logits: Tensor  # (B,K) float32, in the order of the student's classes
    features: Tensor | None  # (B,C,h,w) float32: its last map, where it has one


@dataclass(slots=True)
class ProbedNet:
    """Teacher net whose linear head is fitted when a run begins, and saved in its checkpoints from then on."""

    net: nn.Module  # in eval mode, on the run's device
    spec: Preprocess  # of its input
    origin: str  # SHA-256 of the net without its head, and of the preprocessing
    fit: Mapping[str, Any] | None = None  # how the head was fitted; None: it has not been

    def state(self) -> dict[str, Any]:
        """State for a checkpoint. Raises FgvcError where the head has not been fitted."""
        if self.fit is None:
            raise FgvcError("a teacher's head was never fitted")
        head = linear_head(self.net).state_dict()
        return {"origin": self.origin, "fit": dict(self.fit), "head": {key: value.cpu() for key, value in head.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load the head from a checkpoint. Raises ValueError where it was fitted to another net."""
        if state["origin"] != self.origin:
            raise ValueError(
                "a teacher is not the net that its head was fitted to when the run began: restore its weights file, and what "
                "lies beside it"
            )
        linear_head(self.net).load_state_dict(state["head"])
        self.fit = state["fit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """A teacher network, in eval mode and in float32."""

    name: str  # for people
    forward: Callable[[Tensor], TeacherOutput]  # of images (B,3,H,W) in the teacher's own normalisation
    size: tuple[int, int] | None  # height and width that it takes; None: the student's
    channels: int | None  # of its features; None: logits alone
    convert: Callable[[Tensor], Tensor]  # from the student's normalisation to its own
    identity: Callable[[], str] | None = None  # SHA-256 of all that its outputs depend on; None: they change
    notes: tuple[str, ...] = ()
    probed: ProbedNet | None = None  # where its head is fitted when a run begins

    def __call__(self, x: Tensor, finest: Tensor | None = None) -> TeacherOutput:
        """Output for `x` (B,3,H,W) in the student's normalisation; `finest`: the same pixels as they were rendered, where nothing
        has changed them since. A teacher of another size gets `finest`, else x, resized by an antialiased bicubic."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            source, x = x if finest is None else finest, x.float()
            if self.size is not None and tuple(x.shape[2:]) != self.size:
                x = source.float()
                if tuple(x.shape[2:]) != self.size:
                    x = F.interpolate(x, self.size, mode="bicubic", antialias=True)
            return self.forward(self.convert(x))


def conversion(student: Preprocess, teacher: Preprocess) -> Callable[[Tensor], Tensor]:
    """Function from images (B,3,H,W) in the `student`'s normalisation to the `teacher`'s; of equal ones the identity."""
    formats = [(spec.mean, spec.std, spec.input_range, spec.channel_order) for spec in (student, teacher)]
    if formats[0] == formats[1]:
        return lambda x: x
    flip = student.channel_order != teacher.channel_order
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (student.mean, student.std))
    mean, std = (mean.flip(0), std.flip(0)) if flip else (mean, std)
    to_mean, to_std = (torch.tensor(values, dtype=torch.float64) for values in (teacher.mean, teacher.std))
    unit = teacher.input_range / student.input_range
    scale, shift = unit * std / to_std, (unit * mean - to_mean) / to_std

    def convert(x: Tensor) -> Tensor:
        x = x.flip(1) if flip else x
        return x * scale.to(x).view(3, 1, 1) + shift.to(x).view(3, 1, 1)

    return convert


def teacher_output(net: nn.Module, x: Tensor, *, maps: bool) -> TeacherOutput:
    """Logits of a timm net and, with `maps`, its last feature map; its modules stay in the mode that they were in."""
    with evaluating(net):
        features = as_classifier(net).forward_features(x)
        logits = as_classifier(net).forward_head(features)
    return TeacherOutput(logits.float(), feature_map(net, features, x.shape[2:]).float() if maps else None)


def in_order(theirs: tuple[str, ...], ours: tuple[str, ...], *, where: str) -> list[int]:
    """Position of each of our classes among theirs. Raises FgvcError naming the first differences."""
    if set(theirs) != set(ours) or len(theirs) != len(ours):
        lacks, more = (sorted(set(a) - set(b)) for a, b in ((ours, theirs), (theirs, ours)))
        differences = [
            f"{label} {', '.join(map(repr, names[:3]))}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for label, names in (("it lacks", lacks), ("it has besides", more))
            if names
        ]
        raise FgvcError(
            f"{where}: its {len(theirs)} classes are not this run's {len(ours)}: {'; '.join(differences)}. "
            "A teacher must know the same classes by the same names"
        )
    place = {name: at for at, name in enumerate(theirs)}
    return [place[name] for name in ours]


def digest(net: nn.Module, *more: object) -> str:
    """SHA-256 of a net's weights, and of whatever else its outputs depend on."""
    sha256 = hashlib.sha256(repr(more).encode())
    for name, value in net.state_dict().items():
        sha256.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha256.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha256.hexdigest()
