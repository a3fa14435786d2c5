"""The parts of a run in training, built from its recipe in one place, and their state as a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from fgvc.config.data import SPLITS
from fgvc.config.images import Preprocess
from fgvc.config.models import run_of
from fgvc.config.recipe import Recipe
from fgvc.data.index import ImageIndex, spread
from fgvc.data.loader import TrainLoader, evaluation_loader
from fgvc.data.unseen import FEWEST_TO_CHOOSE
from fgvc.errors import FgvcError, NoUnseenImagesError
from fgvc.models.backbone import head_prefixes, memory_format
from fgvc.models.classifier import as_classifier
from fgvc.models.norms import reestimate_norms, running_norms
from fgvc.models.weights import Weights
from fgvc.runs.build import build_net, class_counts
from fgvc.runs.checkpoint import Progress, State
from fgvc.runs.distributed import ProcessGroup, rng_state, set_rng_state
from fgvc.runs.images import fingerprint, held_out_overlap
from fgvc.runs.step import StepModule
from fgvc.techniques.teacher import ProbedNet
from fgvc.training.automatic import settle, settled_process
from fgvc.training.batch import Normalise
from fgvc.training.building import build_optimizer, first_weights, teacher_loader
from fgvc.training.finite_check import FiniteCheck
from fgvc.training.images import Notify, training_index, training_loader
from fgvc.training.kept_rows import keep_rows
from fgvc.training.means import RunningMeans
from fgvc.training.optim import make_ema, make_schedule, make_swa
from fgvc.training.teachers import TeacherUse


def _overlap_doubts(recipe: Recipe, index: ImageIndex) -> list[str]:
    """A warning where the first weights are of a run that was trained on images that this run validates or tests on."""
    run = run_of(Path(recipe.model.weights).expanduser())
    overlap = 0 if run is None else held_out_overlap(run, index)
    held_out = int((index.splits != SPLITS.index("train")).sum())
    if not overlap:
        return []
    return [
        f"{run}, whose weights this run begins with, was trained on {overlap} of the {held_out} images that this run validates "
        "or tests on: its scores will be too good"
    ]


@dataclass(frozen=True, slots=True)
class Predictions:
    """A net's predicted classes for images of the index."""

    rows: NDArray[np.int64]  # (N,)
    classes: NDArray[np.int64]  # (N,)

    def tensor(self) -> Tensor:
        """Rows and classes (2,N) int64, as a checkpoint holds them."""
        return torch.from_numpy(np.stack([self.rows, self.classes]))


