"""Albumentations, and pipelines of it that users bring. The only module that imports it."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from fgvc.data.geometry import FOLLOWED
from fgvc.errors import FgvcError
from fgvc.io.names import nearest

Step = tuple[str, Any]  # name and transform

IN_PLACE = (
    "NoOp", "CoarseDropout", "Erasing", "GridDropout", "XYMasking", "TimeMasking", "FrequencyMasking", "PixelDropout",
    "Morphological",
)  # fmt: skip
"""Transforms that albumentations counts as geometry, and that leave every pixel where it is."""
NORMALISE = ("Normalize", "ToFloat", "FromFloat", "ToTensorV2", "ToTensor3D")
OF_BOXES = ("bbox_params", "keypoint_params", "additional_targets")
ALTERNATIVES = ("OneOf", "OneOrOther", "SomeOf", "RandomOrder")


def albumentations() -> Any:
    """The package. Its import would look for a newer version on the network, and OpenCV's threads don't survive a fork; one
    image is too small to share out, anyway."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import albumentations
    import cv2

    cv2.setNumThreads(0)
    return albumentations


def pipeline_steps(tree: Mapping[str, Any], size: tuple[int, int]) -> list[Step]:
    """The steps of a pipeline, as albumentations.to_dict writes it, for images of `size` (height, width).

    Its transforms have been tried on noise. Raises FgvcError naming the place and the class of one that is unknown, can't be made
    or fails, that moves pixels otherwise than by flips, crops and affine maps, or that leaves something else than 8-bit RGB."""
    A = albumentations()
    root = tree["transform"]
    remark = f"augment.pipeline: {tree['file']}" if "file" in tree else "augment.pipeline"
    version = str(tree.get("__version__", A.__version__))
    written = (
        ""
        if version == A.__version__
        else f" (the file was written by albumentations {version}, this is {A.__version__})"
    )
    try:
        _check(root, "transform")
        noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        _try(root, "transform", noise)
        split = _class(root) == "Compose" and root.get("p", 1) == 1
        return [(_class(node), _made(node)) for node in (root["transforms"] if split else [root])]
    except _Fault as fault:
        raise FgvcError(f"{remark}: {fault}{written}") from fault.__cause__


class _Fault(Exception):
    """Error in a node of a pipeline; its message begins with the node's place."""


def _class(node: Mapping[str, Any]) -> str:
    name = str(node["__class_fullname__"])
    return name.rpartition(".")[2] if name.startswith("albumentations.") else name


def _check(node: Any, place: str, *, still: bool = False) -> None:
    """Raise _Fault where a node, or one below it, is no transform that can be followed; `still`: it may move no pixels."""
    A = albumentations()
    registry = A.core.serialization.SERIALIZABLE_REGISTRY
    if not isinstance(node, Mapping) or "__class_fullname__" not in node:
        raise _Fault(f"{place}: is no transform: a mapping with __class_fullname__ is expected")
    name = _class(node)
    at = f"{place}: {name}"
    if name in NORMALISE:
        raise _Fault(f"{at}: fgvc normalises images itself, as deploy.* says; remove it")
    if name in A.core.serialization.NON_SERIALIZABLE_REGISTRY:
        raise _Fault(f"{at}: is a function of your own, which is not in the file; remove it")
    if name not in registry:
        near = nearest(name, [candidate for candidate in registry if "." not in candidate])
        hint = f"; did you mean {near[0]}?" if near else ""
        raise _Fault(f"{at}: albumentations {A.__version__} has no such transform{hint}")
    kind = registry[name]
    if issubclass(kind, A.BaseCompose):
        inner = node.get("transforms")
        if not isinstance(inner, list) or not inner:
            raise _Fault(f"{at}: has no list of transforms")
        if name == "ReplayCompose":
            raise _Fault(f"{at}: records what it draws, which nothing reads here; make it a Compose")
        for number, child in enumerate(inner):
            _check(
                child,
                f"{place}.transforms[{number}]",
                still=still or name in ("OneOrOther", "SelectiveChannelTransform"),
            )
        return
    if name in FOLLOWED and still:
        raise _Fault(
            f"{at}: moves pixels within a composition that does not tell which was applied; put it into a OneOf"
        )
    if not (issubclass(kind, A.ImageOnlyTransform) or name in FOLLOWED or name in IN_PLACE):
        raise _Fault(
            f"{at}: moves pixels in a way that boxes, masks and attention maps can't follow, or works on other things than one "
            f"image; remove it. Geometry may be of {', '.join(FOLLOWED)}"
        )
    try:
        _made(node)
    except _Fault as fault:
        raise _Fault(f"{at}: {fault}") from fault.__cause__


def _made(node: Mapping[str, Any]) -> Any:
    """The transform of a checked node. Raises _Fault for arguments that it does not have or take."""
    A = albumentations()
    with warnings.catch_warnings(record=True):  # of its parents' arguments, which albumentations itself wrote
        warnings.simplefilter("always")
        try:
            made = A.from_dict({"transform": _without_boxes(node)})
        except Exception as error:  # whatever a constructor raises
            raise _Fault(_in_words(error)) from error
    if "transforms" not in node:
        arguments = {*made.get_transform_init_args_names(), *made.InitSchema.model_fields, "p", "__class_fullname__"}
        if unknown := sorted(node.keys() - arguments):
            raise _Fault(f"has no argument {', '.join(unknown)}; mend or remove it")
        if "p" not in node:
            raise _Fault("has no p, the probability that it is applied; give it one")
    return made


def _in_words(error: Exception) -> str:
    """Message of a constructor's exception, without the pages of advice that pydantic adds."""
    if isinstance(error.__cause__, ValidationError):
        rows = [
            (".".join(map(str, row["loc"])), row["msg"].removeprefix("Value error, "))
            for row in error.__cause__.errors()
        ]
        return "; ".join(f"{place or 'arguments'}: {message}" for place, message in rows)
    return str(error) or type(error).__name__


def _without_boxes(node: Mapping[str, Any]) -> dict[str, Any]:
    """A node without albumentations' own handling of boxes and key points: here they follow the crop's matrix."""
    plain = {key: value for key, value in node.items() if key not in OF_BOXES}
    if "transforms" in plain:
        plain["transforms"] = [_without_boxes(child) for child in plain["transforms"]]
    return plain


def _try(node: Mapping[str, Any], place: str, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Apply every transform at and below a checked node once, and return what the node makes of the image. Raises _Fault."""
    name, at = _class(node), f"{place}: {_class(node)}"
    if "transforms" in node:
        part = image[..., list(node.get("channels", (0, 1, 2)))] if name == "SelectiveChannelTransform" else image
        outcome = part
        for number, child in enumerate(node["transforms"]):
            outcome = _try(child, f"{place}.transforms[{number}]", part if name in ALTERNATIVES else outcome)
        return image if part is not image else outcome
    transform = _made(node)
    transform.set_random_state(np.random.default_rng(0), random.Random(0))
    try:
        result = transform(image=image.copy(), force_apply=True)["image"]
    except Exception as error:  # whatever a transform raises
        height, width = image.shape[:2]
        raise _Fault(f"{at}: fails on an image of {height} x {width}: {error}") from error
    if not isinstance(result, np.ndarray) or result.dtype != np.uint8 or result.shape[2:] != image.shape[2:]:
        got = f"{result.dtype} {result.shape}" if isinstance(result, np.ndarray) else type(result).__name__
        raise _Fault(f"{at}: leaves {got}, and images are to stay 8-bit RGB; remove it")
    return result
