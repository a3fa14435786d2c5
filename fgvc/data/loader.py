"""Loaders of batches for training and evaluation.

Nothing here depends on the number of workers or on what was loaded before: the order is drawn from (seed, epoch), a
sample from (seed, epoch, row, turn), and the global generators of random, numpy and torch are left alone: code of others that
draws from them finds them seeded by the sample.
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
from fgvc.data.order import EpochOrder, Key
from fgvc.errors import FgvcError, ImageError
from fgvc.images.preprocess import preprocess
from fgvc.images.upright import turned_boxes, turned_points, turned_sides
from fgvc.io.progress import track
from fgvc.rng import SAMPLE, generator, seeded_globals

OnSample = Callable[[NDArray[np.uint8], int], NDArray[np.uint8]]
"""Hook from a (h,w,3) uint8 image and its row to an image of the same size; called in a worker, before any geometry. Workers
are forked once: what changes during training must be read from disk or shared memory."""

Sides = tuple[int, int]  # width, height

BEFORE = 2**31  # first epoch number of the views that are drawn before training

_NAMED = 50  # unreadable files listed in a message
_SUBSTITUTES = 50  # rows tried in place of an unreadable one


@dataclass(slots=True)
class TrainBatch:
    """A batch of augmented images, not yet normalised."""

    images: Tensor  # (B,H,W,3) uint8 RGB
    labels: Tensor  # (B,) int64
    index: Tensor  # (B,) int64: rows of the ImageIndex
    geometry: Tensor  # (B,2,3) float32: crop -> original, in continuous pixels (a pixel's centre is at + 0.5)
    bad: list[ImageError]  # unreadable files that no earlier batch reported
    boxes: Tensor | None = None  # (B,4) float32: left, top, right, bottom in the upright original; NaN for an image without box

    def pin_memory(self) -> TrainBatch:
        images, labels = self.images.pin_memory(), self.labels.pin_memory()
        boxes = None if self.boxes is None else self.boxes.pin_memory()
        return TrainBatch(images, labels, self.index.pin_memory(), self.geometry.pin_memory(), self.bad, boxes)


@dataclass(slots=True)
class EvaluationBatch:
    """A batch of images, preprocessed as in serving."""

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
    """Collects the unreadable files of a set, each once; above a share of the set they are an error."""

    def __init__(self, *, limit: float, images: int) -> None:
        self.limit, self.images = limit, images
        self.errors: dict[str, ImageError] = {}

    def add(self, errors: Iterable[ImageError]) -> list[ImageError]:
        """Record errors; returns those of files that are new. Raises FgvcError with the whole list once there are too many."""
        fresh = [error for error in errors if self.errors.setdefault(error.path, error) is error]
        if fresh and len(self.errors) > self.limit * self.images:
            raise FgvcError(
                f"{len(self.errors)} of {self.images} images can't be read, data.max_unreadable={self.limit:g} allows fewer. "
                "Raise it, and the run goes on without them; or mend or remove them, and begin a new run:\n"
                f"{_names(self.errors.values())}"
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
    """A loader of resumable epochs over `rows` in batches of `batch_size` for this rank. Close it after use.

    `balanced`: an epoch has as many samples, drawn with replacement so that every class comes equally often on average;
    a repeated image is augmented differently.
    """
    samples = _Samples(index, np.asarray(rows, dtype=np.int64), augmenter, seed, cache, tuple(on_sample))
    labels = index.labels[samples.rows] if balanced else None
    order = EpochOrder(samples.rows, seed, batch_size=batch_size, rank=rank, world=world, labels=labels)
    loader = _torch_loader(samples, order, workers, persistent=True)
    return TrainLoader(loader, samples, order, limit=max_unreadable)


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
    """Batches of `views` augmented views of each of `rows`, of random numbers that no epoch of training draws. An unreadable file
    is replaced as in training."""
    samples = _Samples(index, np.asarray(rows, dtype=np.int64), augmenter, seed, None, ())
    keys: list[Key] = [(BEFORE + view, row, 0) for view in range(views) for row in samples.rows.tolist()]
    yield from _each(_torch_loader(samples, [keys[at : at + batch_size] for at in range(0, len(keys), batch_size)], workers))


class TrainLoader:
    """Epochs of training batches, from any batch on; made by `train_loader`."""

    def __init__(self, loader: DataLoader[TrainBatch], samples: _Samples, order: EpochOrder, *, limit: float) -> None:
        self.batches_per_epoch = len(order.rows) // (order.batch_size * order.world)  # an incomplete last one is dropped
        self.bad = BadFiles(limit=limit, images=len(order.rows))
        self._samples, self._order = samples, order
        self._loader: DataLoader[TrainBatch] | None = loader
        self._running: Iterator[TrainBatch] | None = None

    def epoch(self, number: int, start: int = 0) -> Iterator[TrainBatch]:
        """The micro-batches of an epoch from number `start` on; an unfinished earlier epoch ends.

        An unreadable file is replaced by another row, drawn from (seed, epoch, row). Raises FgvcError if there are
        too many of them.
        """
        self._stop()
        self._order.epoch, self._order.start = number, start
        self._running = self._run()
        return self._running

    def steps(self, number: int, images: int) -> list[tuple[int, list[tuple[str, NDArray[np.uint8]]]]]:
        """The first `images` samples of an epoch's first micro-batch: each sample's row, and its picture after each step of the
        augmentation (`Augmenter.steps`)."""
        self._stop()
        self._order.epoch, self._order.start = number, 0
        return [self._samples.steps(key) for key in next(iter(self._order))[:images]]

    def close(self) -> None:
        """End the worker processes."""
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
    what: str = "",
) -> Iterator[EvaluationBatch]:
    """Batches of this rank's share of `rows`, each image once and in order, decoded from the original and preprocessed as in
    serving. Unreadable ones are left out and reported; with `some`, FgvcError is raised if none can be read. `what`: shown beside
    a bar; empty for none."""
    mine = np.asarray(rows, dtype=np.int64)[rank::world]
    batches = [mine[at : at + batch_size].tolist() for at in range(0, len(mine), batch_size)]
    pending: EvaluationBatch | None = None
    errors: list[ImageError] = []
    read = _each(_torch_loader(_Originals(index, spec), batches, workers))
    if what:
        read = track(read, what, len(mine), size=lambda batch: len(batch.labels) + len(batch.bad))
    for batch in read:
        if not len(batch.labels):  # all bad: reported with the batch before or after
            (errors if pending is None else pending.bad).extend(batch.bad)
            continue
        if pending is not None:
            yield pending
        batch.bad[:0] = errors
        pending, errors = batch, []
    if pending is not None:
        yield pending
    elif errors and some:
        raise FgvcError(f"none of the {len(mine)} images to evaluate can be read; the first: {errors[0]}")


class _Samples(Dataset[TrainBatch]):
    """Dataset that loads and augments a batch of keys at a time."""

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
        """The batch of some keys. An error that ends training is returned: raised in a worker it would come as a traceback."""
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
            image = self._hooked(image, int(taken[at]), (epoch, row, turn))
            # The key stays the drawn row's, so that a substitute differs from its own turn in this epoch.
            try:
                images[at], to_image = self.augmenter(image, epoch=epoch, row=row, turn=turn)
            except FgvcError as error:
                return FgvcError(f"{self.index.path(int(taken[at]))}: {error}")
            scale = np.array([[original[0] / image.shape[1]], [original[1] / image.shape[0]]], dtype=np.float32)
            geometry[at] = scale * to_image
        labels = torch.from_numpy(self.index.labels[taken].astype(np.int64))
        return TrainBatch(
            torch.from_numpy(images), labels, torch.from_numpy(taken), torch.from_numpy(geometry), bad,
            None if boxes is None else torch.from_numpy(boxes),
        )  # fmt: skip

    def _readable(self, epoch: int, row: int, bad: list[ImageError]) -> tuple[int, NDArray[np.uint8], Sides, int]:
        """Row, image, upright (width, height) of the original, EXIF orientation; of another row if the file is unreadable."""
        substitutes: np.random.Generator | None = None
        requested = row
        for _ in range(_SUBSTITUTES):
            try:
                return (row, *self._load(row))
            except ImageError as error:
                bad.append(error)
                substitutes = substitutes or generator(SAMPLE, self.seed, epoch, requested, 1)
                row = int(substitutes.choice(self.rows))
        names = _names({error.path: error for error in bad}.values())
        raise FgvcError(f"{_SUBSTITUTES} images in turn can't be read:\n{names}")

    def _load(self, row: int) -> tuple[NDArray[np.uint8], Sides, int]:
        if self.cache is not None:
            return (*self.cache.image(row), self.cache.orientation(row))
        picture = self.index.picture(row)
        return np.array(picture.image), picture.size, picture.orientation

    def _hooked(self, pixels: NDArray[np.uint8], taken: int, key: Key) -> NDArray[np.uint8]:
        if not self.on_sample:
            return pixels
        pixels = pixels.copy()
        with seeded_globals(self.seed, *key, 1):  # a 0 there is the augmenter's
            for hook in self.on_sample:
                pixels = hook(pixels, taken)
        return pixels

    def steps(self, key: Key) -> tuple[int, list[tuple[str, NDArray[np.uint8]]]]:
        """The row that a key's sample is of, and `Augmenter.steps` of it. Raises FgvcError where none can be read."""
        epoch, row, turn = key
        taken, image, *_ = self._readable(epoch, row, [])
        return taken, self.augmenter.steps(self._hooked(image, taken, key), epoch=epoch, row=row, turn=turn)


class _Originals(Dataset[EvaluationBatch]):
    """Dataset that decodes and preprocesses a batch of rows at a time."""

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
                picture = self.index.picture(row)
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
        boxes, parts = (None if column is None else column[: len(read)] for column in (boxes, parts))
        return EvaluationBatch(pixels, labels, torch.from_numpy(index), originals, bad, boxes, parts)


def _box(index: ImageIndex, row: int, size: Sides, orientation: int) -> NDArray[np.float32]:
    """The box (4,) of a row in its upright image of `size`, clipped to it; NaN if there is none, or none within the image."""
    return turned_boxes(index.corners(row), orientation, turned_sides(size, orientation)).astype(np.float32)


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