@dataclass(slots=True)
class Session:
    """One process of a run in training: its net, data, optimizer and progress."""

    recipe: Recipe
    process: ProcessGroup
    index: ImageIndex
    preprocess: Preprocess
    weights: Weights
    batch: int  # images a step, of all processes: train.batch_size, or what a smaller set fills
    loader: TrainLoader
    step: StepModule
    wrapped: nn.Module  # what the loop calls: `step`, or DDP around it
    normalise: Normalise
    optimizer: Optimizer
    schedule: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    swa: AveragedModel | None
    finite_check: FiniteCheck
    progress: Progress
    starts: Mapping[str, Tensor]  # where `optim.l2_sp` draws parameters of `step` to
    pretrained: tuple[str, ...]  # parameters of `step` whose values were those of `model.weights` when the run began
    choices: tuple[str, ...] = ()  # what was `auto`, a sentence each
    predictions: Tensor | None = None  # (2,N): see `Predictions`; for validation, when it was last scored
    means: RunningMeans = field(default_factory=RunningMeans)  # of this epoch's losses

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.batches_per_epoch // self.recipe.train.grad_accum_steps

    @property
    def total_steps(self) -> int:
        """Optimizer steps at which this run stops."""
        planned = self.steps_per_epoch * self.recipe.train.epochs
        return min(planned, self.recipe.train.last_step)

    @property
    def epoch_done(self) -> bool:
        """Whether every step of the epoch that `progress` is in has been made."""
        return self.progress.micro >= self.steps_per_epoch * self.recipe.train.grad_accum_steps

    @property
    def validated(self) -> bool:
        """Whether there is a validation split."""
        return len(self.index.rows("val")) > 0

    @property
    def train_size(self) -> tuple[int, int]:
        """Height and width of this epoch's training images."""
        return self.recipe.image.train_size(self.progress.epoch / self.recipe.train.epochs)

    @property
    def average(self) -> nn.Module | None:
        """The average of the weights where there is one: the EMA, or SWA's once it holds an epoch."""
        if self.ema is not None:
            return self.ema.module
        return self.swa.module if self.swa is not None and self.swa.n_averaged > 0 else None

    @property
    def probed(self) -> dict[str, ProbedNet]:
        """Nets whose heads are fitted when the run begins, by teacher."""
        teachers = enumerate(self.step.attachments.teachers, 1)
        return {f"teacher {at}, {teacher.name}": teacher.probed for at, teacher in teachers if teacher.probed is not None}

    def shipping(self) -> nn.Module:
        """The net whose weights would ship as things stand: the average where there is one and it is wanted."""
        return self.average if self.average is not None and self.recipe.selected != "last" else self.step.net

    def keep_absent_rows(self) -> None:
        """Keep the classifier's rows of classes without training images, where the weights brought it; call it once, with the
        weights that the run begins or goes on with."""
        head = [f"net.{name}" for name, _ in self.step.net.named_parameters() if name.startswith(head_prefixes(self.step.net))]
        counts = class_counts(self.index)
        if (counts == 0).any() and head and set(head) <= set(self.pretrained):
            classifier = as_classifier(self.step.net).get_classifier()
            keep_rows(self.optimizer, classifier, torch.from_numpy(counts == 0).to(self.process.device))

    def average_epoch(self) -> None:
        """Add the epoch that just ended to SWA, if it is one of the last, and recompute SWA's batch norms. Where a finished run
        was made longer and SWA holds an epoch that is none of the last any more, it begins anew."""
        if self.swa is None or self.recipe.swa is None:
            return
        start, ended = round(self.recipe.swa.start * self.recipe.train.epochs, 6), self.progress.epoch + 1
        if ended - int(self.swa.n_averaged) <= start:  # the first of those that it holds
            self.swa.n_averaged.zero_()
        if ended <= start:
            return
        self.swa.update_parameters(self.step.net)
        if self.recipe.model.batch_norm != "frozen":  # frozen statistics are the same in every net that is averaged
            self._reestimate(self.swa.module, self.recipe.swa.images)

    def reestimate_norms(self) -> None:
        """Recompute the statistics of all batch norms, the EMA's too, from images as evaluation sees them."""
        for net in (self.step.net, *([self.ema.module] if self.ema is not None else [])):
            self._reestimate(net, self.recipe.train.precise_bn)

    def _reestimate(self, net: nn.Module, images: int) -> None:
        if running_norms(net):
            rows = spread(self.index.rows("train"), images)
            loader = evaluation_loader(self.index, rows, spec=self.preprocess, batch_size=64, workers=0)
            reestimate_norms(net, (batch.images.to(self.process.device) for batch in loader))
        self.step.train()

    def capture(self) -> State:
        """Return all that decides the rest of the run; called on every rank, since each has its own random generators."""
        rest: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": self.process.gather(rng_state(self.process.device)),
            "techniques": {kind: hook() for kind, hook in self.step.hooks("state_dict")},
            "images": fingerprint(self.index),
            "preprocess": self.preprocess.model_dump_json(),  # that a damaged preprocess.json is noticed
            "teachers": [probed.state() for probed in self.probed.values()],
            "answers": self.predictions,
            "averaged": 0 if self.swa is None else int(self.swa.n_averaged),
            "pretrained": list(self.pretrained),
        }
        ema = None if self.average is None else self.average.state_dict()
        self.progress.sums, self.progress.counts = self.means.read()
        return State(self.step.net.state_dict(), self.step.branches.state_dict(), ema, rest, self.progress)

    def restore(self, state: State) -> None:
        """Restore a captured state exactly. Raises FgvcError where it is of another set-up."""
        by_image = any(technique.remembers_images for technique in self.step.techniques.values())
        recorded = state.rest.get("images")
        if recorded != fingerprint(self.index) and (recorded is not None or by_image):
            raise FgvcError(
                f"the images in {self.index.root} are not those that the checkpoint was trained on; restore the set as it "
                "was, or choose another --out for a new run"
            )
        try:
            self.step.net.load_state_dict(state.net)
            self.step.branches.load_state_dict(state.branches)
            if self.swa is not None:
                self.swa.n_averaged.fill_(state.rest["averaged"])
            if self.average is not None and state.ema is not None:
                self.average.load_state_dict(state.ema)
            self.optimizer.load_state_dict(dict(state.rest["optimizer"]))
            self.scaler.load_state_dict(state.rest["scaler"])
            for kind, hook in self.step.hooks("load_state_dict"):
                hook(state.rest["techniques"][kind])
            for probed, teacher_state in zip(self.probed.values(), state.rest.get("teachers", ()), strict=True):
                probed.restore(teacher_state)
        except (KeyError, ValueError, RuntimeError) as error:
            raise FgvcError(f"the checkpoint does not fit this recipe: {error}") from error
        self.pretrained = tuple(state.rest.get("pretrained", ()))
        set_rng_state(state.rest["rng"][self.process.rank], self.process.device)
        self.progress, self.predictions = state.progress, state.rest.get("answers")
        self.progress.finished = False
        self.means.restore(self.progress.sums, self.progress.counts)


