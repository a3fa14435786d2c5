"""Settings of data: kinds of sets, their splits, and the augmentation of training images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from fgvc.config.images import MAX_PIXELS
from fgvc.config.section import Section
from fgvc.errors import FgvcError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Range = tuple[float, float]


Policy = Literal["none", "randaugment", "trivialaugment", "autoaugment", "augmix", "3-augment"]
POLICIES: Mapping[str, Mapping[str, float]] = {
    "none": {},
    "randaugment": {"policy_magnitude": 9.0, "policy_ops": 2, "policy_probability": 0.5},
    "trivialaugment": {"policy_probability": 1.0},
    "autoaugment": {"policy_probability": 1.0},
    "augmix": {"policy_magnitude": 3.0, "policy_ops": 3, "policy_probability": 1.0},
    "3-augment": {"policy_probability": 1.0},
}
"""The settings of each policy, with their defaults."""
COLOURS = ("brightness", "contrast", "saturation")


Pipeline = Path | dict[str, Any] | None


def _file_or_tree(value: object) -> object:
    if value is not None and not isinstance(value, str | Path | dict):
        raise ValueError(f"the file that albumentations.save wrote (got {value!r})")
    return value


class Augment(Section):
    """Augmentation of training images."""

    crop: Literal["random_resized", "fit"] = Field(
        "random_resized",
        description="random_resized: a window of random area and aspect, stretched to size; "
        "fit: a window of random area that keeps the deployed fit's geometry (whole 2:1 leaves with deploy.resize=pad)",
    )
    crop_scale: Range = Field((0.35, 1.0), description="the window's area as a share of the image (fit: of its canvas)")
    crop_ratio: Range = Field((0.75, 4 / 3), description="width / height of the window of random_resized")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a left-right flip")
    vertical_flip: float = Field(0.0, ge=0, le=1, description="probability of an upside-down flip")
    rotate: float = Field(0.0, ge=0, le=180, description="largest rotation in degrees, either way")
    translate: float = Field(0.0, ge=0, lt=1, description="largest shift as a share of the size, either way")
    zoom: float = Field(0.0, ge=0, lt=1, description="scale factor uniform in 1 +- this, after the crop")
    shear: float = Field(0.0, ge=0, lt=90, description="largest horizontal shear in degrees, either way")
    brightness: float = Field(0.2, ge=0, le=1, description="factor uniform in 1 +- this")
    contrast: float = Field(0.2, ge=0, le=1, description="factor uniform in 1 +- this")
    saturation: float = Field(0.2, ge=0, le=1, description="factor uniform in 1 +- this")
    hue: float = Field(0.0, ge=0, le=0.5, description="shift uniform in +- this share of the colour circle")
    grayscale: float = Field(0.0, ge=0, le=1, description="probability of dropping the colour")
    policy: Policy = Field(
        "none",
        description="none | randaugment (arXiv:1909.13719) | trivialaugment (2103.10158) | autoaugment (1805.09501) | augmix "
        "(1912.02781) | 3-augment (2204.07118), between the flips and the colours, by timm's and torchvision's code. With one, "
        "brightness, contrast and saturation are 0 unless they are given, and 0.3 with 3-augment",
    )
    policy_magnitude: float | None = Field(
        None, ge=0, le=10, description="of randaugment (default 9, +- 0.5) and augmix (default 3, the largest of its draws)"
    )
    policy_ops: int | None = Field(
        None, ge=1, le=10, description="operations in turn of randaugment (default 2), chains that augmix blends (default 3)"
    )
    policy_probability: float | None = Field(
        None, ge=0, le=1, description="of each operation of randaugment (default 0.5), of other policies on an image (default 1)"
    )
    policy_geometry: bool = Field(
        True, description="false: without the policy's shears, shifts and rotations, so that boxes, masks and maps can follow"
    )
    pipeline: Annotated[Pipeline, BeforeValidator(_file_or_tree, json_schema_input_type=Pipeline)] = Field(
        None,
        description="an albumentations pipeline, last of all: a file that albumentations.save wrote (JSON or YAML); a run "
        "records what is in it. With one, the flip, brightness, contrast and saturation are 0 unless they are given",
    )

    @model_validator(mode="before")
    @classmethod
    def _policy_defaults(cls, tree: Any) -> Any:
        """Fill in the defaults that go with a policy or a pipeline."""
        if not isinstance(tree, Mapping):
            return tree
        policy, piped = tree.get("policy", "none"), tree.get("pipeline") is not None
        colour = 0.3 if policy == "3-augment" else 0.0
        replaced = dict.fromkeys(COLOURS, colour) if policy != "none" or piped else {}
        replaced |= {"flip": 0.0} if piped else {}
        own = POLICIES.get(policy, {}) if isinstance(policy, str) else {}
        return {**replaced, **tree, **{key: value for key, value in own.items() if tree.get(key) is None}}

    @model_validator(mode="after")
    def _of_the_policy(self) -> Augment:
        for key in ("policy_magnitude", "policy_ops", "policy_probability"):
            if getattr(self, key) is not None and key not in POLICIES[self.policy]:
                raise ValueError(f"{key}: augment.policy: {self.policy} has none; leave it out, or choose another policy")
        return self

    @property
    def hides_geometry(self) -> bool:
        """Whether the policy moves pixels without telling where they come from."""
        return self.policy not in ("none", "3-augment") and self.policy_geometry

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _ordered(cls, value: Range) -> Range:
        if not 0 < value[0] <= value[1]:
            raise ValueError("give two numbers above 0, the smaller first")
        return value

    @field_validator("crop_scale")
    @classmethod
    def _share(cls, value: Range) -> Range:
        if value[1] > 1:
            raise ValueError("a share of the image's area is at most 1")
        return value

    def shrink_to(self, size: tuple[int, int]) -> int:
        """Least shorter side, in pixels, of a shrunk image whose smallest crop fills `size` without being enlarged."""
        return math.ceil(max(size) / math.sqrt(self.crop_scale[0]))


class Source(Section):
    """Settings that all kinds of sets share. Each kind adds `kind`; fgvc.data.sources.read reads it."""

    root: Path = Field(description="folder of the set; image paths are relative to it")
    val_fraction: float = Field(
        0.1, ge=0, lt=1, description="share of the train split set aside for validation if the set has no val split; 0: none"
    )
    fold: tuple[int, int] | None = Field(
        None,
        description="[i, n]: validate on fold i (from 0) of n equal folds of train, stratified, by whole groups where there are "
        "groups, in place of val_fraction and of the set's own validation split, which joins train; null: off",
    )
    hold_out: bool = Field(
        True,
        description="false: no validation split; train keeps its images, and takes those of the set's own validation split",
    )
    split_seed: int = Field(
        0, ge=0, description="seed of the splits that fgvc makes; apart from train.seed, so that all runs share them"
    )
    copies_together: bool = Field(
        True,
        description="whether near copies of a picture stay in one split where fgvc draws it; up to 50,000 pictures are read once "
        "for that. false: they are not looked for",
    )
    max_unreadable: float = Field(
        0.05, ge=0, le=1, description="share of unreadable files that is skipped and reported; above it training stops"
    )
    max_megapixels: float = Field(
        MAX_PIXELS / 1e6,
        gt=0,
        le=4000,
        description="most pixels of a picture, in millions; a larger one counts as unreadable. Where this is raised, JPEGs of "
        "more than 50 are decoded at 1/2, 1/4 or 1/8 of their sides. It is no part of an exported bundle: serve and predict have "
        "--megapixels",
    )
    classes: list[str] | None = Field(
        None, description="class names in the order of the outputs; default: the set's own order, else sorted"
    )
    first_classes: int | None = Field(
        None, ge=2, description="only the first so many classes, for quick studies; null: all of them"
    )

    @model_validator(mode="after")
    def _fold_is_held_out(self) -> Source:
        if self.fold is not None and not self.hold_out:
            raise ValueError("fold: names the validation split, and hold_out: false leaves none; give one of the two")
        return self

    @field_validator("fold")
    @classmethod
    def _valid_fold(cls, fold: tuple[int, int] | None) -> tuple[int, int] | None:
        if fold is not None and not 0 <= fold[0] < fold[1] >= 2:
            raise ValueError("[i, n] with n of 2 or more and i from 0 to n - 1, for example [0, 5]")
        return fold

    @property
    def max_pixels(self) -> int:
        return round(self.max_megapixels * 1e6)

    def folder(self) -> Path:
        """The folder of the set: `root` with ~ expanded. Raises FgvcError if it is no folder."""
        root = self.root.expanduser()
        if not root.is_dir():
            raise FgvcError(
                f"{root}: data.root is {'not a folder' if root.exists() else 'not there'}; name the set's folder"
            )
        return root


Name = Literal["flowers102", "oxford_pets", "aircraft", "stanford_cars"]


class CubData(Source):
    """Files in CUB's layout. The official test split stays; validation is taken from the official train split."""

    kind: Literal["cub"] = "cub"


