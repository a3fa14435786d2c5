"""Fixtures for all tests: no network, few threads, small drawn data."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import numpy as np
import pytest
from PIL import Image

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
