"""Batches for training and evaluation.

Nothing here depends on the number of workers or on what was loaded before: the order is drawn from (seed, epoch), a
sample from (seed, epoch, row and how often it came before), and torch's global generator is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fgvc.config.images import Preprocess
from fgvc.data.augment import Augmenter
from fgvc.data.cache import DecodeCache
from fgvc.data.index import ImageIndex
from fgvc.errors import FgvcError, ImageError
from fgvc.images.decode import read_picture
from fgvc.images.preprocess import preprocess
from fgvc.images.upright import turned_boxes, turned_points, turned_sides
from fgvc.rng import ORDER, SAMPLE, generator

OnSample = Callable[[NDArray[np.uint8], int], NDArray[np.uint8]]
"""(h,w,3) uint8 image and its row -> image of the same size, in a worker, before any geometry. Workers are forked once:
what changes during training must be read from disk or shared memory."""

Sides = tuple[int, int]  # width, height
Key = tuple[int, int, int]  # epoch, row, how often that row came in the epoch before

BEFORE = 2**31  # the first of the epoch numbers that stand for views before training

_NAMED = 50  # unreadable files listed in a message
_SUBSTITUTES = 50  # rows tried in place of an unreadable one


@dataclass(slots=True)
class TrainBatch:
    """Augmented images, not yet normalised."""

    images: Tensor  # (B,H,W,3) uint8 RGB
    labels: Tensor  # (B,) int64
    index: Tensor  # (B,) int64: rows of the ImageIndex
    geometry: Tensor  # (B,2,3) float32: crop -> original, in continuous pixels (a pixel's centre is at + 0.5)
    bad: list[ImageError]  # unreadable files met for the first time
    boxes: Tensor | None = None  # (B,4) float32: x, y, width, height in the original, upright; NaN where there is none

    def pin_memory(self) -> TrainBatch:
        images, labels = self.images.pin_memory(), self.labels.pin_memory()
        boxes = None if self.boxes is None else self.boxes.pin_memory()
        return TrainBatch(images, labels, self.index.pin_memory(), self.geometry.pin_memory(), self.bad, boxes)


@dataclass(slots=True)
class EvaluationBatch:
    """Images as serving would see them."""

    images: Tensor  # (B,3,H,W) float32, normalised
    labels: Tensor  # (B,) int64
    index: Tensor  # (B,) int64: rows of the ImageIndex
    sizes: Tensor  # (B,2) int64: height and width of the originals, upright
    bad: list[ImageError]  # unreadable files, which are left out
    boxes: NDArray[np.float32] | None = None  # (B,4) of the originals, as in TrainBatch
    parts: NDArray[np.float32] | None = None  # (B,P,3): x, y, visible; of the originals, upright

    def pin_memory(self) -> EvaluationBatch:
        images, labels, sizes = self.images.pin_memory(), self.labels.pin_memory(), self.sizes.pin_memory()
        return EvaluationBatch(images, labels, self.index.pin_memory(), sizes, self.bad, self.boxes, self.parts)


class BadFiles:
    """Unreadable files, each counted once, up to a share of the set."""

    def __init__(self, *, limit: float, images: int) -> None:
        self.limit, self.images = limit, images
        self.found: dict[str, ImageError] = {}

    def add(self, errors: Iterable[ImageError]) -> list[ImageError]:
        """Those not seen before. Raises FgvcError with the whole list once there are too many."""
        fresh = [error for error in errors if self.found.setdefault(error.path, error) is error]
        if fresh and len(self.found) > self.limit * self.images:
            raise FgvcError(
                f"{len(self.found)} of {self.images} images can't be read, data.max_unreadable={self.limit:g} allows fewer. "
                "Raise it, and the run goes on without them; or mend or remove them, and begin a new run:\n"
                f"{_names(self.found.values())}"
            )
        return fresh


def _names(errors: Iterable[ImageError]) -> str:
    lines = [f"  {error}" for error in errors]
    return "\n".join(lines[:_NAMED] + ([f"  and {len(lines) - _NAMED} more"] if len(lines) > _NAMED else []))


def train_loader(
    index: ImageIndex,
    rows: NDArray[np.int64],
    *,
    augmenter: Augmenter,
    batch_size: int,
    seed: int,
    workers: int,
    cache: DecodeCache | None = None,
    rank: int = 0,
    world: int = 1,
    on_sample: Sequence[OnSample] = (),
    max_unreadable: float = 0.05,
    balanced: bool = False,
) -> TrainLoader:
    """Endless, resumable epochs over `rows` in batches of `batch_size` for this rank. Close it after use.

    `balanced`: an epoch has as many samples, drawn with replacement so that every class comes equally often on average;
    an image that comes again is augmented anew.
    """
    samples = _Samples(index, np.asarray(rows, dtype=np.int64), augmenter, seed, cache, tuple(on_sample))
    labels = index.labels[samples.rows] if balanced else None
    order = _Order(samples.rows, seed, batch_size=batch_size, rank=rank, world=world, labels=labels)
    loader = _torch_loader(samples, order, workers, persistent=True)
    return TrainLoader(loader, order, limit=max_unreadable)


def augmented_views(
    index: ImageIndex,
    rows: NDArray[np.int64],
    *,
    augmenter: Augmenter,
    views: int,
    batch_size: int,
    seed: int,
    workers: int,
) -> Iterator[TrainBatch]:
    """Each of `rows` `views` times, augmented as no epoch of training augments it. An unreadable file is replaced as there."""
    samples = _Samples(index, np.asarray(rows, dtype=np.int64), augmenter, seed, None, ())
    keys: list[Key] = [(BEFORE + view, row, 0) for view in range(views) for row in samples.rows.tolist()]
    yield from _each(_torch_loader(samples, [keys[at : at + batch_size] for at in range(0, len(keys), batch_size)], workers))


class TrainLoader:
    """What `train_loader` returns."""

    def __init__(self, loader: DataLoader[TrainBatch], order: _Order, *, limit: float) -> None:
        self.steps_per_epoch = len(order.rows) // (order.batch_size * order.world)  # what is left over differs by epoch
        self.bad = BadFiles(limit=limit, images=len(order.rows))
        self._order = order
        self._loader: DataLoader[TrainBatch] | None = loader
        self._running: Iterator[TrainBatch] | None = None

    def epoch(self, number: int, start: int = 0) -> Iterator[TrainBatch]:
        """The micro-batches of one epoch from `start` on; ends the epoch before, if it still ran.

        An unreadable file is replaced by another row, drawn from (seed, epoch, row). Raises FgvcError when there are
        too many of them.
        """
        self._stop()
        self._order.epoch, self._order.start = number, start
        self._running = self._run()
        return self._running

    def close(self) -> None:
        """End the workers."""
        self._stop()
        self._loader = None  # the last reference: torch's iterator ends its workers when it goes

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()  # type: ignore[attr-defined]
            self._running = None

    def _run(self) -> Iterator[TrainBatch]:
        if self._loader is None:
            raise FgvcError("the training loader is closed: make a new one")
        for batch in _each(self._loader):
            batch.bad = self.bad.add(batch.bad)
            yield batch


def evaluation_loader(
    index: ImageIndex,
    rows: NDArray[np.int64],
    *,
    spec: Preprocess,
    batch_size: int,
    workers: int,
    rank: int = 0,
    world: int = 1,
    some: bool = True,
) -> Iterator[EvaluationBatch]:
    """This rank's share of `rows`, each image once and in order, decoded from the original and preprocessed as in
    serving. Unreadable ones are left out and reported. Raises FgvcError where none can be read, if there must be `some`."""
    mine = np.asarray(rows, dtype=np.int64)[rank::world]
    batches = [mine[at : at + batch_size].tolist() for at in range(0, len(mine), batch_size)]
    held: EvaluationBatch | None = None
    errors: list[ImageError] = []
    for batch in _each(_torch_loader(_Originals(index, spec), batches, workers)):
        if not len(batch.labels):  # all bad: reported with the batch before or after
            (errors if held is None else held.bad).extend(batch.bad)
            continue
        if held is not None:
            yield held
        batch.bad[:0] = errors
        held, errors = batch, []
    if held is not None:
        yield held
    elif errors and some:
        raise FgvcError(f"none of the {len(mine)} images to evaluate can be read; the first: {errors[0]}")


class _Order:
    """Batches of keys for one rank: a pure function of seed, epoch and start.

    Without `labels` a permutation of `rows`; with those of the rows, as many rows with replacement, each with probability
    1 / (classes that occur * rows of its class).
    """

    def __init__(
        self,
        rows: NDArray[np.int64],
        seed: int,
        *,
        batch_size: int,
        rank: int,
        world: int,
        labels: NDArray[np.int32] | None = None,
    ) -> None:
        self.rows, self.seed, self.batch_size, self.rank, self.world = rows, seed, batch_size, rank, world
        self.epoch = self.start = 0
        self.share: NDArray[np.float64] | None = None
        if labels is not None and len(labels):
            counts = np.bincount(labels)
            self.share = 1 / (np.count_nonzero(counts) * counts[labels])

    def __iter__(self) -> Iterator[list[Key]]:
        """A step's rows over all ranks are consecutive in the order, whatever the number of ranks."""
        epoch = self.epoch
        rng = generator(ORDER, self.seed, epoch)
        if self.share is None:
            order, turns = rng.permutation(self.rows), np.zeros(len(self.rows), np.int64)
        else:
            order = rng.choice(self.rows, len(self.rows), p=self.share)
            turns = _turns(order)
        together = self.batch_size * self.world
        for step in range(self.start, len(order) // together):
            mine = slice(step * together + self.rank, (step + 1) * together, self.world)
            yield [(epoch, row, turn) for row, turn in zip(order[mine].tolist(), turns[mine].tolist(), strict=True)]


def _turns(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each element, how many equal ones come before it."""
    by_row = np.argsort(order, kind="stable")
    first = np.searchsorted(order, order, sorter=by_row)  # where an element's own run of equals begins
    turns = np.empty(len(order), np.int64)
    turns[by_row] = np.arange(len(order)) - first[by_row]
    return turns


class _Samples(Dataset[TrainBatch]):
    """Loads and augments one batch at a time."""

    def __init__(
        self,
        index: ImageIndex,
        rows: NDArray[np.int64],
        augmenter: Augmenter,
        seed: int,
        cache: DecodeCache | None,
        on_sample: tuple[OnSample, ...],
    ) -> None:
        self.index, self.rows, self.augmenter, self.seed = index, rows, augmenter, seed
        self.cache, self.on_sample = cache, on_sample

    def __getitems__(self, keys: list[Key]) -> TrainBatch | FgvcError:
        """An error that ends training is returned: raised in a worker it would reach the user as a traceback."""
        height, width = self.augmenter.spec.size
        images = np.empty((len(keys), height, width, 3), dtype=np.uint8)
        geometry = np.empty((len(keys), 2, 3), dtype=np.float32)
        taken = np.empty(len(keys), dtype=np.int64)
        boxes = None if self.index.boxes is None else np.empty((len(keys), 4), dtype=np.float32)
        bad: list[ImageError] = []
        for at, (epoch, row, turn) in enumerate(keys):
            try:
                taken[at], image, original, orientation = self._readable(epoch, row, bad)
            except FgvcError as error:
                return error
            if boxes is not None:
                boxes[at] = _box(self.index, int(taken[at]), original, orientation)
            if self.on_sample:
                image = self._hooked(image.copy(), int(taken[at]))
            # The key stays the drawn row's, so that a substitute differs from its own turn in this epoch.
            images[at], to_image = self.augmenter(image, epoch=epoch, row=row, turn=turn)
            scale = np.array([[original[0] / image.shape[1]], [original[1] / image.shape[0]]], dtype=np.float32)
            geometry[at] = scale * to_image
        labels = torch.from_numpy(self.index.labels[taken].astype(np.int64))
        found = None if boxes is None else torch.from_numpy(boxes)
        rows, matrices = torch.from_numpy(taken), torch.from_numpy(geometry)
        return TrainBatch(torch.from_numpy(images), labels, rows, matrices, bad, found)

    def _readable(self, epoch: int, row: int, bad: list[ImageError]) -> tuple[int, NDArray[np.uint8], Sides, int]:
        """The row's image, or another's in its place: row, image, the original's (width, height) upright, and its EXIF
        orientation."""
        substitutes: np.random.Generator | None = None
        drawn = row
        for _ in range(_SUBSTITUTES):
            try:
                return (row, *self._load(row))
            except ImageError as error:
                bad.append(error)
                substitutes = substitutes or generator(SAMPLE, self.seed, epoch, drawn, 1)
                row = int(substitutes.choice(self.rows))
        names = _names({error.path: error for error in bad}.values())
        raise FgvcError(f"{_SUBSTITUTES} images in turn can't be read:\n{names}")

    def _load(self, row: int) -> tuple[NDArray[np.uint8], Sides, int]:
        if self.cache is not None:
            return (*self.cache.image(row), self.cache.orientation(row))
        picture = read_picture(self.index.path(row), max_pixels=self.index.max_pixels)
        return np.array(picture.image), picture.size, picture.orientation

    def _hooked(self, pixels: NDArray[np.uint8], row: int) -> NDArray[np.uint8]:
        for hook in self.on_sample:
            pixels = hook(pixels, row)
        return pixels


class _Originals(Dataset[EvaluationBatch]):
    """Decodes and preprocesses one batch at a time."""

    def __init__(self, index: ImageIndex, spec: Preprocess) -> None:
        self.index, self.spec = index, spec

    def __getitems__(self, rows: list[int]) -> EvaluationBatch:
        images = np.empty((len(rows), 3, *self.spec.size), dtype=np.float32)
        sizes = np.empty((len(rows), 2), dtype=np.int64)
        boxes = None if self.index.boxes is None else np.empty((len(rows), 4), dtype=np.float32)
        parts = None if self.index.parts is None else self.index.parts[rows].copy()
        read: list[int] = []
        bad: list[ImageError] = []
        for row in rows:
            at = len(read)
            try:
                picture = read_picture(self.index.path(row), max_pixels=self.index.max_pixels)
                images[at] = preprocess(picture.image, self.spec)
            except ImageError as error:
                bad.append(error)
                continue
            sizes[at] = picture.size[::-1]
            if boxes is not None:
                boxes[at] = _box(self.index, row, picture.size, picture.orientation)
            if parts is not None and self.index.parts is not None:
                parts[at] = self.index.parts[row]
                parts[at, :, :2] = turned_points(parts[at, :, :2], picture.orientation, picture.stored)
            read.append(row)
        index = np.array(read, dtype=np.int64)
        labels = torch.from_numpy(self.index.labels[index].astype(np.int64))
        pixels, originals = torch.from_numpy(images[: len(read)]), torch.from_numpy(sizes[: len(read)])
        found, places = (None if one is None else one[: len(read)] for one in (boxes, parts))
        return EvaluationBatch(pixels, labels, torch.from_numpy(index), originals, bad, found, places)


def _box(index: ImageIndex, row: int, size: Sides, orientation: int) -> NDArray[np.float32]:
    """(4,): the box of a row in its image upright, cut at its borders; `size` of that image. NaN: none, or none within it."""
    assert index.boxes is not None
    return turned_boxes(index.boxes[row], orientation, turned_sides(size, orientation)).astype(np.float32)


T = TypeVar("T", TrainBatch, EvaluationBatch)


def _torch_loader(
    dataset: Dataset[T], batches: Iterable[list[Any]], workers: int, *, persistent: bool = False
) -> DataLoader[T]:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=_as_is,  # __getitems__ makes whole batches
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or every pass would draw from the global one
    )


def _as_is(batch: T) -> T:
    return batch


def _each(loader: DataLoader[T]) -> Iterator[T]:
    for batch in loader:
        if isinstance(batch, FgvcError):
            raise batch
        yield batch
