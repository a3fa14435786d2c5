"""Everything that one run is made of, built from its recipe in one place; and its state, as a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from fgvc.config.data import SPLITS
from fgvc.config.images import Preprocess
from fgvc.config.models import run_of
from fgvc.config.recipe import Recipe
from fgvc.config.techniques import enabled_techniques
from fgvc.config.training import Optim
from fgvc.data.augment import Augmenter
from fgvc.data.cache import DecodeCache
from fgvc.data.index import ImageIndex
from fgvc.data.loader import TrainLoader, evaluation_loader, train_loader
from fgvc.data.quality.stored import refuse_shares
from fgvc.errors import FgvcError
from fgvc.models.backbone import head_prefixes, memory_format
from fgvc.models.norms import reestimate_norms, running_norms
from fgvc.models.weights import Weights
from fgvc.runs.build import BuiltNet, build_net, class_counts, refuse_names
from fgvc.runs.checkpoint import Progress, State
from fgvc.runs.distributed import Runtime, rng_state, set_rng_state
from fgvc.runs.images import fingerprint, learnt_of_aside, read_index
from fgvc.runs.step import StepModule
from fgvc.techniques.distill.teacher import ProbedNet
from fgvc.training.batch import Normalise
from fgvc.training.means import RunningMeans
from fgvc.training.optim import make_ema, make_optimizer, make_schedule, make_swa
from fgvc.training.teachers import Opened, TeacherLoader
from fgvc.training.watch import FiniteCheck

Notify = Callable[[str], None]


def training_index(recipe: Recipe, index: ImageIndex | None = None) -> ImageIndex:
    """What `read_index` gives, or `index` of a run that goes on, for training. Raises FgvcError where a technique asks what these
    data do not have."""
    refuse_names(recipe)
    index = read_index(recipe) if index is None else index
    for kind, config in enabled_techniques(recipe.techniques).items():
        if not config.requires.boxes:
            continue
        if index.boxes is None:
            raise FgvcError(
                f"techniques.{kind}: learns from the object's box in each image, and the data in {recipe.data.root} have no "
                f"boxes; give data in the CUB layout with bounding_boxes.txt, or set techniques.{kind}=null"
            )
        refuse_shares(index)
    return index


def spread(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Up to `count` of the rows, evenly over all of them."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64)]


def _learnt_before(recipe: Recipe, index: ImageIndex) -> list[str]:
    """A doubt where the first weights are of a run that was trained on what is to be validated or tested on."""
    run = run_of(Path(recipe.model.weights).expanduser())
    count = 0 if run is None else learnt_of_aside(run, index)
    aside = int((index.splits != SPLITS.index("train")).sum())
    known = f"{run}, whose weights this run begins with, was trained on {count} of the {aside} images that this run validates or"
    return [f"{known} tests on: its scores will be too good"] if count else []


def opener_of(
    recipe: Recipe,
    index: ImageIndex,
    device: torch.device,
    *,
    preprocess: Preprocess | None = None,
    out: Path | None = None,
    timed: bool = False,
) -> TeacherLoader:
    """What opens the teachers of a run. `preprocess`: that of a run which goes on; `out`: its folder; `timed`: see Opened."""
    return TeacherLoader(
        classes=index.classes,
        index=index,
        device=device,
        averaged=recipe.ema is not None,
        preprocess=preprocess,
        out=out,
        timed=timed,
    )


def first_weights(built: BuiltNet, recipe: Recipe, begun: State | None = None) -> dict[str, Tensor]:
    """Where `optim.l2_sp` draws the parameters of a net to, by name: to the pretrained weights that it has now, or had in the
    state that its run began with. Raises FgvcError where that state is of another recipe."""
    if not recipe.optim.l2_sp:
        return {}
    weights = {name: weight for name, weight in built.step.named_parameters() if weight.requires_grad}
    if begun is None:
        return {name: weights[name].detach().clone() for name in built.pretrained if name in weights}
    drawn = [name for name in begun.rest.get("pretrained", ()) if name in weights]
    if any(begun.net[name.removeprefix("net.")].shape != weights[name].shape for name in drawn) or not drawn:
        raise FgvcError("optim.l2_sp: ckpt/start is of a run of other settings; put that of this run there")
    return {name: torch.empty_like(weights[name]).copy_(begun.net[name.removeprefix("net.")]) for name in drawn}


def build_optimizer(
    step: StepModule, recipe: Recipe, *, starts: Mapping[str, Tensor] | None = None
) -> tuple[Optimizer, Optim]:
    """The optimizer, and the settings with the rates that it really uses. `starts`: see `first_weights`."""
    optim = recipe.optim.scaled(recipe.train.batch_size)
    return make_optimizer(step, optim, added=step.added, head=head_prefixes(step.net), starts=starts), optim


@dataclass(frozen=True, slots=True)
class Answers:
    """What a net says of images of the index."""

    rows: NDArray[np.int64]  # (N,)
    said: NDArray[np.int64]  # (N,) classes

    def tensor(self) -> Tensor:
        """(2,N) int64, as a checkpoint holds it."""
        return torch.from_numpy(np.stack([self.rows, self.said]))


@dataclass(slots=True)
class Session:
    """One process of one run."""

    recipe: Recipe
    runtime: Runtime
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
    watch: FiniteCheck
    progress: Progress
    pretrained: tuple[str, ...]  # parameters of `step` whose values were those of `model.weights` when the run began
    answers: Tensor | None = None  # (2,N): see `Answers`; of validation, when it was last asked
    means: RunningMeans = field(default_factory=RunningMeans)  # of this epoch's losses

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps_per_epoch // self.recipe.train.grad_accum_steps

    @property
    def total_steps(self) -> int:
        """Where this run stops."""
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
        """By teacher, the nets whose heads are fitted when the run begins."""
        found = ((f"teacher {number}, {one.name}", one.probed) for number, one in enumerate(self.step.attachments.teachers, 1))
        return {name: probed for name, probed in found if probed is not None}

    def shipping(self) -> nn.Module:
        """The net whose weights would ship as things stand: the average where there is one and it is wanted."""
        return self.average if self.average is not None and self.recipe.selected != "last" else self.step.net

    def average_epoch(self) -> None:
        """Have SWA take in the epoch that just ended, if it is one of the last, with batch norms of its own.
        Where a finished run was made longer and it holds one that is none of the last any more, it begins anew."""
        if self.swa is None or self.recipe.swa is None:
            return
        start, ended = round(self.recipe.swa.start * self.recipe.train.epochs, 6), self.progress.epoch + 1
        if ended - int(self.swa.n_averaged) <= start:  # the first of those that it holds
            self.swa.n_averaged.zero_()
        if ended <= start:
            return
        self.swa.update_parameters(self.step.net)
        if self.recipe.model.batch_norm == "batch":  # frozen statistics are the same in every net that is averaged
            self._reestimate(self.swa.module, self.recipe.swa.images)

    def reestimate_norms(self) -> None:
        """Take the statistics of all batch norms, the EMA's too, from images as evaluation sees them."""
        for net in (self.step.net, *([self.ema.module] if self.ema is not None else [])):
            self._reestimate(net, self.recipe.train.precise_bn)

    def _reestimate(self, net: nn.Module, images: int) -> None:
        if running_norms(net):
            rows = spread(self.index.rows("train"), images)
            loader = evaluation_loader(self.index, rows, spec=self.preprocess, batch_size=64, workers=0)
            reestimate_norms(net, (batch.images.to(self.runtime.device) for batch in loader))
        self.step.train()

    def capture(self) -> State:
        """All that decides the rest of the run; on every rank, since each has its own random generators."""
        rest: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": self.runtime.gather(rng_state(self.runtime.device)),
            "techniques": {kind: hook() for kind, hook in self.step.hooks("state_dict")},
            "images": fingerprint(self.index),
            "preprocess": self.preprocess.model_dump_json(),  # that a damaged preprocess.json is noticed
            "teachers": [one.state() for one in self.probed.values()],
            "answers": self.answers,
            "averaged": 0 if self.swa is None else int(self.swa.n_averaged),
            "pretrained": list(self.pretrained),
        }
        ema = None if self.average is None else self.average.state_dict()
        self.progress.sums, self.progress.counts = self.means.read()
        return State(self.step.net.state_dict(), self.step.branches.state_dict(), ema, rest, self.progress)

    def restore(self, state: State) -> None:
        """Continue exactly where `state` was captured. Raises FgvcError where it is of another set-up."""
        by_image = [kind for kind, one in self.step.techniques.items() if one.remembers_images]
        known = state.rest.get("images")
        if known != fingerprint(self.index) and (known is not None or by_image):
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
            for one, kept in zip(self.probed.values(), state.rest.get("teachers", ()), strict=True):
                one.restore(kept)
        except (KeyError, ValueError, RuntimeError) as error:
            raise FgvcError(f"the checkpoint does not fit this recipe: {error}") from error
        self.pretrained = tuple(state.rest.get("pretrained", ()))
        set_rng_state(state.rest["rng"][self.runtime.rank], self.runtime.device)
        self.progress, self.answers = state.progress, state.rest.get("answers")
        self.progress.finished = False
        self.means.restore(self.progress.sums, self.progress.counts)


