"""Fixtures for all tests: no network, few threads, small drawn data."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session", autouse=True)
def _caches_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing of the user's is read or filled; the processes of one session share what they make."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["XDG_CACHE_HOME"] = str(shared / "cache")


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
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder set of three colours: 16 train, 4 val and 4 test pictures each."""
    root = tmp_path_factory.mktemp("colours")
    for number, (name, colour) in enumerate(COLOURS.items()):
        for split, count in (("train", 16), ("val", 4), ("test", 4)):
            for i in range(count):
                paint(root / split / name / f"{i:02d}.png", colour, seed=1000 * number + 100 * len(split) + i)
    return root


@pytest.fixture(scope="session")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same three colours in the CUB layout, 20 train and 4 test pictures each: a box of the colour on noise of another."""
    root = tmp_path_factory.mktemp("boxed")
    tables: dict[str, list[str]] = {
        "classes": [f"{number} {name}" for number, name in enumerate(COLOURS, 1)],
        **{name: [] for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes")},
    }
    for number in range(1, 1 + 24 * len(COLOURS)):
        label, i = divmod(number - 1, 24)
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
        tables["train_test_split"].append(f"{number} {int(i < 20)}")
        tables["bounding_boxes"].append(f"{number} {left} {top} {width} {height}")
    for table, lines in tables.items():
        (root / f"{table}.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def boxed_tree(recipe_tree: dict, boxed: Path) -> dict:
    """The same on data with boxes, for what is done with every technique: 48 train pictures, 12 for validation."""
    return recipe_tree | {"data": {"kind": "cub", "root": str(boxed), "val_fraction": 0.2}}


@pytest.fixture
def recipe_tree(colours: Path) -> dict:
    """A recipe that trains in seconds; tests change what they are about."""
    return {
        "data": {"kind": "folder", "root": str(colours)},
        "image": {"size": 32},
        "model": {"backbone": "test_resnet"},
        "train": {"epochs": 2, "batch_size": 8, "workers": 0, "device": "cpu"},
        "optim": {"lr": 0.02, "warmup_epochs": 0.5},
    }
