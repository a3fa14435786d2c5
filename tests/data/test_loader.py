"""One stream whatever the number of workers, exact resumption, bad files named once, and nothing left behind."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.dtypes import StringDType
from PIL import Image
from scipy.stats import chisquare

from fgvc.config.data import Augment
from fgvc.config.images import Preprocess
from fgvc.data.augment import Augmenter
from fgvc.data.cache import DecodeCache
from fgvc.data.index import ImageIndex
from fgvc.data.loader import BadFiles, TrainBatch, TrainLoader, evaluation_loader, train_loader
from fgvc.data.order import EpochOrder, _turns
from fgvc.errors import FgvcError, ImageError
from fgvc.images.decode import decode
from fgvc.images.preprocess import preprocess

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
SPEC = Preprocess(size=(24, 32))
COUNT = 23


@pytest.fixture
def index(tmp_path: Path) -> ImageIndex:
    """23 images of different sizes; the label is the row modulo 5."""
    root = tmp_path / "set"
    root.mkdir()
    for n in range(COUNT):
        pixels = np.random.default_rng(n).integers(0, 256, (40 + n, 60 - n, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{n}.png")
    paths = np.array([f"{n}.png" for n in range(COUNT)], dtype=StringDType())
    labels, splits = np.arange(COUNT, dtype=np.int32) % 5, np.zeros(COUNT, dtype=np.int8)
    return ImageIndex(root=root, classes=tuple("abcde"), paths=paths, labels=labels, splits=splits)


def loader(
    index: ImageIndex, *, workers: int = 0, batch_size: int = 4, seed: int = 7, **options: object
) -> TrainLoader:
    augmenter = Augmenter(Augment(vertical_flip=0.5, hue=0.1), SPEC, seed)
    rows = np.arange(len(index))
    return train_loader(index, rows, augmenter=augmenter, batch_size=batch_size, seed=seed, workers=workers, **options)


def flat(batch: TrainBatch) -> tuple[bytes, ...]:
    return tuple(column.numpy().tobytes() for column in (batch.images, batch.labels, batch.index, batch.geometry))


def stream(source: TrainLoader, epochs: int = 2) -> list[tuple[bytes, ...]]:
    try:
        return [flat(batch) for epoch in range(epochs) for batch in source.epoch(epoch)]
    finally:
        source.close()


def test_shapes_and_types(index: ImageIndex) -> None:
    source = loader(index)
    batch = next(source.epoch(0))
    source.close()
    assert source.batches_per_epoch == 5
    assert (batch.images.shape, batch.images.dtype) == ((4, 24, 32, 3), torch.uint8)
    assert batch.labels.tolist() == [row % 5 for row in batch.index.tolist()]
    assert (batch.labels.dtype, batch.index.dtype) == (torch.int64, torch.int64)
    assert (batch.geometry.shape, batch.geometry.dtype) == ((4, 2, 3), torch.float32)
    assert batch.bad == []


def test_the_stream_does_not_depend_on_the_number_of_workers(index: ImageIndex) -> None:
    alone = stream(loader(index))
    assert len(alone) == 10
    for workers in (1, 2, 3):
        assert stream(loader(index, workers=workers)) == alone


def test_nor_does_the_stream_of_policies_and_pipelines_depend_on_workers_ranks_or_its_start(index: ImageIndex) -> None:
    """Code of others draws from the global generators of each worker: timm's policy, a hook that a plug-in brings."""
    noise = {"__class_fullname__": "GaussNoise", "p": 0.7}
    pipeline = {"transform": {"__class_fullname__": "Compose", "transforms": [noise]}}
    settings = Augment(policy="randaugment", policy_probability=1, pipeline=pipeline)

    def hook(image: np.ndarray, row: int) -> np.ndarray:
        image[: random.randrange(20)] = np.random.randint(256)
        return image

    def train_loader_of(**options: object) -> TrainLoader:
        rows, augmenter = np.arange(len(index)), Augmenter(settings, SPEC, 7)
        options = {"batch_size": 4, "workers": 0} | options
        return train_loader(index, rows, augmenter=augmenter, seed=7, on_sample=[hook], **options)  # type: ignore[arg-type]

    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    alone = stream(train_loader_of())
    assert len({images for images, *_ in alone}) == len(alone) == 10
    assert stream(train_loader_of(workers=3)) == alone
    entered = train_loader_of(workers=2)
    assert [flat(batch) for batch in entered.epoch(1, start=2)] == alone[7:]
    entered.close()
    ranks = [list(train_loader_of(batch_size=2, rank=rank, world=2).epoch(0)) for rank in range(2)]
    for step, (one, other) in enumerate(zip(*ranks, strict=True)):
        together = torch.stack([one.images, other.images], dim=1).flatten(0, 1)
        assert together.numpy().tobytes() == alone[step][0]
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tobytes() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_an_image_that_a_pipeline_fails_on_ends_the_epoch_with_its_name(index: ImageIndex) -> None:
    augmenter = Augmenter(Augment(pipeline={"transform": {"__class_fullname__": "NoOp", "p": 1}}), SPEC, 0)

    def failing(*_: object, **__: object) -> None:
        raise ValueError("no such colour")

    augmenter._compose.transforms[0].apply_with_params = failing
    for workers in (0, 1):
        source = train_loader(index, np.arange(5), augmenter=augmenter, batch_size=2, seed=0, workers=workers)
        with pytest.raises(FgvcError, match=r"set/\d.png: augment.pipeline: fails on an image: ValueError: no such colour"):
            list(source.epoch(0))
        source.close()


