"""The recipe of a run: all settings that decide its result, as one frozen, validated tree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from fgvc.config.data import Augment, AutoData, CsvData, CubData, FolderData, HfData, NamedData
from fgvc.config.exporting import Export
from fgvc.config.images import Deploy, Image
from fgvc.config.knots import knot_positions
from fgvc.config.models import Loss, Model, run_of
from fgvc.config.section import Section
from fgvc.config.technique import Mixing
from fgvc.config.techniques import Techniques, enabled_techniques
from fgvc.config.training import Checkpoint, Ema, Log, Optim, Swa, Train
from fgvc.io.display import Display

Shipped = Literal["last", "best", "ema", "swa"]
Selected = Literal[Shipped, "start", "floor"]
CLIP = 1.0  # norm of the gradients at frozen statistics, whose first ones can be 40
END = 1 - 1e-9  # of a run: its last step lies before 1
PRETRAINED: Mapping[str, Mapping[str, Any]] = {
    "model": {"head": "probe", "batch_norm": "frozen"},
    "optim": {"name": "adamw", "lr": 3e-4, "weight_decay": 0.01},
}


def with_weight_defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's tree with the defaults for pretrained first weights filled in, if it has these; docs/floor.md says why.

    Random weights have the defaults of the settings themselves. An optimizer that the recipe names is kept, with the settings'
    own defaults; a rate alone is the default optimizer's."""
    model, optim = tree.get("model"), tree.get("optim", {})
    if not isinstance(model, Mapping) or not isinstance(optim, Mapping):
        return dict(tree)
    weights = str(model.get("weights", "none" if model.get("onnx") is None else "deployed"))
    if weights == "none":
        return dict(tree)
    fitted = (weights == "deployed" and model.get("classes") != "change") or run_of(Path(weights).expanduser()) is not None
    head = "timm" if fitted else PRETRAINED["model"]["head"]
    optimizer = {} if "name" in optim else PRETRAINED["optim"]
    return {
        **tree,
        "model": {**PRETRAINED["model"], "head": head, **model},
        "optim": {"clip_grad": CLIP, **optimizer, **optim},
    }


