"""Settings of distillation."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator
from typing_extensions import override

from fgvc.config.knots import Scheduled
from fgvc.config.teachers import AnyTeacher, EmaTeacher
from fgvc.config.technique import Requires, TechniqueSettings


class DistillSettings(TechniqueSettings):
    """Learn from the outputs of teachers for the pixels of the main view."""

    technique: ClassVar[str] = "fgvc.techniques.distill.technique:Distill"

    kind: Literal["distill"] = "distill"
    teachers: tuple[AnyTeacher, ...] = Field(
        (EmaTeacher(),),
        description="any of {kind: run, path: RUN}, {kind: bundle, path: BUNDLE or deployed.onnx}, {kind: timm, backbone: NAME, "
        "weights: FILE} (trained on these classes), {kind: probe, backbone: NAME, weights: FILE, size: 224} (pretrained alone: "
        "before the first step a head is fitted to its frozen features of the training images), {kind: probe, onnx: "
        "deployed.onnx, size: 224} (the same of a deployed file's net), {kind: ema} (the run's own average); of several the "
        "softened probabilities are averaged by their `weight`. A larger one sees the larger render where nothing mixes or "
        "erases the images, else the student's pixels enlarged",
    )
    method: Literal["kd", "dkd"] = Field(
        "kd", description="dkd needs whole labels: a step whose labels are mixed falls back to kd"
    )
    kd: Scheduled = Field(
        1.0,
        description="weight of T^2 KL(teacher || student), of either method. A loss of a CE + b KD is CE + (b/a) KD here and a "
        "times the rate: 0.1 and 0.9 are kd: 9. A warm-up is knots such as [[0, 0], [0.1, 1]]",
    )
    temperature: float = Field(4.0, gt=0, description="T, of both softmaxes; of dkd on ImageNet its authors take 1")
    alpha: float = Field(1.0, ge=0, description="of dkd: weight of target against all the rest")
    beta: float = Field(
        8.0, ge=0, description="of dkd: weight of the classes among the rest. 8 is its authors' for CIFAR-100; ImageNet: 0.5"
    )
    attention: Scheduled = Field(
        0.0, description="weight of 1000 mean (a_s - a_t)^2 of the last maps' attention (AT), squared, then pooled to one size"
    )
    hints: Scheduled = Field(
        0.0, description="weight of mean (r(f_s) - f_t)^2 of the last maps, r a learned 1x1 convolution "
        "(mdistiller, a library, has 100)"
    )
    cache: Path | None = Field(
        None,
        description="folder where teachers' logits are kept (4 (K + 7) bytes an image and epoch), for later runs with the same "
        "teacher, images, augmentation and seed; used in steps where nothing mixes or erases the images",
    )

    @field_validator("teachers")
    @classmethod
    def _some(cls, teachers: tuple[AnyTeacher, ...]) -> tuple[AnyTeacher, ...]:
        if not teachers:
            raise ValueError("give at least one, for example [{kind: run, path: runs/large}], or [{kind: ema}]")
        return teachers

    @property
    @override
    def requires(self) -> Requires:
        return Requires(average=any(isinstance(teacher, EmaTeacher) for teacher in self.teachers))
