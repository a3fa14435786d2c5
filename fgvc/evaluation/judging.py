"""Selection of the images that a comparison is made on: with a deployed file, those that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fgvc.config.data import SPLITS, Split
from fgvc.config.shipped import recipe_file
from fgvc.data.beside import read_folder, with_folder
from fgvc.data.index import ImageIndex, spread
from fgvc.data.recipe import load_recipe
from fgvc.data.unseen import OPTIONS, Pool, Seen, all_seen, seen_words, unseen_pool
from fgvc.errors import FgvcError, NoUnseenImagesError
from fgvc.evaluation.assignment import log_probabilities
from fgvc.evaluation.compared import Images
from fgvc.evaluation.side import Side
from fgvc.io.names import some
from fgvc.io.places import TABLES
from fgvc.runs.folder import is_run, read_run
from fgvc.runs.images import descends_from_file, file_names, first_index, read_index, recorded_images
from fgvc.runs.loaded import Answers, LoadedRun

SAMPLE = 500  # images that a file is asked about whether it has seen them


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """The set of images to compare on, with its splits and the ones that a run learned from."""

    name: str
    index: ImageIndex
    rows_of: Callable[[Split], NDArray[np.int64]]
    workers: int = 0
    learned: tuple[Split, ...] = ()  # splits that one of the sides has learned from, or was chosen by
    seen: Seen = "train"

    @property
    def undivided(self) -> bool:
        """Whether all images lie in one split, so that nothing says which were learned from."""
        return len(self.index.rows("train")) == len(self.index)

    @property
    def learned_rows(self) -> NDArray[np.int64]:
        return np.flatnonzero(np.isin(self.index.splits, [SPLITS.index(split) for split in self.learned]))


def select_images(
    data: str | None,
    sides: Sequence[Side],
    split: Split | None = None,
    *,
    seen: Seen | None = None,
    unseen: Path | None = None,
    max_pixels: int | None = None,
) -> Images:
    """Select the images to compare on, of `data` (a folder or table, a recipe or a run) or by default of the first side that is a
    run; `max_pixels`: of a picture, in place of the data's own limit.

    Where a side is a deployed file, or descends from one: those that judge by the record of a side, else those that the file has
    not seen (`seen`, as of `deploy.seen`; `unseen`: a folder of such images, in place of others) without near copies of the rest.
    Between others, and where `split` says so: one split, by default val where there is one, else test; all of a folder that
    has no splits.

    Raises FgvcError where there are none, or of classes that the sides do not know; NoUnseenImagesError where the deployed file
    may have seen all.
    """
    deployed = [side for side in sides if side.deployed]
    if (seen is not None or unseen is not None) and not deployed:
        raise FgvcError("--seen and --unseen: say what a deployed file was trained on, and neither side is one")
    if split is not None and (seen is not None or unseen is not None):
        raise FgvcError("--split: names the images by itself; give it without --seen and --unseen")
    source = _source(data, sides, seen)
    if unseen is not None:
        images = _of_folder(source, unseen)
    elif source is None:
        raise FgvcError(f"which images? Neither side is a run: give --data, {_advice(sides)}")
    elif not deployed or split is not None:
        recorded = _recorded(source, sides) if source.undivided and split in (None, "test") else None
        images = recorded or _of_split(source, split, deployed)
    else:
        recorded = _recorded(source, sides) if seen is None else None
        images = recorded or _by_rule(source, source.seen if seen is None else seen, deployed[0])
    if unknown := sorted(set(images.index.classes) - set(sides[0].classes)):
        raise FgvcError(f"{images.index.root}: has classes that {sides[0].path} does not know: {some(unknown)}")
    return images if max_pixels is None else replace(images, index=replace(images.index, max_pixels=max_pixels))


def _advice(sides: Sequence[Side]) -> str:
    bundle = next((side for side in sides if side.judge is not None), None)
    return "a folder of class folders or a recipe" if bundle is None else f"the set of the run that {bundle.path} is of"


def _source(data: str | None, sides: Sequence[Side], seen: Seen | None) -> _Source | None:
    """The set that `data` names, or that of the first run; None: none is named."""
    run = next((side.run for side in sides if side.run is not None), None)
    if data is None:
        return None if run is None else _of_run(run)
    place = Path(data)
    if is_run(place):
        recipe = read_run(place)
        recorded = recorded_images(place, recipe)
        learned: tuple[Split, ...] = ("train", "val") if recorded.index.unseen else ("train",)
        return _Source(
            name=data, index=recorded.index, rows_of=recorded.rows, workers=recipe.train.workers, learned=learned,
            seen=recipe.deploy.seen,
        )  # fmt: skip
    if place.is_dir() or place.suffix.lower() in TABLES:
        index = read_folder(place)
        return _Source(name=data, index=index, rows_of=index.rows)
    recipe = load_recipe(recipe_file(data))
    index = first_index(recipe) if seen is None and descends_from_file(recipe) else read_index(recipe)
    learned = ("train", "val") if index.unseen else ("train",)
    return _Source(
        name=data, index=index, rows_of=index.rows, workers=recipe.train.workers, learned=learned, seen=recipe.deploy.seen
    )


def _of_run(run: LoadedRun) -> _Source:
    """The images of a side, which has learned from one split and was chosen by another."""
    return _Source(
        name=str(run.folder), index=run.index, rows_of=run.rows, workers=run.recipe.train.workers, learned=("train", "val"),
        seen=run.recipe.deploy.seen,
    )  # fmt: skip


def _of_split(source: _Source, split: Split | None, deployed: Sequence[Side]) -> Images:
    index = source.index
    if split is None and source.undivided:
        return Images(index=index, rows=np.arange(len(index)), split="all", workers=source.workers)
    chosen: Split = split or ("val" if len(index.rows("val")) else "test")
    if not len(rows := source.rows_of(chosen)):
        raise FgvcError(f"{source.name}: its data has no {chosen} split")
    notes: tuple[str, ...] = ()
    if index.unseen and chosen == "val":
        notes = ("these images chose between the epochs of a run, which favours it; without --split, those judge that did not",)
    elif deployed and not index.unseen and chosen not in index.given_splits:
        notes = (
            f"fgvc drew this {chosen} split from images that {deployed[0].path} may have been trained on, which favours it",
        )
    unseen = index.unseen if chosen == "test" else ""
    return Images(index=index, rows=rows, split=chosen, workers=source.workers, unseen=unseen, notes=notes)


def _of_folder(source: _Source | None, folder: Path) -> Images:
    """Select all images of a folder that a deployed file has not seen, without near copies of images of the set."""
    if source is None:
        index = read_folder(folder)
        note = "near copies of images that were seen are not left out: --data names no set to look for them"
        return Images(index=index, rows=np.arange(len(index)), split="all", unseen=folder.resolve().name, notes=(note,))
    index = with_folder(source.index, folder, where="--unseen")
    pool = unseen_pool(index, "train", learned=np.arange(len(source.index)), beside=folder, ways=OPTIONS)
    return Images(index=index, rows=_all_of(pool), split="test", workers=source.workers, unseen=pool.named())


def _recorded(source: _Source, sides: Sequence[Side]) -> Images | None:
    """The images of the source's set that judge by the record of a run or bundle, of those of both sides where both have one, or
    by that of the source; None: no record is of this set."""
    root = source.index.root.resolve()
    claims: list[tuple[Path, Images]] = []
    for side in sides:
        if side.run is not None and side.run.index.unseen and side.run.index.root.resolve() == root:
            rows = side.run.rows("test")
            claims.append((side.path, Images(index=side.run.index, rows=rows, split="test", unseen=side.run.index.unseen)))
        elif side.judge is not None and (images := _of_bundle(side, source.index)) is not None:
            claims.append((side.path, images))
    if not claims and source.index.unseen:
        claims.append((Path(source.name), _of_split(source, "test", ())))
    if not claims:
        return None
    owner, images = claims[0]
    names = np.array(file_names(images.index, images.rows))
    for other, others in claims[1:]:
        both = np.isin(names, file_names(others.index, others.rows))
        if not both.any():
            raise NoUnseenImagesError(
                f"{owner} and {other}: no image judges both: each has learned from those that judge the other, or was chosen by "
                "them; give --unseen DIR, a folder of images that neither has seen"
            )
        images, names = replace(images, rows=images.rows[both]), names[both]
    return replace(images, workers=source.workers, set_aside=str(owner))


def _of_bundle(side: Side, index: ImageIndex) -> Images | None:
    """The images that judge a bundle by its record, below the root of a set; None where none of them is there."""
    assert side.judge is not None
    recorded: dict[str, str] = dict(side.judge["images"])
    present = {name: label for name, label in recorded.items() if (index.root / name).is_file()}
    if not present:
        return None
    own = ImageIndex(
        root=index.root,
        classes=side.classes,
        paths=np.array(list(present), dtype=np.dtypes.StringDType()),
        labels=np.array([side.classes.index(label) for label in present.values()], np.int32),
        splits=np.full(len(present), SPLITS.index("test"), np.int8),
        max_pixels=index.max_pixels,
    )
    gone = len(recorded) - len(present)
    notes = (f"{gone} of the {len(recorded)} images that judge {side.path} are not in {index.root}",) if gone else ()
    return Images(index=own, rows=np.arange(len(own)), split="test", unseen=side.judge["unseen"], notes=notes)


def _by_rule(source: _Source, seen: Seen, deployed: Side) -> Images:
    """The images of a set that a deployed file has not seen, and from which neither side has learned."""
    index = source.index
    if seen == "train" and not index.given_splits:
        raise NoUnseenImagesError(all_seen(index.root, OPTIONS, evidence(deployed, index)))
    learned, notes = source.learned_rows, tuple[str, ...]()
    given = np.isin(index.splits, [SPLITS.index(split) for split in index.given_splits])
    if seen == "train" and "val" in source.learned and np.isin(np.flatnonzero(given), learned).all():
        learned = index.rows("train")
        notes = ("these images chose between the epochs of a run, which favours it: the set has no others that were not seen",)
    pool = unseen_pool(index, seen, learned=learned, ways=OPTIONS)
    splits = {SPLITS[k] for k in np.unique(index.splits[pool.rows]).tolist()}
    name = splits.pop() if len(splits) == 1 and index.given_splits else "unseen"
    return Images(
        index=index, rows=_all_of(pool), split=name, workers=source.workers, unseen=pool.named(), notes=notes
    )


def _all_of(pool: Pool) -> NDArray[np.int64]:
    """The rows of a pool, with those that can't be read, which are reported."""
    return np.union1d(pool.rows, pool.unreadable)


def evidence(side: Side, index: ImageIndex) -> str:
    """Describe how well a deployed file names images of a set, up to SAMPLE of all classes; empty: none could be evaluated."""
    if not set(index.classes) <= set(side.classes) or not len(index):
        return ""
    rows = spread(np.argsort(index.labels, kind="stable"), SAMPLE)
    answers = side.answers(index, rows, workers=0)
    numbers = np.array([side.classes.index(name) for name in index.classes])
    return score_words(answers, numbers[answers.labels]) if len(answers.rows) else ""


def score_words(answers: Answers, labels: NDArray[np.int64]) -> str:
    """Accuracy and mean loss of answers, in the words of `seen_words`; `labels` (N,): numbers of outputs."""
    losses = -log_probabilities(answers.logits, answers.ending)[np.arange(len(labels)), labels]
    return seen_words(float((answers.logits.argmax(1) == labels).mean()), float(losses.mean()))
