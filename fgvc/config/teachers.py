"""Settings of teachers: networks whose outputs a net learns from (`fgvc.techniques.teacher`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from fgvc.config.images import Spread, Triple, possible_mean
from fgvc.config.section import Section, Size


class _Weighted(Section):
    weight: float = Field(1.0, gt=0, description="share in the mean of several teachers, in units of the others'")


class _Fed(_Weighted):
    """A net with an input of its own."""

    kwargs: dict[str, Any] = Field(default_factory=dict, description="passed to timm.create_model")
    size: Size | None = Field(
        None,
        description="of its input: one number for a square, or [height, width]; default: what timm's weights were trained at, or "
        "the file's own",
    )
    mean: Triple | None = Field(None, description="of its input, RGB in [0,1]; default: as model.weights says")
    std: Spread | None = Field(None, description="likewise")

    @field_validator("mean")
    @classmethod
    def _within_range(cls, mean: Triple | None) -> Triple | None:
        return mean if mean is None else possible_mean(mean, 1)


def _trained(weights: str) -> str:
    if weights == "none":
        raise ValueError("a teacher of random weights has nothing to teach; give a file")
    return weights


Trained = Annotated[str, AfterValidator(_trained)]


class TimmTeacher(_Fed):
    """Any timm classifier, fine-tuned elsewhere; its outputs must be this run's classes in this run's order."""

    kind: Literal["timm"] = "timm"
    backbone: str = Field(description="by timm's name")
    weights: Trained = Field(
        description="as model.weights: a file, mostly; its head must have this run's number of outputs"
    )


class ProbeTeacher(_Fed):
    """A pretrained net, timm's or a deployed file's, whose head is fitted before the first step, by logistic regression, to the
    training images."""

    kind: Literal["probe"] = "probe"
    backbone: str | None = Field(None, description="by timm's name. This or onnx")
    onnx: Path | None = Field(
        None,
        description="a deployed .onnx file, such as this run's own, at a larger size; fed as its preprocess.json says, else as "
        "this run",
    )
    weights: Trained | None = Field(
        None, description="as model.weights, of whatever classes: their own head is dropped. A file's are its own"
    )

    @model_validator(mode="after")
    def _one_net(self) -> ProbeTeacher:
        if self.onnx is None and (self.backbone is None or self.weights is None):
            raise ValueError("give backbone (a net of timm, by name) and weights, or onnx (a deployed file)")
        if self.onnx is not None and (self.backbone is not None or self.weights is not None or self.kwargs):
            raise ValueError("onnx: the file has its net and its weights; leave out backbone, weights and kwargs")
        return self


class RunTeacher(_Weighted):
    """An earlier run of fgvc on the same classes."""

    kind: Literal["run"] = "run"
    path: Path = Field(description="its folder")
    select: Literal["last", "best", "ema", "swa", "start"] | None = Field(
        None, description="which weights; default: those it ships"
    )


class BundleTeacher(_Weighted):
    """An exported bundle, or a deployed .onnx file, on onnxruntime: on the CPU, and logits alone."""

    kind: Literal["bundle"] = "bundle"
    path: Path = Field(description="its folder; or the file, with its labels and preprocess.json beside it")


class EmaTeacher(_Weighted):
    """The moving average of the student's weights."""

    kind: Literal["ema"] = "ema"


AnyTeacher = Annotated[
    TimmTeacher | ProbeTeacher | RunTeacher | BundleTeacher | EmaTeacher, Field(discriminator="kind")
]
