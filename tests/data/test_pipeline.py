"""Pipelines of albumentations: matrices against images whose pixels hold their own coordinates, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import pytest
import yaml

from fgvc.config.data import Augment
from fgvc.config.images import Preprocess
from fgvc.data.augment import Augmenter
from fgvc.data.geometry import FOLLOWED
from fgvc.data.recipe import load_recipe, read_pipeline
from fgvc.errors import FgvcError

SPEC = Preprocess(size=(96, 128), resize="squash", interpolation="bilinear", crop_pct=1, fill=(0, 0, 255))
WHOLE: dict[str, Any] = {"crop": "fit", "crop_scale": (1, 1)}
FILL = {"fill": (0, 0, 255)}

GEOMETRY = [
    A.HorizontalFlip(p=1),
    A.VerticalFlip(p=1),
    A.Transpose(p=1),
    A.RandomRotate90(p=1),
    A.D4(p=1),
    A.SquareSymmetry(p=1),
    A.Affine(rotate=(-40, 40), shear=(-10, 10), translate_percent=(-0.1, 0.1), scale=(0.8, 1.2), p=1, **FILL),
    A.Affine(rotate=30, fit_output=True, p=1, **FILL),
    A.SafeRotate(limit=(-60, 60), p=1, **FILL),
    A.Rotate(limit=(-60, 60), p=1, **FILL),
    A.Rotate(limit=(-60, 60), crop_border=True, p=1, **FILL),
    A.Crop(x_min=10, y_min=20, x_max=100, y_max=80, p=1),
    A.CenterCrop(50, 60, p=1),
    A.CenterCrop(120, 60, pad_if_needed=True, p=1, **FILL),
    A.RandomCrop(50, 60, p=1),
    A.RandomCropFromBorders(0.2, 0.3, 0.2, 0.3, p=1),
    A.RandomResizedCrop((70, 80), p=1),
    A.RandomSizedCrop((40, 90), (70, 80), p=1),
    A.CropAndPad(px=(-10, 20, 7, -5), p=1, **FILL),
    A.CropAndPad(percent=(-0.2, 0.2), keep_size=False, p=1, **FILL),
    A.Pad((5, 10, 15, 20), p=1, **FILL),
    A.PadIfNeeded(150, 140, p=1, **FILL),
    A.Resize(120, 70, p=1),
    A.RandomScale((-0.4, 0.4), p=1),
    A.SmallestMaxSize(60, p=1),
    A.LongestMaxSize(200, p=1),
]


def coordinates() -> np.ndarray:
    """Red is the column of 128, green the row of 96, in steps of a half; blue is 0."""
    image = np.zeros((96, 128, 3), dtype=np.uint8)
    image[..., 0] = 2 * np.arange(128)[None, :]
    image[..., 1] = 2 * np.arange(96)[:, None]
    return image


def tree(*transforms: Any, **options: Any) -> dict[str, Any]:
    serialised = A.core.serialization.serialize_enum(A.to_dict(A.Compose(list(transforms), **options)))
    return json.loads(json.dumps(serialised, default=lambda value: value.item()))


def augmenter(*transforms: Any, seed: int = 3, **options: Any) -> Augmenter:
    return Augmenter(Augment(**WHOLE, pipeline=tree(*transforms, **options)), SPEC, seed)


def assert_follows(augmenter: Augmenter, rows: int = 5) -> None:
    """Assert that the matrix puts each pixel's centre where its colours say, within a grey level (half a pixel)."""
    j, i = np.meshgrid(np.arange(128) + 0.5, np.arange(96) + 0.5)
    for row in range(rows):
        pixels, matrix = augmenter(coordinates(), epoch=0, row=row)
        assert pixels.shape == (96, 128, 3)
        assert pixels.dtype == np.uint8
        mapped = np.stack([j, i, np.ones_like(j)], -1) @ matrix.astype(np.float64).T
        truth = pixels[..., :2] / 2 + 0.5
        inside = (pixels[..., 2] == 0) & (mapped > 2).all(-1) & (mapped < (126, 94)).all(-1)
        assert inside.mean() > 0.1
        error = np.abs(mapped - truth)[inside]
        assert np.quantile(error, 0.98) < 0.8
        assert np.abs((mapped - truth)[inside].mean(0)).max() < 0.3


