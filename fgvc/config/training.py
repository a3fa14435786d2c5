"""Settings of training: budget, optimizer, averages, checkpoints, log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from fgvc.config.section import Section


class Sam(Section):
    """Sharpness-aware minimisation: two forward and backward passes a step, on the same batch."""

    rho: float = Field(0.05, gt=0, description="how far uphill; some ten times as much where it is adaptive")
    adaptive: bool = Field(
        False,
        description="ASAM: in units of each weight's size, T = |w| for every parameter (the usual code's form), so that rescaled "
        "layers are alike; see eta for its authors' form",
    )
    eta: float | None = Field(
        None,
        ge=0,
        description="of ASAM: null: T = |w| for all. A number: as in its authors' code (0.01 there), T = |w| + eta for weights, "
        "those of norms too, and 1 for biases, so that parameters near 0 move as well",
    )


SIZED = ("lamb", "lars", "larc", "adamp", "sgdp")  # in the names of optimizers whose steps depend on a weight's norm


class Optim(Section):
    """Optimizer, learning rates, regularisation and schedule."""

    renamed: ClassVar[Mapping[str, str]] = {"clip_norm": "clip_grad", "grafted_lr_scale": "replaced_lr_scale"}

    name: str = Field(
        "sgd",
        description="timm's name of the optimizer: sgd (Nesterov), momentum, adamw, ... Where none is given and weights are "
        "pretrained: adamw, with lr 3e-4 and weight_decay 0.01 unless they are given",
    )
    lr: float = Field(0.03, gt=0, description="peak learning rate")
    lr_for_batch: int | None = Field(
        None,
        ge=1,
        description="the batch size that lr was chosen for: train.batch_size / this scales it (its root for Adam and "
        "the like); null: lr as it is",
    )
    head_lr_scale: float = Field(1.0, gt=0, description="learning rate of the classifier, in units of lr")
    added_lr_scale: float = Field(1.0, gt=0, description="of the heads that techniques add, in units of lr")
    replaced_lr_scale: float = Field(
        0.1,
        gt=0,
        description="of what techniques put beside pretrained kernels (acb, dbb, ...), in units of lr: at 1 the first steps can "
        "undo them",
    )
    layer_decay: float = Field(1.0, gt=0, le=1, description="a layer's rate is this times that of the layer above it")
    momentum: float = Field(
        0.9, ge=0, lt=1, description="of the optimizers that have one, such as sgd; Adam's betas are timm's"
    )
    weight_decay: float = Field(1e-4, ge=0, description="on weights of rank >= 2 only: never on norms and biases")
    l2_sp: float = Field(
        0.0,
        ge=0,
        description="in the place of weight_decay on what came from model.weights, norms and biases too: towards that, not to 0 "
        "(L2-SP); 0: off",
    )
    schedule: Literal["cosine", "step", "constant"] = Field("cosine", description="after the warm-up, per step")
    milestones: tuple[float, ...] = Field((), description="of the step schedule: epochs after which the rate drops")
    drop: float = Field(0.1, gt=0, lt=1, description="of the step schedule: factor of one drop")
    warmup_epochs: float = Field(1.0, ge=0, description="linear up to lr")
    min_lr: float = Field(0.0, ge=0, description="where the cosine ends")
    clip_grad: float | None = Field(
        None, gt=0, description="cap on the norm of all gradients together. Default with pretrained weights: 1"
    )
    sam: Sam | None = Field(None, description="sharpness-aware minimisation; null: off. It doubles a step's time")

    @model_validator(mode="after")
    def _distance(self) -> Optim:
        if self.l2_sp and any(name in self.name for name in SIZED):
            raise ValueError(
                f"l2_sp: {self.name} takes steps that depend on how large a weight is; use sgd, momentum, adamw or another"
            )
        return self

    @model_validator(mode="after")
    def _steps(self) -> Optim:
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError("milestones go with schedule: step, for example optim.milestones=[30,60]")
        if list(self.milestones) != sorted(set(self.milestones)) or min(self.milestones, default=1) <= 0:
            raise ValueError("milestones: give epochs above 0 in increasing order")
        return self

    def scaled(self, batch_size: int) -> Optim:
        """A copy with the learning rates of `batch_size` images a step: linear (Goyal et al. 2017, arXiv:1706.02677), or by the
        square root for optimizers that normalise the gradient."""
        if self.lr_for_batch is None:
            return self
        factor = batch_size / self.lr_for_batch
        if any(name in self.name for name in ("ada", "lamb")):  # timm's rule
            factor **= 0.5
        return self.model_copy(update={"lr": self.lr * factor, "min_lr": self.min_lr * factor, "lr_for_batch": None})


class Ema(Section):
    """Exponential moving average of the weights, which ships if `select` is ema."""

    decay: float = Field(
        0.999, gt=0, lt=1, description="time constant 1 / (1 - decay) steps; keep it well under the run's length"
    )
    warmup: bool = Field(
        True, description="decay grows as 1 - (1 + step)^(-2/3) up to `decay`, so the start is forgotten"
    )


class Swa(Section):
    """Stochastic weight averaging (Izmailov et al., UAI 2018, arXiv:1803.05407): the mean of the weights at the last epochs'
    ends. It gains where these still move: with schedule: constant, or a min_lr above 0."""

    start: float = Field(0.75, ge=0, lt=1, description="share of the run after which every epoch's end is averaged")
    images: int = Field(
        1024,
        ge=2,
        description="training images, as evaluation sees them, from which the average's batch norms take their statistics anew "
        "whenever an epoch has joined",
    )


class Train(Section):
    """Budget, precision and machine of a run."""

    renamed: ClassVar[Mapping[str, str]] = {"accumulate": "grad_accum_steps", "recompute": "grad_checkpointing"}

    epochs: int = Field(12, ge=1, description="passes over the training set; the schedule spans all of them")
    batch_size: Annotated[int, Field(ge=2)] | Literal["auto"] = Field(
        32,
        description="images per optimizer step, of all processes and micro-batches together; a smaller set is one step. auto: "
        "32, down to 8 where an epoch would have fewer than 10 steps, in as many micro-batches (grad_accum_steps) as "
        "memory needs",
    )
    max_steps: int | None = Field(
        None,
        ge=0,
        description="stop early after so many steps, schedule unchanged; 0: the start ships (model.head: probe, or weights with "
        "a trained head)",
    )
    seed: int = Field(
        0, ge=0, description="of the head's first weights, the order, the augmentation, the techniques' draws"
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="end the run after so many epochs in which validation (select_by) was not better than before. The schedule "
        "spans all epochs in any case: one that ends early has not come to its small rates. null: all epochs",
    )
    precision: Literal["fp32", "bf16", "fp16", "auto"] = Field(
        "fp32",
        description="autocast; weights stay fp32, and so do all losses. auto: the faster of fp32 and bf16, by a few steps of "
        "each on this machine before the run begins; it is said and recorded",
    )
    floor: bool = Field(
        True,
        description="before the first step fit a logistic regression to the frozen net's features of the training images, to "
        "stand beside the result (docs/floor.md), from three looks at each; false: only where model.head: probe begins with it",
    )
    refit: bool = Field(
        False,
        description="once the run has finished, train again on the validation split as well, all else equal, in a folder of its "
        "own beside it (NAME-refit): what ships then. Where no epoch was clearly better than the start, only the head is "
        "fitted anew, and without a fitted head (model.head: probe) there is no second run",
    )
    sampling: Literal["uniform", "balanced"] = Field(
        "uniform",
        description="of an epoch's images. uniform: each once; balanced: as many, drawn with replacement so that every class "
        "comes equally often",
    )
    grad_accum_steps: int = Field(1, ge=1, description="micro-batches that a step's images are divided into, to save memory")
    grad_checkpointing: bool = Field(
        False, description="activation checkpointing: less memory, about a third more time, the same result"
    )
    validate_every: int = Field(
        1, ge=1, description="epochs from one validation to the next; the last is always followed by one"
    )
    precise_bn: int = Field(
        0,
        ge=0,
        description="at the end, take the batch norms' statistics anew from so many training images as evaluation sees "
        "them (0: keep those of training, jigsaws and all)",
    )
    workers: int = Field(
        1, ge=0, description="loading processes; 0 loads between steps. The images are the same for any number"
    )
    device: str = Field("auto", description="auto | cpu | cuda | cuda:N | mps")

    @property
    def settled(self) -> bool:
        """Whether nothing is left to a measurement (`auto`)."""
        return "auto" not in (self.batch_size, self.precision)

    @property
    def images(self) -> int:
        """Images per optimizer step. Of `auto` only once it is settled."""
        assert self.batch_size != "auto"
        return self.batch_size

    def settled_as(self, recorded: Train) -> Train:
        """A copy in which what is `auto` is as a run recorded it."""
        update: dict[str, object] = {}
        if self.precision == "auto":
            update["precision"] = recorded.precision
        if self.batch_size == "auto":
            update |= {"batch_size": recorded.batch_size, "grad_accum_steps": recorded.grad_accum_steps}
        return self.model_copy(update=update)

    def fitting(self, images: int, world: int) -> Train:
        """A copy whose batch size `images` training images can fill, in equal shares of `world` processes and micro-batches."""
        share = world * self.grad_accum_steps
        return self.model_copy(update={"batch_size": min(self.images, max(images, share) // share * share)})

    @property
    def last_step(self) -> int:
        """The number of optimizer steps after which training stops, whatever the epochs."""
        return 10**12 if self.max_steps is None else self.max_steps


class Checkpoint(Section):
    """Interval and number of the checkpoints that a run keeps."""

    every_steps: int | None = Field(None, ge=1, description="beside the end of every epoch; counted in optimizer steps")
    keep: int = Field(
        1,
        ge=0,
        description="older checkpoints that stay beside the last, the best and the start, to go on from if those are damaged",
    )
    keep_best: int = Field(
        1, ge=1, description="checkpoints of the best epochs by validation (select_by) that stay: ckpt/best and the next ones"
    )


Tracker = Literal["tensorboard", "mlflow"]
Trackers = tuple[Tracker, ...] | Tracker | Literal["none"] | None


def _listed(value: object) -> object:
    """Put a single name into a list; null and none become an empty list."""
    return () if value in (None, "none") else (value,) if isinstance(value, str) else value


class Log(Section):
    """Intervals of a run's reports; may change on resume."""

    every_steps: int = Field(10, ge=1, description="steps between two lines of events.jsonl")
    every_seconds: float = Field(20.0, gt=0, description="between two plain lines where there is no terminal")
    to: Annotated[tuple[Tracker, ...], BeforeValidator(_listed, json_schema_input_type=Trackers)] = Field(
        (),
        description="[tensorboard, mlflow], or one of them: trackers beside the run's own log, of the extras of these names. "
        "TensorBoard's files are in the run's folder; MLflow's database, mlflow.db, beside it",
    )
    mlflow_uri: str | None = Field(
        None, description="server or database in place of mlflow.db, such as http://HOST:5000; default: MLFLOW_TRACKING_URI"
    )
    mlflow_experiment: str = Field("fgvc", min_length=1, description="the experiment of MLflow that the run belongs to")
