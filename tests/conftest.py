"""Fixtures for all tests: no network, few threads, small drawn data."""

from __future__ import annotations

import gc
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import numpy as np
import pytest
from PIL import Image

from tests.charts import unpainted
from tests.processes import end_all, plain_draws, start
from tests.stand_ins import ForReal, stand_ins
from tests.trained import Once


def pytest_collection_finish() -> None:
    """What is imported by now stays: no garbage collection need look through its half a million objects again. Hypothesis asks
    the collector for references when it is imported, as its plugin does at the end of each session."""
    import hypothesis  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """What several tests look at, made once a session for all the workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return Once((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once")


@pytest.fixture(scope="session", autouse=True)
def _caches_of_their_own(once: Once) -> None:
    """Nothing of the user's is read or filled; the processes of one session share what they make."""
    os.environ["XDG_CACHE_HOME"] = str(once.place.parent / "cache")


@pytest.fixture(scope="session", autouse=True)
def _the_machine_does_not_die() -> Iterator[None]:
    """Files are not waited for until they are on the disk, which only a power cut could tell; handles must be open, as always.
    The processes that tests start do wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: os.fstat(handle) and None)
        yield


@pytest.fixture(scope="session", autouse=True)
def painted() -> Iterator[ForReal]:
    """Runs and scores write their charts without painting them (tests/charts.py): within `with painted():` they are painted. The
    functions that paint are tested where they are called by themselves."""
    if "torch" not in sys.modules:  # nothing trains in this session
        yield nullcontext
        return
    with stand_ins(*unpainted()) as for_real:
        yield for_real


@pytest.fixture(scope="session", autouse=True)
def new_python(once: Once) -> Iterator[ForReal]:
    """The independent plain graph is made once a session for equal arguments, in a forked process (tests/processes.py): within
    `with new_python():` it is made each time, in a new Python that first imports torch, as the product does."""
    if "torch" not in sys.modules:  # nothing is exported in this session
        yield nullcontext
        return
    from fgvc.exporting import reference

    real = reference._two_draws.__wrapped__

    def draws(order: str) -> tuple[bytes, bytes]:
        folder = once.made(f"draws/{hashlib.sha256(order.encode()).hexdigest()}", lambda folder: forked(order, folder))
        first, second = ((folder / f"{draw}.onnx").read_bytes() for draw in (0, 1))
        return first, second

    def forked(order: str, folder: Path) -> None:
        if start(folder, plain_draws, order, folder).wait().returncode:
            real(order)  # raises what the product says of it
            raise AssertionError((folder / "stderr").read_text())

    with stand_ins((reference, "_two_draws", draws)) as for_real:
        yield for_real


@pytest.fixture(scope="session", autouse=True)
def _no_process_outlives_the_session() -> Iterator[None]:
    yield
    end_all()


COLOURS = {"blue": (60, 80, 200), "green": (70, 170, 80), "red": (200, 70, 60)}


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and weights; tests that need it skip without it."""
    place = os.environ.get("FGVC_SHARED")
    if not place or not Path(place).is_dir():
        pytest.skip("FGVC_SHARED is not set")
    return Path(place)


def paint(path: Path, colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (48, 40)) -> None:
    """A noisy picture of one colour: learnable in a few steps."""
    rng = np.random.default_rng(seed)
    pixels = np.clip(np.array(colour) + rng.normal(0, 40, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="session")
def colours(once: Once) -> Path:
    """A folder set of three colours: 16 train, 4 val and 4 test pictures each. For reading, as all that is shared."""
    return once.made("colours", _paint_colours)


def _paint_colours(root: Path) -> None:
    for number, (name, colour) in enumerate(COLOURS.items()):
        for split, count in (("train", 16), ("val", 4), ("test", 4)):
            for i in range(count):
                paint(root / split / name / f"{i:02d}.png", colour, seed=1000 * number + 100 * len(split) + i)


@pytest.fixture(scope="session")
def boxed(once: Once) -> Path:
    """The same three colours in the CUB layout, 20 train and 4 test pictures each: a box of the colour on noise of another."""
    return once.made("boxed", _paint_boxed)


@pytest.fixture(scope="session")
def boxed_few(once: Once) -> Path:
    """The same of 10 train and 2 test pictures each, for what is done with every technique."""
    return once.made("boxed few", lambda root: _paint_boxed(root, train=10, test=2))


@pytest.fixture(scope="session")
def boxed_fewest(once: Once) -> Path:
    """The same of 5 train and 2 test pictures each, for what is about many techniques at once."""
    return once.made("boxed fewest", lambda root: _paint_boxed(root, train=5, test=2))


def _paint_boxed(root: Path, *, train: int = 20, test: int = 4) -> None:
    tables: dict[str, list[str]] = {
        "classes": [f"{number} {name}" for number, name in enumerate(COLOURS, 1)],
        **{name: [] for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes")},
    }
    for number in range(1, 1 + (train + test) * len(COLOURS)):
        label, i = divmod(number - 1, train + test)
        name, colour = list(COLOURS.items())[label]
        rng = np.random.default_rng(number)
        width, height = rng.integers(16, 28, 2)
        left, top = rng.integers(0, 48 - width), rng.integers(0, 40 - height)
        pixels = rng.normal(60, 30, (40, 48, 3))
        pixels[top : top + height, left : left + width] += np.array(colour) - 40
        (root / "images" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(root / "images" / name / f"{i:02d}.png")
        tables["images"].append(f"{number} {name}/{i:02d}.png")
        tables["image_class_labels"].append(f"{number} {label + 1}")
        tables["train_test_split"].append(f"{number} {int(i < train)}")
        tables["bounding_boxes"].append(f"{number} {left} {top} {width} {height}")
    for table, lines in tables.items():
        (root / f"{table}.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def boxed_tree(recipe_tree: dict, boxed_few: Path) -> dict:
    """The same on data with boxes, for what is done with every technique: 24 train pictures, 6 for validation."""
    return recipe_tree | {"data": {"kind": "cub", "root": str(boxed_few), "val_fraction": 0.2}}


@pytest.fixture
def recipe_tree(colours: Path) -> dict:
    """A recipe that trains and is exported in a second each; tests change what they are about."""
    return {
        "data": {"kind": "folder", "root": str(colours)},
        "image": {"size": 32},
        "model": {"backbone": "test_resnet"},
        "train": {"epochs": 2, "batch_size": 8, "workers": 0, "device": "cpu"},
        "optim": {"lr": 0.02, "warmup_epochs": 0.5},
        "export": {"exporter": "torchscript"},
    }