@pytest.mark.parametrize("transform", GEOMETRY, ids=lambda transform: type(transform).__name__)
def test_the_matrix_follows(transform: Any) -> None:
    assert_follows(augmenter(transform))


def test_every_transform_that_is_followed_is_tried() -> None:
    assert {type(transform).__name__ for transform in GEOMETRY} | {"ShiftScaleRotate"} == set(FOLLOWED)


def test_the_matrix_follows_through_compositions() -> None:
    """Chances, alternatives and repetition, with what keeps the colours in between."""
    composed = augmenter(
        A.OneOf(
            [A.HorizontalFlip(p=0.5), A.Sequential([A.VerticalFlip(p=1), A.RandomCrop(80, 90, p=1)], p=0.5)], p=0.8
        ),
        A.SomeOf([A.Affine(rotate=20, p=0.7, **FILL), A.Transpose(p=0.5), A.NoOp(p=1)], n=3, replace=True),
        A.Compose([A.RandomResizedCrop((64, 64), p=0.5)], p=0.9),
        A.RandomOrder([A.RandomScale(0.2, p=1), A.HorizontalFlip(p=0.5)], n=2),
    )
    assert_follows(composed, rows=25)


def test_samples_are_their_keys_alone_and_transforms_draw_apart() -> None:
    steps = [A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5), A.CoarseDropout(fill="random", p=1), A.GaussNoise(p=1)]
    image, rows = coordinates(), range(60)
    samples = [augmenter(*steps)(image, epoch=0, row=row)[0].tobytes() for row in rows[:5]]
    assert samples == [augmenter(*steps)(image, epoch=0, row=row)[0].tobytes() for row in rows[:5]]
    one = augmenter(*steps)
    for row in reversed(rows):  # whatever came before
        pixels, _ = one(image, epoch=0, row=row)
        assert row >= 5 or pixels.tobytes() == samples[row]
    assert augmenter(*steps, seed=4)(image, epoch=0, row=0)[0].tobytes() not in samples
    signs = [np.sign(one(image, epoch=1, row=row)[1].diagonal()) for row in rows]
    assert len(np.unique(signs, axis=0)) == 4


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (A.Perspective(), r"transforms\[0\]: Perspective: moves pixels in a way"),
        (A.ElasticTransform(), "ElasticTransform: moves pixels"),
        (A.GridDistortion(), "GridDistortion: moves pixels"),
        (A.RandomGridShuffle(), "RandomGridShuffle: moves pixels"),
        (A.BBoxSafeRandomCrop(), "BBoxSafeRandomCrop: moves pixels"),
        (A.Normalize(), "Normalize: fgvc normalises images itself"),
        (A.ToFloat(), "ToFloat: fgvc normalises"),
        (A.ToTensorV2(), "ToTensorV2: fgvc normalises"),
        (A.RandomCrop(500, 500), "RandomCrop: fails on an image of 96 x 128"),
        (A.ToGray(num_output_channels=1), "ToGray: leaves uint8"),
        (A.OneOf([A.GaussNoise(), A.ThinPlateSpline()]), r"transforms\[0\].transforms\[1\]: ThinPlateSpline"),
        (A.OneOrOther(A.HorizontalFlip(), A.NoOp()), "HorizontalFlip: moves pixels within a composition"),
        (A.OverlayElements(), "OverlayElements: moves pixels in a way .* or works on other things"),
    ],
)
def test_what_can_not_be_followed_is_refused_by_name(transform: Any, message: str) -> None:
    with pytest.raises(FgvcError, match=r"^augment.pipeline: transform.*" + message):
        augmenter(transform)