@contextmanager
def open_session(
    recipe: Recipe,
    runtime: Runtime,
    *,
    index: ImageIndex | None = None,
    preprocess: Preprocess | None = None,
    begun: State | None = None,
    notify: Notify | None = None,
    out: Path | None = None,
    teachers: Opened = "to teach",
) -> Iterator[Session]:
    """Build a run, ready for its first step. The loader's workers end with the context.

    `index`, `preprocess`: those of a run which goes on; `model.weights` is then not read, the checkpoint replaces it. `begun`:
    the state that such a run began with, for `optim.l2_sp`. `out`: the run's folder; `teachers`: what for they are opened, "not"
    to look at views alone, without what teachers say of them.
    """
    index = training_index(recipe, index)
    validated = len(index.rows("val")) > 0
    if not validated and (recipe.select == "best" or recipe.train.refit):
        setting = "select: best" if recipe.select == "best" else "train.refit"
        raise FgvcError(f"{setting} needs a validation split: give data.val_fraction a value above 0")
    recipe = recipe.resolved(validated=validated)
    fitting = recipe.model_copy(update={"train": recipe.train.fitting(len(index.rows("train")), runtime.world)})
    torch.manual_seed(recipe.train.seed)
    opener, counts = None, class_counts(index)
    if teachers != "not":
        timed = teachers == "to time"
        opener = opener_of(recipe, index, runtime.device, preprocess=preprocess, out=out, timed=timed)
    built = build_net(recipe, len(index.classes), pretrained=preprocess is None, counts=counts, opener=opener)
    weights = (
        built.weights
        if preprocess is not None
        else replace(built.weights, doubts=(*built.weights.doubts, *_learnt_before(recipe, index)))
    )
    step, preprocess = built.step, preprocess or built.preprocess
    layout = memory_format(step.net)
    step.to(runtime.device)
    step.net.to(memory_format=layout)
    ema, swa = make_ema(step.net, recipe.ema), make_swa(step.net, recipe.swa)
    step.follow(ema.module if ema is not None else None)
    step.attach_hooks()
    step.train()
    optimizer, optim = build_optimizer(step, fitting, starts=first_weights(built, recipe, begun))
    loader = _loader(fitting, runtime, index, step, preprocess, notify)
    torch.manual_seed(recipe.train.seed + runtime.rank)  # dropout differs between ranks
    scaler, average = runtime.scaler(), ema.module if ema is not None else swa.module if swa is not None else None
    session = Session(
        recipe=recipe,
        runtime=runtime,
        index=index,
        preprocess=preprocess,
        weights=weights,
        batch=fitting.train.batch_size,
        loader=loader,
        step=step,
        wrapped=runtime.wrap(step, branches=len(step.branches) > 0),
        normalise=Normalise(preprocess, runtime.device, layout),
        optimizer=optimizer,
        schedule=make_schedule(
            optimizer,
            optim,
            steps_per_epoch=loader.steps_per_epoch // recipe.train.grad_accum_steps,
            epochs=recipe.train.epochs,
        ),
        scaler=scaler,
        ema=ema,
        swa=swa,
        watch=FiniteCheck(step, average, scaler),
        progress=Progress(),
        pretrained=built.pretrained,
    )
    try:
        yield session
    finally:
        loader.close()