class FolderData(Source):
    """Class folders: <class>/..., or train/<class>/... with val/ (or valid/, validation/) and test/ beside it.

    Splits may have other usual names (training, dev, testing), in any capitals. Images in folders below a class belong to
    the class, and so do those behind links, unless these lead to another class or a folder above. Hidden files and files of
    other types are left out, with a warning.
    """

    kind: Literal["folder"] = "folder"
    test_fraction: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="share of all images set aside for test where the classes lie in one folder; 0: none",
    )
    group_size: int | None = Field(
        None,
        ge=2,
        description="for photographs taken in a row, which are alike: by the numbers in their names, so many of a class in "
        "turn are a group, which no split that fgvc makes divides, and no fold; null: no groups",
    )


class CsvData(Source):
    """A table with a header. Rows of one group (one animal, one plant, one day) never straddle a split."""

    kind: Literal["csv"] = "csv"
    file: Path = Field(description="the table; relative to root unless absolute")
    path_column: str = Field("path", description="column of the image's path, relative to root")
    label_column: str = Field("label", description="column of the class name")
    split_column: str = Field("split", description="column of train, val or test; may be missing from the table")
    group_column: str = Field("group", description="column of the group's name; may be missing from the table")
    delimiter: str = Field(",", min_length=1, max_length=1, description="character between the fields")
    encoding: str | None = Field(
        None, description="default: UTF-8 (or UTF-16 with its mark), else GB 18030, else Windows-1252"
    )
    test_fraction: float = Field(
        0.2, ge=0, lt=1, description="share of all rows set aside for test where there is no split column; 0: none"
    )


