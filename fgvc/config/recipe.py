"""The recipe of a run: all settings that decide its result, as one frozen, validated tree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from fgvc.config.conflicts import conflicts
from fgvc.config.data import Augment, AutoData, CsvData, CubData, FolderData, HfData, NamedData
from fgvc.config.exporting import Export
from fgvc.config.images import Deploy, Image
from fgvc.config.models import Loss, Model, run_of
from fgvc.config.section import Section
from fgvc.config.techniques import Techniques, enabled_techniques
from fgvc.config.training import Checkpoint, Ema, Log, Optim, Swa, Train
from fgvc.io.display import Display

Shipped = Literal["last", "best", "ema", "swa"]
Selected = Literal[Shipped, "start", "floor"]
CLIP = 1.0  # norm of the gradients at frozen statistics, whose first ones can be 40
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
        description="which weights eval, export and predict use; best: of all epochs' ends the best by validation, the average "
        "where there is one, if it is better than the start by more than one standard error, else the start; by fewer than 200 "
        "images the end, or the start where that is better by as much. "
        "Default: best where there is a validation split, else ema or swa, else last; ema where "
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
        for conflict in conflicts(self):
            raise ValueError(conflict)
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
        """The weights that ship: `select`, or where it is open those that training ends with."""
        return self.select or self.end

    @property
    def end(self) -> Shipped:
        """The weights that training ends with: the average if there is one, else the last."""
        averaged: Shipped = "ema" if self.ema is not None else "swa" if self.swa is not None else "last"
        return averaged if self.select in (None, "best") else self.select
