"""Settings of images: the largest picture, the preprocessing of the deployed stack, and the size of the network's input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from fgvc.config.knots import Scheduled, Value, knot_positions, value_at
from fgvc.config.section import Section, Size

MAX_PIXELS = 50_000_000  # of a picture, by its header: the limit of every verb, unless a setting or an option has another
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Triple = tuple[float, float, float]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Spread = tuple[Positive, Positive, Positive]
Byte = Annotated[int, Field(ge=0, le=255)]


def _grey(colour: object) -> object:
    return (colour,) * 3 if isinstance(colour, int) and not isinstance(colour, bool) else colour


Colour = Annotated[tuple[Byte, Byte, Byte], BeforeValidator(_grey, json_schema_input_type=Byte | tuple[Byte, Byte, Byte])]  # RGB
PLAIN = ("bilinear", "bicubic")  # interpolations without antialiasing
Layout = Literal["NCHW", "NHWC"]
Ending = Literal["softmax", "log_softmax", "sigmoid"]


def possible_mean(mean: Triple, white: float) -> Triple:
    """Check a normalisation's mean, and return it. Raises ValueError if pixels from 0 to `white` can't have this mean: it is in
    other units."""
    if all(0 <= value <= white for value in mean):
        return mean
    advice = "give it in units of 0..1"
    if white == 255:
        advice = "no picture is darker than 0 or lighter than 255"
    elif all(0 <= value <= 255 for value in mean):
        advice = "divide mean and std by 255, or say that white is 255 (input_range: 255)"
    raise ValueError(f"{mean} is outside of 0..{white:g}, the range of the pixels that it is taken from; {advice}")


class _Normalised(Section):
    """Keys and checks that deploy.* and a bundle's preprocessing share."""

    renamed: ClassVar[Mapping[str, str]] = {"crop_fraction": "crop_pct", "channels": "channel_order"}

    @field_validator("mean", check_fields=False)
    @classmethod
    def _within_range(cls, mean: Triple | None, info: ValidationInfo) -> Triple | None:
        return mean if mean is None else possible_mean(mean, info.data.get("input_range", 1))

    @field_validator("antialias", check_fields=False)
    @classmethod
    def _has_a_plain_form(cls, antialias: bool, info: ValidationInfo) -> bool:
        interpolation = info.data.get("interpolation")
        if not antialias and interpolation not in (None, *PLAIN):
            raise ValueError(f"false is for interpolation {' and '.join(PLAIN)} alone, not {interpolation}")
        return antialias


class Deploy(_Normalised):
    """Preprocessing of the deployed stack, which is as fixed as its graph.

    Evaluation, bundle and serving follow it. Keys that are left out take the values that the weights expect."""

    resize: Literal["crop", "pad", "squash"] = Field(
        "crop",
        description="crop: shorter side to size / crop_pct, then the centre; pad: longer side to size, "
        "then a border of `fill`; squash: both sides to size, whatever the aspect",
    )
    crop_pct: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the resized image that the centre crop keeps; "
        "default: the weights' own for crop, 1 for pad and squash",
    )
    interpolation: Interpolation | None = Field(None, description="default: what the weights expect")
    antialias: bool = Field(
        True,
        description="true: as Pillow and torchvision reduce an image, each pixel from all that it covers; false: as OpenCV and "
        "TensorFlow do, from its 2 x 2 (bilinear) or 4 x 4 (bicubic) neighbours alone",
    )
    channel_order: Literal["rgb", "bgr"] = Field("rgb", description="order of the input's three channels")
    input_range: Literal[1, 255] = Field(1, description="value of white before mean and std are applied")
    mean: Triple | None = Field(None, description="per channel, in units of input_range, in the order of channel_order")
    std: Spread | None = Field(None, description="per channel, in units of input_range, in the order of channel_order")
    fill: Colour = Field((128, 128, 128), description="border that `pad` adds: RGB, or one number for a grey, 0-255")
    seen: Literal["train", "none"] | Path = Field(
        "train",
        description="which images the deployed file was trained on, which neither choose nor judge a net that begins with its "
        "weights. train: the set's own train split, and splits that fgvc draws; none: no image of this set; a file that lists "
        "them, a path a line; or a bundle, which lists the images that judge it: all others",
    )
    unseen: Path | None = Field(
        None,
        description="a folder of labelled images beside data.root that the deployed file was not trained on, such as those "
        "collected since: with these, a set that has no split of its own can be learned from as a whole",
    )
    labels: Path | None = Field(
        None, description="the deployed stack's label order: a text file, one class a line, or a bundle's labels.json"
    )