class Recipe(Display, Section):
    """A run of fgvc. Every key can be overridden on the command line as section.key=value."""

    has_base: ClassVar[bool] = True

    data: Annotated[
        AutoData | CubData | FolderData | CsvData | NamedData | HfData,
        Field(discriminator="kind", description="the labelled images"),
    ]
    image: Image = Field(Image(), description="the network's input")
    deploy: Deploy = Field(Deploy(), description="preprocessing of the deployed stack")
    augment: Augment = Field(Augment(), description="what training does to each image")
    model: Model = Field(description="the deployed network")
    train: Train = Field(Train(), description="budget, seed, device")
    optim: Optim = Field(Optim(), description="optimizer and schedule")
    loss: Loss = Field(Loss(), description="classification loss")
    ema: Ema | None = Field(None, description="moving average of the weights; null: off")
    swa: Swa | None = Field(None, description="mean of the weights at the last epochs' ends; null: off")
    techniques: Techniques = Field(Techniques(), description="technique -> settings")
    select: Shipped | None = Field(
        None,
        description="which weights eval, export and predict use; best: of the start and all epochs' ends the best by validation, "
        "the average where there is one. Default: best where there is a validation split, else ema or swa, else last; ema where "
        "a deployed file has seen too much for any image to choose",
    )
    select_by: Literal["top1", "top5", "macro_f1", "balanced_accuracy", "ece", "loss"] = Field(
        "top1", description="the validation score by which a checkpoint is the best (ece and loss: the smallest)"
    )
    checkpoint: Checkpoint = Field(Checkpoint(), description="how often to save")
    cache: Literal["none", "disk"] = Field(
        "none", description="disk: decode every training image once, into one memory map"
    )
    cache_dir: Path | None = Field(None, description="default: $XDG_CACHE_HOME/fgvc or ~/.cache/fgvc")
    export: Export = Field(Export(), description="how the ONNX file is written")
    log: Log = Field(Log(), description="how often to report")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        data = tree.get("data")
        tree = {**tree, "data": {"kind": "auto", **data}} if isinstance(data, Mapping) else tree
        return with_weight_defaults(tree)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.select == "ema" and self.ema is None:
            raise ValueError("select: ema needs an `ema:` section, for example ema.decay=0.999")
        if self.select == "swa" and self.swa is None:
            raise ValueError("select: swa needs a `swa:` section, for example swa.start=0.75")
        if self.ema is not None and self.swa is not None:
            raise ValueError("ema and swa: a run has one average of its weights; set one of them to null")
        if self.swa is not None and self.model.freeze:
            raise ValueError(
                "swa would change the frozen batch norms of the average: set model.freeze to 0, or use ema"
            )
        if self.optim.sam is not None and self.train.precision == "fp16":
            raise ValueError(
                "optim.sam: fp16 scales the loss step by step, and SAM takes two gradients in one; set train.precision "
                "to bf16 or fp32"
            )
        if self.loss.class_weights == "balanced" and self.train.sampling == "balanced":
            raise ValueError(
                "loss.class_weights and train.sampling: both balanced would favour rare classes twice over; set one of them "
                "to none or uniform"
            )
        if self.train.refit and not self.data.hold_out:
            raise ValueError(
                "train.refit: trains again on validation images too, and data.hold_out: false leaves none; give one of the two"
            )
        if not self.data.hold_out and (self.select == "best" or self.train.patience is not None):
            setting = "select: best" if self.select == "best" else "train.patience"
            raise ValueError(f"{setting}: goes by validation, and data.hold_out: false leaves none; give one of the two")
        if self.train.patience is not None and self.train.precise_bn:
            raise ValueError(
                "train.patience and train.precise_bn: the statistics are taken anew at the end, which is not known before with "
                "patience; set one of the two to null or 0"
            )
        if self.train.batch_size != "auto" and self.train.batch_size % self.train.grad_accum_steps:
            raise ValueError(
                f"train.batch_size: {self.train.batch_size} images can't be divided into train.grad_accum_steps "
                f"{self.train.grad_accum_steps} equal parts"
            )
        if self.model.onnx is not None and self.image.train_scale != 1:
            raise ValueError("image.train_scale: the net of model.onnx takes images of image.size alone; leave it at 1")
        if self.model.onnx is not None and self.data.first_classes is not None:
            raise ValueError("data.first_classes: the net of model.onnx has as many classes as its file; leave it out")
        if self.train.precise_bn == 1:
            raise ValueError("train.precise_bn: one image has no statistics; give some hundreds, or 0")
        if max(self.image.largest_train_size) > 4096:
            raise ValueError(
                f"image.train_scale: training images of {self.image.largest_train_size} pixels; at most 4096"
            )
        if self.train.precise_bn and self.model.freeze:
            raise ValueError("train.precise_bn would change the frozen batch norms: set it or model.freeze to 0")
        if self.train.max_steps == 0 and self.model.head != "probe" and self.model.weights != "deployed":
            raise ValueError("train.max_steps: 0 ships the start, whose head is not fitted; set model.head to probe")
        if self.model.weights == "none" and self.model.head == "probe":
            raise ValueError("model.head: probe fits a head to pretrained features; set it to zero or timm with weights: none")
        if self.model.weights == "none" and self.optim.l2_sp:
            raise ValueError("optim.l2_sp: random weights are no place to stay near; set it to 0 with weights: none")
        if self.model.weights == "none" and self.model.batch_norm == "frozen":
            raise ValueError(
                "model.batch_norm: random weights have no statistics to keep; set it to batch with weights: none"
            )
        if self.model.batch_norm == "frozen" and self.train.precise_bn:
            raise ValueError(
                "train.precise_bn would replace the statistics that model.batch_norm: frozen keeps; set it to 0, or "
                "model.batch_norm to batch"
            )
        for problem in whole_label_conflicts(self.techniques):
            raise ValueError(problem)
        for kind, config in enabled_techniques(self.techniques).items():
            if self.ema is None and config.requires.average:
                raise ValueError(
                    f"techniques.{kind}: needs the moving average of the weights, and there is no `ema:` section (SWA has "
                    "none until its first epoch); give, for example, ema.decay=0.99"
                )
            if config.requires.boxes and self.data.kind not in ("auto", "cub"):
                raise ValueError(
                    f"techniques.{kind}: learns from the object's box in each image, and data.kind: {self.data.kind} has no "
                    f"boxes; give data in the CUB layout with bounding_boxes.txt, or set techniques.{kind}=null"
                )
            if config.requires.side > min(self.image.size):
                raise ValueError(
                    f"techniques.{kind}: needs images of {config.requires.side} pixels a side or more, and image.size is "
                    f"{list(self.image.size)}"
                )
            if config.requires.geometry and self.augment.moves_unsaid:
                raise ValueError(
                    f"techniques.{kind}: needs to know where in its image each crop lies, and augment.policy: "
                    f"{self.augment.policy} shears, shifts and rotates without telling; set augment.policy_geometry to false, "
                    "which keeps its colours alone, or augment.policy to 3-augment"
                )
            if config.requires.cross_entropy and (
                self.loss.kind != "cross_entropy" or self.loss.class_weights != "none"
            ):
                raise ValueError(
                    f"techniques.{kind}: is made for the plain cross-entropy; set loss.kind to cross_entropy and "
                    "loss.class_weights to none"
                )
            if (rounds := config.requires.epochs) > self.train.epochs:
                raise ValueError(
                    f"techniques.{kind}.rounds: {rounds} rounds need as many epochs; train.epochs is {self.train.epochs}"
                )
        return self

    @property
    def facts(self) -> Mapping[str, object]:
        techniques = ", ".join(enabled_techniques(self.techniques)) or "none"
        size = " x ".join(map(str, self.image.size))
        return {"": f"{self.model.name} at {size}", "data": self.data.root, "epochs": self.train.epochs, "techniques": techniques}

    def resolved(self, *, validated: bool, averaged: bool = False) -> Recipe:
        """A copy with `select` resolved. `validated`: whether there is a validation split; `averaged`: whether a run without one
        ends with a moving average, where the recipe leaves open what ships."""
        averages = averaged and not validated and self.select is None and self.ema is None and self.swa is None
        recipe = self.model_copy(update={"ema": Ema()}) if averages else self
        return recipe.model_copy(update={"select": self.select or ("best" if validated else recipe.selected)})

    @property
    def selected(self) -> Shipped:
        """`select`, or the weights that training ends with."""
        return self.select or self.end

    @property
    def end(self) -> Shipped:
        """The weights that training ends with: the average if there is one, else the last."""
        averaged: Shipped = "ema" if self.ema is not None else "swa" if self.swa is not None else "last"
        return averaged if self.select in (None, "best") else self.select


def whole_label_conflicts(techniques: Section) -> list[str]:
    """Messages on techniques that need images of one label while others mix all labels in some step."""
    configs = enabled_techniques(techniques)
    mixers = {kind: config for kind, config in configs.items() if isinstance(config, Mixing)}
    times = {min(time, END) for config in mixers.values() for time in (0.0, *knot_positions(config.probability), END)}
    if not mixers or any(sum(config.share(time) for config in mixers.values()) < 1 for time in times):
        return []
    return [
        f"techniques.{kind}: learns from images of one label, and {' and '.join(mixers)} mixed in every step leave none; "
        f"give, for example, techniques.{next(iter(mixers))}.probability=0.5"
        for kind, config in configs.items()
        if config.requires.whole_labels
    ]
