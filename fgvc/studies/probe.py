"""Probing of a set (`fgvc probe`): accuracy of logistic regressions on the frozen features of candidate nets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fgvc.config.data import SPLITS
from fgvc.config.images import Preprocess
from fgvc.config.loading import override, validate
from fgvc.config.recipe import Recipe
from fgvc.config.shipped import recipe_file
from fgvc.data.index import ImageIndex
from fgvc.data.recipe import images_at, kind_at, load_recipe, resolve_data
from fgvc.data.splits import sampled
from fgvc.errors import FgvcError
from fgvc.evaluation.features import Features, embed_rows
from fgvc.evaluation.learning_curve import Curve, Fold, learning_curve, make_folds
from fgvc.io.display import Display, table
from fgvc.io.names import some
from fgvc.models.weights import PACKAGED, is_packaged
from fgvc.runs.distributed import process_group
from fgvc.runs.images import read_index, run_overlap
from fgvc.studies.candidate import WRITE, Candidate, from_weights, open_candidate

IMAGES = 3000
LEAST = 5  # images of each class in a sample: one in each fold, and others to learn from
WHOLE = 1.0  # share of the image that the evaluation crop keeps
Size = tuple[int, int]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Images to probe: those to learn from, validation included, never those of test."""

    source: str  # as on the command line
    overrides: tuple[str, ...]
    path: Path | None  # of the recipe; None: a folder or a table
    recipe: Recipe
    index: ImageIndex
    rows: NDArray[np.int64]  # (N,) of the index, ascending
    available: int  # images that there are to learn from; N is fewer where a sample was drawn
    scarce: int  # classes with an image and too few to hold one out
    folds: list[Fold]

    @property
    def groups(self) -> NDArray[np.str_] | None:
        return None if self.index.groups is None else self.index.groups[self.rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Result of one net at one size and crop."""

    candidate: Candidate
    size: Size
    crop: float  # share of the resized image that the evaluation crop keeps
    curve: Curve
    seconds: float  # of the net, for one image in a batch
    macs: int | None
    trained_images: int  # of these images, those that the net was trained on: then its accuracy is too high

    @property
    def accuracy(self) -> float:
        return self.curve.accuracy().value


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ProbeResults(Display):
    """Results of all nets, sizes and crops, and notes."""

    data: Data
    results: tuple[Result, ...]  # the best first, those of nets that were trained on the images at the end
    first: Candidate  # what is deployed: the recipe's own net, or the first that was named
    notes: tuple[str, ...]
    threads: int
    device: str

    @property
    def facts(self) -> Mapping[str, object]:
        best = self.results[0]
        name = f"{best.candidate.name} at {' x '.join(map(str, best.size))}"
        return {"": self.data.source, "images": len(self.data.rows), "best": f"{name}, top-1 {100 * best.accuracy:.1f} %"}

    def _repr_html_(self) -> str:
        rows = (
            (r.candidate.name, " x ".join(map(str, r.size)), f"{r.crop:.3g}", f"{100 * r.accuracy:.1f}")
            for r in self.results
        )
        return table(rows, head=("start", "px", "crop", "top-1 %"))


def probe(
    data: str,
    overrides: Sequence[str] = (),
    *,
    starts: Sequence[str] = (),
    sizes: Sequence[Size] = (),
    crops: Sequence[float] = (),
    images: int = IMAGES,
    progress: Progress | None = None,
) -> ProbeResults:
    """Judge nets by logistic regression on their frozen features, cross-validated within the images to learn from.

    `data`: a folder or a table, a recipe or its id. `starts`: nets, see `fgvc.studies.candidate.WRITE`,
    beside the recipe's own; `sizes` (height, width): by default the recipe's, or each net's own; `crops`: shares of the resized
    image that the evaluation crop keeps, by default the net's own and 1. `images`: most that are looked at; of more a stratified
    sample is drawn, of each class LEAST or all that it has.
    Raises FgvcError where nothing can be read or held out, or a net is not there or can't be used.
    """
    probed = _read_data(data, overrides, images)
    candidates, notes = _candidates(probed, starts, sizes)
    results: list[Result] = []
    with process_group(probed.recipe.train) as process:
        for candidate in candidates:
            trained_images = 0 if candidate.run is None else run_overlap(candidate.run, probed.index, probed.rows)
            if trained_images:
                count = f"{trained_images} of these {len(probed.rows)} images"
                notes.append(
                    f"{candidate.name} was trained on {count}: its figures are too high, and nothing is advised by them"
                )
            strength = None
            for size in _sizes(candidate, sizes, notes):
                for crop in crops or _crops(candidate, probed):
                    spec = candidate.spec.model_copy(update={"size": size, "crop_pct": crop})
                    features = _features(candidate, spec, probed, process.device, progress)
                    if not results:
                        probed = _drop_unreadable(probed, features)
                        notes += [f"skipped: {reason}" for reason in features.unreadable]
                    curve = _curve(candidate, features, probed, strength)
                    strength = curve.strength
                    results.append(
                        Result(
                            candidate=candidate,
                            size=size,
                            crop=crop,
                            curve=curve,
                            seconds=features.seconds,
                            macs=candidate.macs(size),
                            trained_images=trained_images,
                        )
                    )
    if not any(result.candidate is candidates[0] for result in results):
        raise FgvcError(
            "\n".join([f"{candidates[0].name}: could not be tried, and the others are compared with it:", *notes])
        )
    results.sort(key=lambda result: (result.trained_images > 0, -result.accuracy))
    return ProbeResults(
        data=probed,
        results=tuple(results),
        first=candidates[0],
        notes=tuple(dict.fromkeys(notes)),
        threads=torch.get_num_threads(),
        device=str(process.device),
    )


def _features(
    candidate: Candidate, spec: Preprocess, data: Data, device: torch.device, progress: Progress | None
) -> Features:
    what = f"{candidate.name}, {spec.size[0]} px, crop {spec.crop_pct:g}"
    return embed_rows(
        candidate.embed(device),
        data.index,
        data.rows,
        spec=spec,
        workers=data.recipe.train.workers,
        progress=None if progress is None else partial(progress, what),
    )


def _curve(candidate: Candidate, features: Features, data: Data, strength: float | None) -> Curve:
    if not np.array_equal(features.rows, data.rows):
        raise FgvcError("an image could be read once, and once not: leave the files alone while they are probed")
    if not np.isfinite(features.vectors).all():
        raise FgvcError(f"{candidate.name}: its features hold values that are no numbers; its weights are broken")
    labels, seed = data.index.labels[data.rows], data.recipe.data.split_seed
    return learning_curve(features.vectors, labels, data.folds, groups=data.groups, strength=strength, seed=seed)


def _read_data(data: str, overrides: Sequence[str], images: int) -> Data:
    """Read the images of a folder, a table or a recipe. Raises FgvcError where there are none."""
    path = None
    if (place := images_at(data)) is not None:
        tree: dict[str, Any] = {"data": {"kind": kind_at(place), "root": data}, "model": {"backbone": "resnet18"}}
        for text in overrides:
            override(tree, text)
        recipe = resolve_data(validate(Recipe, tree, where=data, overrides=overrides))
    else:
        path = recipe_file(data)
        recipe = load_recipe(path, overrides)
    index = read_index(recipe)
    learning = np.flatnonzero(index.splits != SPLITS.index("test"))
    if not len(learning):
        raise FgvcError(f"{data}: no images to learn from: all of them are in the test split")
    rows = learning[sampled(index.labels[learning], images, least=LEAST, seed=recipe.data.split_seed)]
    source_data = Data(
        source=data,
        overrides=tuple(overrides),
        path=path,
        recipe=recipe,
        index=index,
        rows=rows,
        available=len(learning),
        scarce=0,
        folds=[],
    )
    return _with_folds(source_data)


def _with_folds(data: Data) -> Data:
    """Copy with folds of its rows."""
    labels = data.index.labels[data.rows]
    folds = make_folds(labels, data.groups, seed=data.recipe.data.split_seed)
    judged = np.unique(labels[np.concatenate([fold.held_out for fold in folds])])
    return replace(data, folds=folds, scarce=len(np.setdiff1d(labels, judged)))


def _drop_unreadable(data: Data, features: Features) -> Data:
    """Copy with the images that could be read. Raises FgvcError where too many can't be."""
    unreadable, limit = len(features.unreadable), data.recipe.data.max_unreadable
    if unreadable > limit * len(data.rows):
        raise FgvcError(
            f"{unreadable} of {len(data.rows)} images can't be read, data.max_unreadable={limit:g} allows fewer: "
            f"{some(features.unreadable)}"
        )
    return _with_folds(replace(data, rows=features.rows)) if unreadable else data


def _candidates(data: Data, starts: Sequence[str], sizes: Sequence[Size]) -> tuple[list[Candidate], list[str]]:
    """Open the recipe's own net and those named; return them with notes."""
    recipe = data.recipe
    stated = data.path is not None or any(text.startswith("image.size=") for text in data.overrides)
    size = sizes[0] if sizes else recipe.image.size if stated else None
    candidates: list[Candidate] = []
    notes: list[str] = []
    if recipe.model.weights != "none":
        try:
            candidates.append(from_weights(recipe.model, recipe.deploy, size))
        except FgvcError as error:
            if not starts:
                raise
            notes.append(f"the recipe's own net is left out: {error}")
    texts = list(starts)
    if not candidates and not texts:
        if data.path is not None or not is_packaged(PACKAGED):
            raise FgvcError(f"which net? Name weights that are at hand by --start: {WRITE}")
        texts = [f"{PACKAGED}=packaged"]
    candidates += [open_candidate(text, deploy=recipe.deploy, size=size) for text in texts]
    for candidate in candidates:
        notes += candidate.notes
    return _unique_names(_distinct(candidates)), notes


def _distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Drop repetitions of a net with the same weights."""
    by_net: dict[object, Candidate] = {}
    for candidate in candidates:
        model = candidate.model
        key = (model.backbone, model.onnx, str(model.kwargs), model.weights) if model is not None else candidate.name
        by_net.setdefault(key, candidate)
    return list(by_net.values())


def _unique_names(candidates: list[Candidate]) -> list[Candidate]:
    """Number equal names, so that all differ."""
    names = [candidate.name for candidate in candidates]
    return [
        c if names.count(c.name) == 1 else replace(c, name=f"{c.name} #{names[: at + 1].count(c.name)}")
        for at, c in enumerate(candidates)
    ]


def _sizes(candidate: Candidate, sizes: Sequence[Size], notes: list[str]) -> list[Size]:
    """Select the sizes that a net can take, else its own where it has but one; those that it can't take are noted."""
    usable = []
    for size in dict.fromkeys(sizes) if sizes else [candidate.spec.size]:
        try:
            candidate.refuse_size(size)
            usable.append(size)
        except FgvcError as error:
            notes.append(str(error))
    return usable or [candidate.spec.size] * candidate.fixed


def _crops(candidate: Candidate, data: Data) -> list[float]:
    """Default crops: the net's own and the whole image; of a deployed stack that states its crop, that one."""
    crop = candidate.spec.crop_pct
    return [crop] if data.recipe.deploy.crop_pct is not None else list(dict.fromkeys([crop, WHOLE]))
