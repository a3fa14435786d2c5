"""Contact sheets of the network's input, technique by technique (`fgvc data preview`)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from fgvc.config.images import Preprocess
from fgvc.config.recipe import Recipe
from fgvc.config.techniques import enabled_techniques
from fgvc.data.index import ImageIndex, decode_row, spread
from fgvc.data.loader import evaluation_loader
from fgvc.errors import FgvcError
from fgvc.images.address import picture
from fgvc.images.lettering import ADVICE, writable
from fgvc.images.overlay import overlay
from fgvc.images.sheet import Cell, save_sheet
from fgvc.io.display import Display, figure
from fgvc.models.target import Target
from fgvc.runs import checkpoint
from fgvc.runs.distributed import process_group
from fgvc.runs.folder import is_run, read_run, recorded_classes
from fgvc.runs.images import fingerprint, recorded_images
from fgvc.runs.record import NAME
from fgvc.techniques.api import Batch, View
from fgvc.techniques.mixing import MixingTechnique, partner_rows
from fgvc.training.batch import to_batch
from fgvc.training.epoch_start import epoch_start
from fgvc.training.log import Events
from fgvc.training.session import Session, open_session


@dataclass(frozen=True, slots=True, repr=False)
class Preview(Display):
    """The sheets that were written, and notes about them."""

    sheets: tuple[Path, ...]
    notes: tuple[str, ...]

    @property
    def facts(self) -> Mapping[str, object]:
        return {"": self.sheets[0].parent, "sheets": ", ".join(sheet.stem for sheet in self.sheets), "notes": len(self.notes)}

    def _repr_html_(self) -> str:
        return "".join(figure([picture(Image.open(sheet), side=960)], sheet.stem, side=960) for sheet in self.sheets)


def preview(recipe: Recipe, out: Path, *, images: int = 6, epoch: int = 0, run: Path | None = None) -> Preview:
    """Write `input.png` (crops and augmentation alone), `augmentation.png` (each step of it), `evaluation.png`, and a sheet for
    each technique alone and for all together.

    A row is one sample of the first step of `epoch` (from 0), with the run's own seed, crops and draws: the original, then
    every view that the step makes of it, with its target, then the maps and masks behind them. `run`: a run with the same
    backbone and classes, whose trained weights make the maps; default: the first weights. Raises FgvcError for all
    that training refuses.
    """
    enabled = list(enabled_techniques(recipe.techniques))
    arms: dict[str, list[str]] = {"input": [], **{kind: [kind] for kind in enabled}}
    if len(enabled) > 1:
        arms["all"] = enabled
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FgvcError(f"{out}: can't make the folder: {error.strerror}") from error
    index = _recorded_index(run, recipe)
    sheets: list[Path] = []
    notes: list[str] = []
    for name, kinds in arms.items():
        techniques = recipe.techniques.model_copy(update={kind: None for kind in enabled if kind not in kinds})
        train = recipe.train.model_copy(update={"workers": 0})
        arm = recipe.model_copy(update={"techniques": techniques, "train": train, "cache": "none"})
        with process_group(arm.train) as process, open_session(arm, process, index=index, teachers="not") as session:
            remembered = run is not None and load_trained(session, run)
            for kind, technique in session.step.techniques.items():
                if name == kind and technique.remembers_images and not remembered:
                    notes.append(
                        f"{kind}.png: {kind} works with what a run remembers of each image, and shows nothing here; give "
                        "--run with a run of these very images"
                    )
            names, font = writable(session.index.classes)
            sheets.append(save_sheet(_step_rows(session, names, images, epoch), out / f"{name}.png", font=font))
            if name == "input":
                notes += session.index.warnings
                steps = _augmentation_rows(session, names, images, epoch)
                sheets.append(save_sheet(steps, out / "augmentation.png", font=font))
                sheets.append(save_sheet(_evaluation_rows(session, names, images), out / "evaluation.png", font=font))
                notes += [ADVICE] if names != list(session.index.classes) else []
    return Preview(tuple(sheets), tuple(notes))


def _recorded_index(run: Path | None, recipe: Recipe) -> ImageIndex | None:
    """Index that a run of the same data recorded, which its techniques may remember; None: the data as they are now."""
    if run is None or not (is_run(run) and (run / NAME).is_file()):
        return None
    ours, theirs = (
        (each.data.root.expanduser().resolve(), each.data.model_dump(exclude={"root", "max_unreadable"}), each.deploy.labels)
        for each in (recipe, read_run(run))
    )
    return recorded_images(run, recipe).index if ours == theirs else None


def _step_rows(session: Session, names: Sequence[str], images: int, epoch: int) -> list[list[Cell]]:
    """Rows of a sheet, one a sample: the original, then the views of one step."""
    raw = next(session.loader.epoch(epoch))
    session.progress.epoch = epoch
    batch = to_batch(raw, session.normalise, session.train_size)
    number = epoch * session.steps_per_epoch
    progress = number / (session.steps_per_epoch * session.recipe.train.epochs)
    draws = session.step.draw(batch, progress, seed=session.recipe.train.seed, step=number)
    _, views = session.step(batch, draws)
    maps_by_name = {
        f"{kind}: {name}": (views[0].x if x is None else x, maps)
        for kind, context in session.step.contexts.items()
        for name, (x, maps) in context.shown.items()
    }
    rows = []
    for at, row in enumerate(batch.index[:images].tolist()):
        original = decode_row(session.index, row)
        cells = [Cell(original, names[int(batch.labels[at])], "original")]
        cells += _partner_cells(session, batch, at, names)
        for kind, change in session.step.hooks("on_sample"):
            changed = np.any(change(np.array(original), row) != np.asarray(original), axis=2)
            cells.append(Cell(overlay(original, changed), "before the crop", kind))
        cells += [_view_cell(view, at, session.preprocess, names) for view in views]
        cells += [
            Cell(overlay(_picture(x[at], session.preprocess), maps[at].detach().cpu().numpy()), "", name)
            for name, (x, maps) in maps_by_name.items()
        ]
        rows.append(cells)
    return rows


def load_trained(session: Session, run: Path) -> bool:
    """Load a run's trained weights into a session; branches as far as both have them. Returns whether the run is of the same
    images: then what its techniques remember of each is loaded, too. Raises FgvcError where the run has other classes, or another
    net or blocks."""
    state = checkpoint.load(run / "ckpt")
    if recorded_classes(run) != session.index.classes:
        raise FgvcError(f"{run}: its classes are not those of {session.recipe.data.root}")
    branches = session.step.branches.state_dict()
    try:
        session.step.net.load_state_dict(state.net)
        session.step.branches.load_state_dict(branches | {k: v for k, v in state.branches.items() if k in branches})
    except RuntimeError as error:
        raise FgvcError(
            f"{run}: its weights do not fit this recipe's net and techniques; give the recipe that it was trained with, "
            f"without re-parameterised blocks ({str(error).splitlines()[-1].strip()})"
        ) from error
    remembered = state.rest.get("images") == fingerprint(session.index)
    if remembered:
        for kind, hook in session.step.hooks("load_state_dict"):
            if kind in state.rest["techniques"]:
                hook(state.rest["techniques"][kind])
    session.progress.micro = 1  # in mid-epoch: nothing is made for a next round
    quiet = Events(run, session.recipe.log, active=False)
    for _, prepare in session.step.hooks("before_epoch"):
        prepare(epoch_start(session, run, quiet, stop=threading.Event()))
    if session.ema is not None:
        session.ema.module.load_state_dict(state.ema or state.net)
    return remembered


def _augmentation_rows(session: Session, names: Sequence[str], images: int, epoch: int) -> list[list[Cell]]:
    """Rows of a sheet, one a sample of the first step: the original, then the picture after each step of the augmentation."""
    rows = []
    for row, steps in session.loader.steps(epoch, images):
        original = Cell(decode_row(session.index, row), names[int(session.index.labels[row])], "original")
        rows.append([original, *(Cell(Image.fromarray(picture), "", name) for name, picture in steps)])
    return rows


def _evaluation_rows(session: Session, names: Sequence[str], images: int) -> list[list[Cell]]:
    """Rows of a sheet: images of the validation split (else test, else train) beside their crops in evaluation and serving."""
    index = session.index
    rows = spread(next(rows for split in ("val", "test", "train") if len(rows := index.rows(split))), images)
    loader = evaluation_loader(index, rows, spec=session.preprocess, batch_size=len(rows), workers=0)
    cells = []
    for batch in loader:
        for x, y, row in zip(batch.images, batch.labels.tolist(), batch.index.tolist(), strict=True):
            original = Cell(decode_row(index, row), names[y], "original")
            cells.append([original, Cell(_picture(x, session.preprocess), "", "evaluation")])
    return cells


def _partner_cells(session: Session, batch: Batch, at: int, names: Sequence[str]) -> Iterator[Cell]:
    """The images of the batch that techniques mix into the one at position `at`, as they are before that."""
    for kind, technique in session.step.techniques.items():
        drawn = session.step.contexts[kind].draw
        if isinstance(technique, MixingTechnique) and drawn is not None:
            for row in partner_rows(drawn)[at].tolist():
                yield Cell(_picture(batch.x[row], session.preprocess), names[int(batch.labels[row])], f"{kind}: mixed in")


def _view_cell(view: View, at: int, spec: Preprocess, names: Sequence[str]) -> Cell:
    text = _target(view.target, at, names) if view.classifies else "not classified"
    return Cell(_picture(view.x[at], spec), text, view.name)


def _target(target: Target, at: int, names: Sequence[str]) -> str:
    shares: dict[str, float] = {}
    for labels, weights in target:
        name = names[int(labels[at])]
        shares[name] = shares.get(name, 0.0) + (1.0 if weights is None else float(weights[at]))
    return " + ".join(f"{share:.2f} {name}" for name, share in shares.items() if share > 0.005)


def _picture(x: Tensor, spec: Preprocess) -> Image.Image:
    """Turn an input of the network (3,H,W) into a picture: the inverse of `fgvc.images.preprocess.normalise`."""
    pixels = x.detach().float().cpu().numpy().transpose(1, 2, 0)
    pixels = (pixels * np.array(spec.std) + np.array(spec.mean)) * 255 / spec.input_range
    pixels = pixels[..., ::-1] if spec.channel_order == "bgr" else pixels
    return Image.fromarray(np.round(pixels.clip(0, 255)).astype(np.uint8))