def _refuse_unvalidated(recipe: Recipe, index: ImageIndex) -> None:
    """Raise FgvcError where the recipe goes by validation, and the data have no validation split."""
    needing = {
        "select: best": recipe.select == "best", "train.refit": recipe.train.refit, "train.patience": recipe.train.patience,
    }  # fmt: skip
    settings = [setting for setting, given in needing.items() if given]
    if len(index.rows("val")) or not settings:
        return
    if index.unseen:
        raise NoUnseenImagesError(
            f"{settings[0]}: of fewer than {FEWEST_TO_CHOOSE} images that the deployed file has not seen none may choose, and "
            "all judge; leave it out: the average of the weights ships at the end of the schedule"
        )
    raise FgvcError(f"{settings[0]} needs a validation split: give data.val_fraction a value above 0")


@contextmanager
def open_session(
    recipe: Recipe,
    process: ProcessGroup,
    *,
    index: ImageIndex | None = None,
    preprocess: Preprocess | None = None,
    start_state: State | None = None,
    notify: Notify | None = None,
    out: Path | None = None,
    teachers: TeacherUse = "to teach",
) -> Iterator[Session]:
    """Build a run and yield its Session, ready for its first step. The loader's workers end with the context.

    `index`, `preprocess`: those of a run which goes on; `model.weights` is then not read, the checkpoint replaces it.
    `start_state`: the state that such a run began with, for `optim.l2_sp`. `out`: the run's folder; `teachers`: their use, "not"
    for views alone, without the teachers' outputs. Raises FgvcError where data, net, weights or teachers can't be had, or the
    recipe asks for a validation split that the data do not have; NoUnseenImagesError where a deployed file may have seen all.
    """
    index = training_index(recipe, index)
    _refuse_unvalidated(recipe, index)
    settled = settle(recipe, index, process, measure=teachers != "not")
    recipe = settled.recipe.resolved(validated=len(index.rows("val")) > 0, averaged=bool(index.unseen))
    process = settled_process(process, recipe.train)
    fitting = recipe.model_copy(update={"train": recipe.train.fitting(len(index.rows("train")), process.world)})
    torch.manual_seed(recipe.train.seed)
    opener, counts = None, class_counts(index)
    if teachers != "not":
        timed = teachers == "to time"
        opener = teacher_loader(recipe, index, process.device, preprocess=preprocess, out=out, timed=timed)
    built = build_net(recipe, len(index.classes), pretrained=preprocess is None, counts=counts, opener=opener)
    weights = (
        built.weights
        if preprocess is not None
        else replace(built.weights, doubts=(*built.weights.doubts, *_overlap_doubts(recipe, index)))
    )
    step, preprocess = built.step, preprocess or built.preprocess
    layout = memory_format(step.net)
    step.to(process.device)
    step.net.to(memory_format=layout)
    ema, swa = make_ema(step.net, recipe.ema), make_swa(step.net, recipe.swa)
    step.set_average(ema.module if ema is not None else None)
    step.attach_hooks()
    step.train()
    starts = first_weights(built, recipe, start_state)
    optimizer, optim = build_optimizer(step, fitting, starts=starts)
    loader = training_loader(fitting, process, index, step, preprocess, notify)
    torch.manual_seed(recipe.train.seed + process.rank)  # dropout differs between ranks
    scaler, average = process.scaler(), ema.module if ema is not None else swa.module if swa is not None else None
    session = Session(
        recipe=recipe,
        process=process,
        index=index,
        preprocess=preprocess,
        weights=weights,
        batch=fitting.train.images,
        loader=loader,
        step=step,
        wrapped=process.wrap(step, branches=len(step.branches) > 0),
        normalise=Normalise(preprocess, process.device, layout),
        optimizer=optimizer,
        schedule=make_schedule(
            optimizer,
            optim,
            steps_per_epoch=loader.batches_per_epoch // recipe.train.grad_accum_steps,
            epochs=recipe.train.epochs,
        ),
        scaler=scaler,
        ema=ema,
        swa=swa,
        finite_check=FiniteCheck(step, average, scaler),
        progress=Progress(),
        starts=starts,
        pretrained=built.pretrained,
        choices=settled.notes,
    )
    try:
        yield session
    finally:
        loader.close()