def test_no_two_samples_share_an_augmentation_in_any_epoch_or_worker(index: ImageIndex) -> None:
    """All files alike: then equal pixels mean equal augmentation."""
    for row in range(1, COUNT):
        index.path(row).write_bytes(index.path(0).read_bytes())
    source, samples, count = loader(index, workers=2), set(), 0
    for epoch in range(4):
        for batch in source.epoch(epoch):
            samples |= {image.numpy().tobytes() for image in batch.images}
            count += len(batch.images)
    source.close()
    assert len(samples) == count == 80


def test_every_epoch_is_another_permutation(index: ImageIndex) -> None:
    source = loader(index)
    orders = [torch.cat([batch.index for batch in source.epoch(epoch)]).tolist() for epoch in range(3)]
    source.close()
    assert all(len(set(order)) == len(order) == 20 for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    other = loader(index, seed=8)
    assert torch.cat([batch.index for batch in other.epoch(0)]).tolist() != orders[0]
    other.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_an_epoch_goes_on_at_any_batch(index: ImageIndex, workers: int, start: int) -> None:
    whole = stream(loader(index), epochs=3)
    source = loader(index, workers=workers)
    next(source.epoch(1))  # abandoned
    rest = [flat(batch) for batch in source.epoch(2, start=start)]
    source.close()
    assert rest == whole[10 + start :]


@pytest.fixture
def skewed(index: ImageIndex) -> ImageIndex:
    """The same images with 12, 6, 3, 2 and no image of the five classes."""
    labels = np.repeat(np.arange(4, dtype=np.int32), [12, 6, 3, 2])
    return replace(index, labels=labels)


def test_balanced_epochs_draw_every_class_alike_and_every_image_of_a_class(skewed: ImageIndex) -> None:
    order = EpochOrder(np.arange(COUNT), 3, batch_size=COUNT, rank=0, world=1, labels=skewed.labels)
    rows: list[int] = []
    for order.epoch in range(400):
        rows += [row for _, row, _ in next(iter(order))]
    counts = np.bincount(rows, minlength=COUNT)
    expected = len(rows) / (4 * np.bincount(skewed.labels)[skewed.labels])
    assert chisquare(np.bincount(skewed.labels[rows])).pvalue > 0.001
    assert chisquare(counts, expected).pvalue > 0.001
    uneven = np.full(COUNT, len(rows) / COUNT)
    assert chisquare(counts, uneven).pvalue < 1e-9


def test_balanced_epochs_are_as_long_and_go_on_at_any_batch_whatever_the_workers(skewed: ImageIndex) -> None:
    whole = stream(loader(skewed, balanced=True), epochs=2)
    assert len(whole) == 2 * loader(skewed).batches_per_epoch == 10
    source = loader(skewed, workers=2, balanced=True)
    assert [flat(batch) for batch in source.epoch(1, start=2)] == whole[7:]
    source.close()
    assert whole != stream(loader(skewed, balanced=True, seed=8), epochs=2)


def test_an_image_that_comes_again_in_an_epoch_is_augmented_anew(skewed: ImageIndex) -> None:
    source = loader(skewed, balanced=True)
    batches = [batch for epoch in range(3) for batch in source.epoch(epoch)]
    source.close()
    rows = torch.cat([batch.index for batch in batches]).tolist()
    assert len(set(rows)) < len(rows)
    assert len({image.numpy().tobytes() for batch in batches for image in batch.images}) == len(rows)
    # the first time in an epoch as without balancing
    plain = loader(skewed)
    first = {int(row): image for batch in plain.epoch(0) for row, image in zip(batch.index, batch.images, strict=True)}
    plain.close()
    drawn_rows: set[int] = set()
    for batch in batches[:5]:
        for row, image in zip(batch.index.tolist(), batch.images, strict=True):
            if row in first:
                assert torch.equal(image, first[row]) == (row not in drawn_rows)
            drawn_rows.add(row)


def test_turns_count_earlier_equals() -> None:
    order = np.random.default_rng(0).integers(0, 9, 200)
    assert _turns(order).tolist() == [order[:i].tolist().count(row) for i, row in enumerate(order)]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_samples_of_a_balanced_epoch(skewed: ImageIndex, world: int) -> None:
    """Each sample (row and turn) of a step is one rank's alone, and together they are those of one process."""
    options = {"labels": skewed.labels, "world": world, "batch_size": 2}
    whole = list(EpochOrder(np.arange(COUNT), 3, labels=skewed.labels, batch_size=2 * world, rank=0, world=1))
    ranks = [list(EpochOrder(np.arange(COUNT), 3, rank=rank, **options)) for rank in range(world)]
    assert len(whole) == COUNT // (2 * world)
    for step, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        merged = [key for part in parts for key in part]
        assert len(set(merged)) == len(merged)
        assert sorted(merged) == sorted(step)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batches_of_one_process(index: ImageIndex, world: int) -> None:
    one = loader(index, batch_size=2 * world)
    whole = [dict(zip(b.index.tolist(), b.images, strict=True)) for b in one.epoch(3)]
    one.close()
    ranks = [loader(index, batch_size=2, rank=rank, world=world) for rank in range(world)]
    for step, parts in enumerate(zip(*(rank.epoch(3) for rank in ranks), strict=True)):
        merged = {row: image for part in parts for row, image in zip(part.index.tolist(), part.images, strict=True)}
        assert merged.keys() == whole[step].keys()
        assert all(torch.equal(image, whole[step][row]) for row, image in merged.items())
    assert {rank.batches_per_epoch for rank in ranks} == {len(whole)} == {COUNT // (2 * world)}
    [rank.close() for rank in ranks]


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_states_are_not_touched(index: ImageIndex, workers: int) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()
    stream(loader(index, workers=workers))
    list(evaluation_loader(index, np.arange(9), spec=SPEC, batch_size=4, workers=workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tobytes() == before[1]
    assert random.getstate() == before[2]


def test_geometry_maps_to_the_original_through_the_cache(tmp_path: Path, index: ImageIndex) -> None:
    """Pixels hold their own coordinates, so that each crop tells where it was taken from."""
    for row in range(COUNT):
        ramp = np.zeros((128, 256, 3), dtype=np.uint8)
        ramp[..., 0], ramp[..., 1] = np.arange(256), np.arange(128)[:, None]
        Image.fromarray(ramp).save(index.path(row))
    cache = DecodeCache.open(index, np.arange(COUNT), side=64, folder=tmp_path / "cache")
    assert cache.image(0)[0].shape == (64, 128, 3)
    augment = Augment(flip=0.5, brightness=0, contrast=0, saturation=0)
    options = {"batch_size": 8, "seed": 0, "workers": 0}
    source = train_loader(index, cache.rows, augmenter=Augmenter(augment, SPEC, 0), cache=cache, **options)
    batch = next(source.epoch(0))
    source.close()
    plain = train_loader(index, cache.rows, augmenter=Augmenter(augment, SPEC, 0), **options)
    corners = np.array([[0, 0, 32, 32], [0, 24, 0, 24], [1, 1, 1, 1]])
    apart = (batch.geometry - next(plain.epoch(0)).geometry).numpy() @ corners
    assert np.abs(apart).max() <= 1.5  # windows are whole pixels of what is at hand: here 2 of the original
    plain.close()
    for pixels, matrix in zip(batch.images, batch.geometry, strict=True):
        for i, j in [(12, 16), (6, 8), (18, 24)]:
            original = matrix @ torch.tensor([j + 0.5, i + 0.5, 1.0])
            truth = pixels[i, j, :2].float() + 0.5
            assert torch.allclose(original, truth, atol=1.5)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_replaced_and_named_once(index: ImageIndex, workers: int) -> None:
    index.path(3).write_bytes(index.path(3).read_bytes()[:200])
    index.path(11).write_bytes(b"")
    source = loader(index, workers=workers, max_unreadable=0.1)
    batches = [batch for epoch in range(4) for batch in source.epoch(epoch)]
    source.close()
    bad = sorted((Path(error.path).name, error.reason) for batch in batches for error in batch.bad)
    assert bad == [("11.png", "empty"), ("3.png", "truncated")]
    assert {Path(path).name for path in source.bad.errors} == {"3.png", "11.png"}
    assert all(batch.images.shape == (4, 24, 32, 3) for batch in batches)
    rows = torch.cat([batch.index for batch in batches])
    assert not {3, 11} & set(rows.tolist())
    assert torch.equal(torch.cat([batch.labels for batch in batches]), rows % 5)
    images = {image.numpy().tobytes() for batch in batches for image in batch.images}
    assert len(images) == 80  # a substitute is not the copy of its own turn in the epoch
    assert [flat(batch) for batch in batches] == stream(loader(index, max_unreadable=0.1), epochs=4)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_files_stop_with_the_list(index: ImageIndex, workers: int) -> None:
    for row in (2, 5, 9):
        index.path(row).write_bytes(b"text")
    source = loader(index, workers=workers, max_unreadable=0.1)
    with pytest.raises(FgvcError, match="3 of 23 images") as error:
        stream(source, epochs=3)
    assert all(str(index.path(row)) in str(error.value) for row in (2, 5, 9))


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_is_a_plain_error(index: ImageIndex, workers: int) -> None:
    for row in range(COUNT):
        index.path(row).unlink()
    source = loader(index, workers=workers, max_unreadable=1)
    with pytest.raises(FgvcError, match="missing") as error:
        next(source.epoch(0))
    assert "Traceback" not in str(error.value)
    source.close()


def test_bad_files_tally() -> None:
    tally = BadFiles(limit=0.5, images=4)
    first, again, second = ImageError("a", "empty"), ImageError("a", "empty"), ImageError("b", "missing")
    assert tally.add([first, again]) == [first]
    assert tally.add([again, second]) == [second]
    with pytest.raises(FgvcError, match="a: empty\n  b: missing\n  c: corrupt"):
        tally.add([ImageError("c", "corrupt")])


def test_on_sample_sees_image_and_row_before_the_geometry(index: ImageIndex) -> None:
    calls: list[tuple[int, tuple[int, ...]]] = []

    def paint(image: np.ndarray, row: int) -> np.ndarray:
        calls.append((row, image.shape))
        image[:] = (row, 0, 255)
        return image

    source = loader(index, on_sample=(paint,))
    augmenter = source._loader.dataset.augmenter
    source._loader.dataset.augmenter = Augmenter(Augment(brightness=0, contrast=0, saturation=0), augmenter.spec, 0)
    batch = next(source.epoch(0))
    source.close()
    assert batch.images[:, 5, 5, 0].tolist() == batch.index.tolist()
    assert all(shape == (40 + row, 60 - row, 3) for row, shape in calls)


def census() -> tuple[int, int, int]:
    """The number of threads, open files and child processes."""
    gc.collect()
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return threading.active_count(), len(os.listdir("/proc/self/fd")), len(children)


def piles_up(rounds: Sequence[tuple[int, ...]]) -> bool:
    """Whether something leaks with every round: then a census grows by as many as there are rounds. What is there once, and
    what another test left behind and ends meanwhile, is no leak."""
    return any(late - early >= len(rounds) - 1 for early, late in zip(rounds[0], rounds[-1], strict=True))


def settled(rounds: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The last census taken again for a while: processes end when the system gets to it."""
    deadline = time.monotonic() + 30
    while piles_up(rounds) and time.monotonic() < deadline:
        time.sleep(0.05)
        rounds[-1] = census()
    return rounds


def test_a_leak_is_growth_with_every_round() -> None:
    assert piles_up([(1, 18 + number, 0) for number in range(6)])
    assert not piles_up([(2, 18, 1), *[(1, 18, 0)] * 5])  # a thread and a process that were there before have ended
    assert not piles_up([(1, 18, 0), *[(2, 20, 0)] * 5])  # something was started once


@pytest.mark.parametrize("workers", [0, 2])
def test_threads_files_and_processes_do_not_pile_up(index: ImageIndex, workers: int, tmp_path: Path) -> None:
    cache = DecodeCache.open(index, np.arange(COUNT), side=32, folder=tmp_path / "cache")
    source = loader(index, workers=workers, cache=cache)
    epochs = [census()]
    for epoch in range(12):
        batches = source.epoch(epoch)
        for _ in range(5 if epoch % 2 else 2):  # every other epoch is abandoned
            next(batches)
        epochs.append(census())
        list(evaluation_loader(index, np.arange(9), spec=SPEC, batch_size=4, workers=workers))
    going = [(threads, processes) for threads, _, processes in epochs]  # of the files, some are batches on their way
    assert not piles_up(going), epochs
    del batches
    source.close()
    cache.close()
    assert not piles_up(settled(epochs)), epochs


@pytest.mark.parametrize("workers", [0, 2])
def test_a_closed_loader_leaves_nothing_behind(index: ImageIndex, workers: int, tmp_path: Path) -> None:
    rounds = []
    for _ in range(6):
        cache = DecodeCache.open(index, np.arange(COUNT), side=32, folder=tmp_path / "cache")
        source = loader(index, workers=workers, cache=cache)
        batches = source.epoch(0)
        next(batches)
        del batches
        source.close()
        del source
        cache.close()
        rounds.append(census())
    assert not piles_up(settled(rounds)), rounds


def test_memory_does_not_grow_from_epoch_to_epoch(index: ImageIndex, tmp_path: Path) -> None:
    import tracemalloc

    cache = DecodeCache.open(index, np.arange(COUNT), side=32, folder=tmp_path / "cache")
    source = loader(index, cache=cache)
    for epoch in range(3):
        list(source.epoch(epoch))
    gc.collect()
    tracemalloc.start()
    start = tracemalloc.get_traced_memory()[0]
    for epoch in range(3, 43):
        list(source.epoch(epoch))
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - start
    tracemalloc.stop()
    source.close()
    assert grown < 64 * 1024  # a single kept batch is 12 KiB, of 200


def test_workers_load_while_the_caller_is_busy(index: ImageIndex, tmp_path: Path) -> None:
    def note(image: np.ndarray, row: int) -> np.ndarray:
        (tmp_path / str(row)).touch()
        return image

    source = loader(index, workers=1, on_sample=(note,))
    batches = source.epoch(0)
    next(batches)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 12 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(list(tmp_path.iterdir())) >= 12  # the first batch, and at least two more
    source.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_hook_reaches_the_caller(index: ImageIndex, workers: int) -> None:
    def fail(image: np.ndarray, row: int) -> np.ndarray:
        raise ZeroDivisionError("in the hook")

    source = loader(index, workers=workers, on_sample=(fail,))
    with pytest.raises(ZeroDivisionError, match="in the hook"):
        next(source.epoch(0))
    source.close()


def test_fewer_images_than_a_batch_make_no_step_and_a_closed_loader_says_so(index: ImageIndex) -> None:
    source = loader(index, batch_size=24)
    assert source.batches_per_epoch == 0
    assert list(source.epoch(0)) == []
    source.close()
    source.close()
    with pytest.raises(FgvcError, match="closed"):
        next(source.epoch(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_gives_every_original_once_in_order_as_serving_sees_it(index: ImageIndex, workers: int) -> None:
    rows = np.array([4, 1, 20, 7, 9, 11, 2])
    batches = list(evaluation_loader(index, rows, spec=SPEC, batch_size=3, workers=workers))
    assert [len(batch.labels) for batch in batches] == [3, 3, 1]
    assert torch.cat([batch.index for batch in batches]).tolist() == rows.tolist()
    assert torch.cat([batch.labels for batch in batches]).tolist() == (rows % 5).tolist()
    images = torch.cat([batch.images for batch in batches])
    assert images.dtype == torch.float32
    sizes = torch.cat([batch.sizes for batch in batches]).tolist()
    for image, size, row in zip(images.numpy(), sizes, rows, strict=True):
        original = decode(index.path(row))
        np.testing.assert_array_equal(image, preprocess(original, SPEC))
        assert size == [original.height, original.width]


def test_evaluation_ranks_partition_the_rows(index: ImageIndex) -> None:
    def rows(rank: int) -> Iterator[int]:
        options = {"spec": SPEC, "batch_size": 4, "workers": 0, "rank": rank, "world": 3}
        for batch in evaluation_loader(index, np.arange(COUNT), **options):
            yield from batch.index.tolist()

    assert sorted(row for rank in range(3) for row in rows(rank)) == list(range(COUNT))


@pytest.mark.parametrize("bad", [(0,), (0, 1, 2), (3, 4, 5), (6, 7), (0, 1, 2, 6, 7), (1, 5, 7)])
def test_evaluation_skips_bad_files_and_reports_each(index: ImageIndex, bad: tuple[int, ...]) -> None:
    for row in bad:
        index.path(row).write_bytes(b"text")
    batches = list(evaluation_loader(index, np.arange(8), spec=SPEC, batch_size=3, workers=0))
    assert all(len(batch.labels) == len(batch.images) > 0 for batch in batches)
    assert torch.cat([batch.index for batch in batches]).tolist() == [row for row in range(8) if row not in bad]
    assert sorted(int(Path(error.path).stem) for batch in batches for error in batch.bad) == sorted(bad)


def test_evaluation_of_nothing_readable(index: ImageIndex) -> None:
    for row in range(3):
        index.path(row).write_bytes(b"text")
    with pytest.raises(FgvcError, match="none of the 3"):
        list(evaluation_loader(index, np.arange(3), spec=SPEC, batch_size=2, workers=0))
    left = evaluation_loader(index, np.arange(3), spec=SPEC, batch_size=2, workers=0, some=False)
    assert list(left) == [], "what is left of an interrupted pass may all be unreadable"
    assert list(evaluation_loader(index, np.arange(0), spec=SPEC, batch_size=2, workers=0)) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_boxes_go_with_their_images(index: ImageIndex, workers: int) -> None:
    boxes = np.random.default_rng(0).integers(1, 5, (COUNT, 4)).astype(np.float32)
    boxes[3] = np.nan
    (index.root / "5.png").write_bytes(b"broken")  # another row takes its place, and brings its own box
    source = loader(replace(index, boxes=boxes), workers=workers)
    rows = []
    for batch in source.epoch(0):
        expected = boxes[batch.index.numpy()]
        np.testing.assert_array_equal(batch.boxes.numpy(), np.hstack([expected[:, :2], expected[:, :2] + expected[:, 2:]]))
        assert batch.boxes.dtype == torch.float32
        rows += batch.index.tolist()
    assert 3 in rows
    assert 5 not in rows
    source.close()
    plain = loader(index)
    assert next(plain.epoch(0)).boxes is None
    plain.close()