class NetworkFile(Section):
    """Input and output of a network's file as its graph has them: layout, type, the preprocessing inside of the graph, and its
    last operator.

    The tensor that is fed holds what `preprocess.json` makes, in this layout and type; whole numbers are rounded. fgvc writes all
    keys; by hand `output` alone may be given, where a file has several: the graph says the rest."""

    input: str | None = Field(None, description="name of the input")
    layout: Layout | None = Field(None, description="NCHW: channels before rows and columns; NHWC: after them")
    dtype: str | None = Field(None, description="type of the input: float32, float16, float64 or uint8")
    in_graph: tuple[str, ...] = Field((), description="what the graph does to the pixels before its first layer, in order")
    output: str | None = Field(None, description="name of the output with the classes")
    ending: Ending | None = Field(None, description="what the output's numbers went through last; null: they are logits")

    @property
    def whole(self) -> bool:
        """Whether all keys are given, as read from a graph, and not `output` alone."""
        return None not in (self.input, self.layout, self.dtype, self.output)


class Preprocess(_Normalised):
    """Preprocessing with every value resolved, from an image to the network's input, as stored in a bundle."""

    size: tuple[int, int] = Field(description="height, width of the network's input in pixels")
    resize: Literal["crop", "pad", "squash"] = "crop"
    crop_pct: float = Field(0.875, gt=0, le=1)
    interpolation: Interpolation = "bicubic"
    antialias: bool = True
    channel_order: Literal["rgb", "bgr"] = "rgb"
    input_range: Literal[1, 255] = 1
    mean: Triple = (0.485, 0.456, 0.406)
    std: Spread = (0.229, 0.224, 0.225)
    fill: Colour = (128, 128, 128)
    network: NetworkFile | None = Field(None, description="the file that it is for; in a bundle, and in a run from a file")

    later: ClassVar[Mapping[str, object]] = {"antialias": True, "network": None}
    """Keys that older bundles and runs do not state, and what these mean; so much is never written."""

    @property
    def output(self) -> str | None:
        """Name of the file's output with the classes; None: unknown."""
        return None if self.network is None else self.network.output

    @property
    def ending(self) -> Ending | None:
        """The file's last operator on the classes' numbers (softmax, log_softmax, sigmoid); None: it has none, or that is
        unknown."""
        return None if self.network is None else self.network.ending

    @model_serializer(mode="wrap")
    def _without_defaults_of_later(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key not in self.later or value != self.later[key]}


class Image(Section):
    """The network's input."""

    size: Size = Field((224, 224), description="one number for a square, or [height, width]; pixels")
    train_scale: Scheduled = Field(
        1.0,
        description="side of training images in units of size, to 8 pixels: below 1 all along trains for a larger "
        "evaluation (FixRes), knots such as [[0, 0.6], [0.8, 1]] grow the images epoch by epoch",
    )

    @field_validator("train_scale")
    @classmethod
    def _positive(cls, scale: Value) -> Value:
        if (least := min(value_at(scale, share) for share in knot_positions(scale))) <= 0:
            raise ValueError(f"must be above 0 (got {least:g})")
        return scale

    def train_size(self, progress: float) -> tuple[int, int]:
        """Height and width of training images at `progress` in [0,1] of the run."""
        return self.scaled(value_at(self.train_scale, progress))

    def scaled(self, scale: float) -> tuple[int, int]:
        """Height and width at `scale` times the size, rounded to multiples of 8 pixels."""
        if scale == 1:
            return self.size
        height, width = (max(8, 8 * round(side * scale / 8)) for side in self.size)
        return height, width

    @property
    def largest_train_size(self) -> tuple[int, int]:
        """Height and width at which training images are rendered; smaller ones are reduced from it."""
        return max(self.train_size(share) for share in knot_positions(self.train_scale))