def changed(change: dict[str, Any]) -> dict[str, Any]:
    pipeline = tree(A.GaussNoise(p=1))
    pipeline["transform"]["transforms"][0] |= change
    return pipeline


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"transform": [1]}, "transform"),
        (changed({"__class_fullname__": "GausNoise"}), "no such transform; did you mean GaussNoise"),
        (changed({"var_limit": 10}), r"transforms\[0\]: GaussNoise: has no argument var_limit"),
        (changed({"std_range": [0.5, 0.1]}), r"GaussNoise: std_range"),
        (changed({"__class_fullname__": "OneOf"}), "OneOf: has no list of transforms"),
        (changed({"__class_fullname__": "Lambda"}), "Lambda: is a function of your own"),
        ({"transform": {"__class_fullname__": "FDA", "p": 1}}, "FDA: fails on an image of 96 x 128"),
        (tree(A.GaussNoise(p=1)) | {"__version__": "1.3.1", "transform": {"p": 1}}, "written by albumentations 1.3.1"),
    ],
)
def test_broken_trees_are_named_by_place(broken: dict[str, Any], message: str) -> None:
    with pytest.raises(FgvcError, match=r"augment.pipeline.*" + message):
        Augmenter(Augment(pipeline=broken), SPEC, seed=0)


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_a_file_is_read_as_albumentations_wrote_it_and_recorded(kind: str, tmp_path: Path, recipe_tree: dict) -> None:
    pipeline = A.Compose(
        [A.RandomBrightnessContrast((-1e-5, 0.3), p=0.5), A.Affine(rotate=(-9, 9), p=0.5), A.OneOf([A.Blur()])]
    )
    A.save(pipeline, tmp_path / f"p.{kind}", data_format=kind)
    own = tmp_path / "recipe.yaml"
    own.write_text(yaml.safe_dump(recipe_tree | {"augment": {"pipeline": str(tmp_path / f"p.{kind}")}}))
    recipe = load_recipe(own)
    assert recipe.augment.flip == recipe.augment.brightness == 0
    assert recipe.augment.pipeline == {"file": f"p.{kind}"} | tree(*pipeline.transforms)
    recorded = tmp_path / "recorded.yaml"
    recorded.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    (tmp_path / f"p.{kind}").unlink()
    assert load_recipe(recorded) == recipe, "what a run recorded needs no file"
    names = [name for name, _ in Augmenter(recipe.augment, SPEC, 0).steps(coordinates(), epoch=0, row=0)]
    assert [name.partition(":")[0] for name in names] == ["crop", "RandomBrightnessContrast", "Affine", "OneOf"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "can't read the file"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b'{"transform": {', r"p:1: not valid JSON"),
        (b"transform:\n  - [1", r"p:\d: not plain YAML"),
        (b"transform: !!python/tuple [1]", "not plain YAML"),
        (b"a: 1", "no pipeline of albumentations"),
        (b"", "no pipeline of albumentations"),
    ],
)
def test_broken_files_are_named(text: bytes | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "p").write_bytes(text)
    with pytest.raises(FgvcError, match=rf"augment.pipeline: .*{message}.*write it with albumentations.save"):
        read_pipeline(tmp_path / "p")


def test_an_image_that_a_pipeline_fails_on_is_an_error_of_its_own() -> None:
    failing = Augmenter(Augment(pipeline=tree(A.RandomScale((-0.9, -0.9), p=1), A.RandomCrop(8, 12, p=1))), SPEC, 0)
    failing._compose.transforms[0].scale_limit = (-0.95, -0.95)  # smaller than was tried
    with pytest.raises(FgvcError, match="augment.pipeline: fails on an image: CropSizeError"):
        failing(coordinates(), epoch=0, row=0)