def _loader(
    recipe: Recipe,
    runtime: Runtime,
    index: ImageIndex,
    step: StepModule,
    preprocess: Preprocess,
    notify: Notify | None,
) -> TrainLoader:
    """This rank's training images, rendered at the largest size that an epoch or a technique asks for."""
    rows = index.rows("train")
    micro = recipe.train.batch_size // (runtime.world * recipe.train.grad_accum_steps)
    if micro < 2 and any(isinstance(module, _BatchNorm) for module in step.modules()):
        raise FgvcError(
            f"train.batch_size: {recipe.train.batch_size} over {runtime.world} processes x train.grad_accum_steps "
            f"{recipe.train.grad_accum_steps} leaves {micro} image a forward, and a batch norm needs two"
        )
    side = max(recipe.image.largest_train_size, recipe.image.scaled(step.attachments.render))
    if max(side) > 4096:
        raise FgvcError(f"images would have to be rendered at {side} pixels for a technique or a teacher; at most 4096")
    rendered = preprocess.model_copy(update={"size": side})
    loader = train_loader(
        index,
        rows,
        augmenter=Augmenter(recipe.augment, rendered, seed=recipe.train.seed),
        batch_size=micro,
        seed=recipe.train.seed,
        workers=recipe.train.workers,
        cache=_cache(recipe, index, rows, runtime, notify, side),
        rank=runtime.rank,
        world=runtime.world,
        on_sample=[hook for _, hook in step.hooks("on_sample")],
        max_unreadable=recipe.data.max_unreadable,
        balanced=recipe.train.sampling == "balanced",
    )
    if loader.steps_per_epoch < recipe.train.grad_accum_steps:
        loader.close()
        raise FgvcError(f"train.batch_size: {recipe.train.batch_size} is more than the {len(rows)} training images")
    return loader


def _cache(
    recipe: Recipe,
    index: ImageIndex,
    rows: np.ndarray,
    runtime: Runtime,
    notify: Notify | None,
    rendered: tuple[int, int],
) -> DecodeCache | None:
    """The decode cache where the recipe wants one, built by rank 0 while the others wait."""
    if recipe.cache == "none":
        return None
    side, folder = recipe.augment.shrink_to(rendered), recipe.cache_dir
    runtime.first(lambda: DecodeCache.open(index, rows, side=side, folder=folder, progress=notify).close())
    return DecodeCache.open(index, rows, side=side, folder=folder)
