"""Policies against timm's own parser of them and torchvision's class; what is left without their geometry; their draws."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from timm.data import auto_augment as timm
from torchvision.transforms import InterpolationMode, TrivialAugmentWide

from fgvc.config.data import POLICIES, Augment
from fgvc.config.images import Preprocess
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.data.augment import Augmenter
from fgvc.errors import FgvcError
from fgvc.rng import seeded_globals

FILL = (10, 200, 90)
SPEC = Preprocess(size=(40, 56), resize="squash", crop_pct=1, fill=FILL)
WHOLE: dict[str, Any] = {
    "crop": "fit",
    "crop_scale": (1, 1),
    "flip": 0,
    "brightness": 0,
    "contrast": 0,
    "saturation": 0,
}
NAMES = [name for name in POLICIES if name != "none"]
HPARAMS = {"img_mean": FILL}


def photograph(height: int = 40, width: int = 56) -> np.ndarray:
    small = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        ({"policy": "randaugment"}, lambda: timm.rand_augment_transform("rand-m9-n2-p0.5-mstd0.5-inc1", dict(HPARAMS))),
        (
            {"policy": "randaugment", "policy_magnitude": 4, "policy_ops": 3, "policy_probability": 0.8},
            lambda: timm.rand_augment_transform("rand-m4-n3-p0.8-mstd0.5-inc1", dict(HPARAMS)),
        ),
        ({"policy": "augmix"}, lambda: timm.augment_and_mix_transform("augmix-m3-w3", dict(HPARAMS))),
        (
            {"policy": "augmix", "policy_magnitude": 8, "policy_ops": 2},
            lambda: timm.augment_and_mix_transform("augmix-m8-w2", dict(HPARAMS)),
        ),
        ({"policy": "autoaugment"}, lambda: timm.auto_augment_transform("original", dict(HPARAMS))),
        ({"policy": "3-augment"}, lambda: timm.auto_augment_transform("3a", dict(HPARAMS))),
        (
            {"policy": "trivialaugment"},
            lambda: TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR, fill=list(FILL)),
        ),
    ],
)
def test_a_policy_is_its_authors_code(settings: dict[str, Any], reference: Callable[[], Callable]) -> None:
    augmenter, expected = Augmenter(Augment(**(WHOLE | settings)), SPEC, seed=7), reference()
    changed = 0
    for row in range(12):
        with seeded_globals(7, 2, row, 0, 0):
            picture = np.asarray(expected(Image.fromarray(photograph())))
        pixels, matrix = augmenter(photograph(), epoch=2, row=row)
        np.testing.assert_array_equal(pixels, picture)
        np.testing.assert_allclose(matrix, [[1, 0, 0], [0, 1, 0]], atol=1e-6)
        changed += not np.array_equal(pixels, photograph())
    assert changed > 5


@pytest.mark.parametrize("name", NAMES)
def test_without_its_geometry_a_policy_moves_nothing(name: str) -> None:
    """Colours act on pixels of one colour alike: of two flat halves the left stays one colour up to the middle, but for the
    blur there. Shears, shifts and turns of a policy leave other colours at the sides."""
    halves = np.full((40, 56, 3), (200, 60, 90), np.uint8)
    halves[:, 28:] = (40, 120, 180)

    def flat(geometry: bool) -> bool:
        settings = Augment(**WHOLE, policy=name, policy_geometry=geometry)  # type: ignore[arg-type]
        pictures = [Augmenter(settings, SPEC, seed=0)(halves, epoch=0, row=row)[0].astype(int) for row in range(30)]
        return all(np.ptp(part, axis=(0, 1)).max() <= 1 for p in pictures for part in (p[:, :20], p[:, 36:]))

    assert flat(False)
    assert flat(True) == (name == "3-augment")
    assert Augment(policy=name).hides_geometry == (name != "3-augment")  # type: ignore[arg-type]
    assert not Augment(policy=name, policy_geometry=False).hides_geometry  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_its_keys_alone_and_global_generators_are_put_back(name: str) -> None:
    settings = Augment(policy=name)  # type: ignore[arg-type]
    one, other = Augmenter(settings, SPEC, seed=5), Augmenter(settings, SPEC, seed=5)
    rows = range(15)
    samples = [one(photograph(80, 96), epoch=1, row=row)[0].tobytes() for row in rows]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    again = [other(photograph(80, 96), epoch=1, row=row)[0].tobytes() for row in reversed(rows)]
    assert again[::-1] == samples
    assert len(set(samples)) == len(rows)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tobytes() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_generators_are_put_back_after_an_error_too() -> None:
    before = random.getstate()
    with pytest.raises(ZeroDivisionError), seeded_globals(1):
        random.seed(1 / 0)
    assert random.getstate() == before


def test_the_share_of_images_that_a_policy_changes() -> None:
    settings = Augment(**WHOLE, policy="3-augment", policy_probability=0.25)
    augmenter = Augmenter(settings, SPEC, seed=0)
    changed = [not np.array_equal(augmenter(photograph(), epoch=0, row=row)[0], photograph()) for row in range(200)]
    assert 0.15 < np.mean(changed) < 0.35


def test_defaults_go_with_the_policy_and_what_is_given_stays() -> None:
    assert Augment().brightness == 0.2
    assert Augment(policy="randaugment").brightness == Augment(policy="augmix").saturation == 0
    assert Augment(policy="3-augment").contrast == 0.3
    assert Augment(policy="3-augment", contrast=0.1).contrast == 0.1
    settings = Augment(policy="randaugment", policy_magnitude=None)
    assert (settings.policy_magnitude, settings.policy_ops, settings.policy_probability) == (9, 2, 0.5)
    assert Augment(**settings.model_dump()) == settings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"policy": "autoaugment", "policy_magnitude": 5}, "policy_magnitude: augment.policy: autoaugment has none"),
        ({"policy_ops": 2}, "policy_ops: augment.policy: none has none"),
        ({"policy": "randaugment", "policy_magnitude": 11}, "must be at most 10"),
        ({"policy": "randaugment", "policy_ops": 0}, "must be at least 1"),
        ({"policy": "augmix", "policy_probability": 2}, "must be at most 1"),
        ({"policy": "randaug"}, "must be 'none', 'randaugment'"),
        ({"pipeline": 3}, r"pipeline: the file that albumentations.save wrote \(got 3\)$"),
        ({"policy": ["augmix"]}, "must be 'none', 'randaugment'"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, Any], message: str, recipe_tree: dict) -> None:
    with pytest.raises(ValidationError):
        Augment(**wrong)
    with pytest.raises(FgvcError, match=r"augment.*" + message):
        validate(Recipe, recipe_tree | {"augment": wrong}, where="test")


@pytest.mark.parametrize("technique", [{"box_head": {}}, {"cam_erasing": {"source": "previous_epoch"}}])
def test_a_policy_that_moves_pixels_unsaid_is_refused_with_boxes_and_maps(technique: dict, recipe_tree: dict) -> None:
    data = {"kind": "cub", "root": "birds"}  # with boxes
    tree = recipe_tree | {"data": data, "techniques": technique, "augment": {"policy": "randaugment"}}
    with pytest.raises(FgvcError, match=r"needs to know where .* set augment.policy_geometry to false"):
        validate(Recipe, tree, where="test")
    for allowed in ({"policy": "randaugment", "policy_geometry": False}, {"policy": "3-augment"}):
        validate(Recipe, tree | {"augment": allowed}, where="test")