class NamedData(Source):
    """Flowers102, Oxford-IIIT Pet, FGVC Aircraft or Stanford Cars, with their own splits. CUB-200-2011 is `kind: cub`."""

    kind: Literal["torchvision"] = "torchvision"
    name: Name = Field(description="flowers102 | oxford_pets | aircraft | stanford_cars")
    download: bool = Field(
        False, description="fetch the set into root where it is not there (stanford_cars: impossible)"
    )


class HfData(Source):
    """A set in the formats of Hugging Face's datasets library: parquet files, what Dataset.save_to_disk wrote, image folders, or
    a set of the hub by its name. Images stay in their tables, and are decoded when they are needed."""

    kind: Literal["hf"] = "hf"
    root: Path = Field(
        description="folder of the parquet files, of Dataset.save_to_disk, or of image folders; a .parquet file; with name: "
        "where the library keeps what it fetches"
    )
    files: str | None = Field(
        None, description="parquet files below root, such as data/*.parquet; default: all, by their splits' names"
    )
    name: str | None = Field(None, description="of a set of the hub, such as ethz/food101; null: root holds the set")
    config: str | None = Field(None, description="of a set of the hub that comes in several")
    revision: str | None = Field(None, description="of a set of the hub: a commit, a tag or a branch")
    image_column: str | None = Field(None, description="default: the one with images, or image, or img")
    label_column: str | None = Field(None, description="default: label, or the one with class labels")
    group_column: str | None = Field(None, description="of groups that no split divides; null: no groups")
    test_fraction: float = Field(
        0.2, ge=0, lt=1, description="share of all rows set aside for test where the set has one split alone; 0: none"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_file(cls, tree: Any) -> Any:
        """A .parquet file as its folder and its name."""
        root = Path(str(tree["root"])) if isinstance(tree, Mapping) and "root" in tree else None
        if root is None or root.suffix.lower() != ".parquet" or tree.get("files") is not None:
            return tree
        return {**tree, "root": str(root.parent), "files": root.name}


class AutoData(Source):
    """CUB-200-2011's layout, class folders, or one table of images, whichever lies in root.

    `fgvc.data.recipe.load_recipe` replaces these settings by those of the detected kind. CUB's tables come first. Class folders
    come before a table that adds nothing: one without a column of labels, or whose labels are the folders' names. Such a table is
    read instead if it has splits that the folders lack, or groups. A table with other labels is an error that asks for the kind.
    """

    kind: Literal["auto"] = Field(
        "auto", description="auto: found out, and recorded; else folder, cub, csv, torchvision or hf, with keys of their own"
    )
    root: Path = Field(description="folder of the set, or its table (.csv, .tsv or .parquet)")
    test_fraction: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of all images set aside for test where the set has no splits; default 0.2; 0: none",
    )
    group_size: int | None = Field(None, ge=2, description="of class folders: see kind: folder")
