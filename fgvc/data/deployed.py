"""Defaults of a recipe that its deployed file decides: the size of the images, and their preprocessing.

How images are prepared is in no file: the recipe says it, or a preprocess.json beside the file, as in a bundle.
"""

from __future__ import annotations

from typing import Any

from fgvc.config.images import Deploy, Preprocess
from fgvc.config.recipe import Recipe
from fgvc.errors import FgvcError
from fgvc.images.preprocess import differences
from fgvc.runtime.bundle import read_preprocess
from fgvc.runtime.description import describe

PREPROCESS = "preprocess.json"
STATED = ("resize", "interpolation", "mean", "std")  # of deploy; and crop_pct where `resize` crops


def with_file_defaults(recipe: Recipe) -> Recipe:
    """Fill in `image.size` and the keys of `deploy` that a recipe leaves open, from its file or the preprocess.json beside it.

    Without a file, or where that is gone, the recipe as it is. Raises FgvcError where it is no classifier of images."""
    onnx = recipe.model.onnx
    if onnx is None or not (file := onnx.expanduser()).is_file():
        return recipe
    image, deploy = dict[str, Any](), dict[str, Any]()
    try:
        description = describe(file, output=recipe.model.output)
    except FgvcError as error:
        raise FgvcError(f"model.onnx: {error}") from error
    if description.ending == "sigmoid" and recipe.loss.kind != "bce":
        raise FgvcError(
            f"loss.kind: {recipe.loss.kind}: {onnx} ends with a sigmoid, which answers for each class by itself; set it to bce"
        )
    if description.white is not None:  # the graph itself does the rest
        deploy |= {"input_range": description.white, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    if (sidecar := file.with_name(PREPROCESS)).is_file():
        spec = read_preprocess(sidecar)
        image["size"] = spec.size
        deploy |= {key: getattr(spec, key) for key in Deploy.model_fields if key in Preprocess.model_fields}
    if description.height is not None and description.width is not None:
        image["size"] = description.height, description.width
    return _completed(recipe, image, deploy)


def with_recorded_defaults(recipe: Recipe, recorded: Recipe) -> Recipe:
    """Fill in the same keys of a run that goes on as the run recorded them, wherever the file and its preprocess.json are now."""
    deploy = {key: getattr(recorded.deploy, key) for key in type(recorded.deploy).model_fields if key != "labels"}
    return _completed(recipe, {"size": recorded.image.size}, deploy)


def _completed(recipe: Recipe, image: dict[str, Any], deploy: dict[str, Any]) -> Recipe:
    sections = {}
    for name, values in (("image", image), ("deploy", deploy)):
        section = getattr(recipe, name)
        left_open = {key: value for key, value in values.items() if key not in section.model_fields_set}
        sections[name] = section.model_copy(update=left_open)
    return recipe.model_copy(update=sections)


def sidecar_doubts(recipe: Recipe, spec: Preprocess) -> list[str]:
    """Warnings where the preprocess.json beside the file differs from the recipe, which takes precedence."""
    if recipe.model.onnx is None or not (sidecar := recipe.model.onnx.expanduser().with_name(PREPROCESS)).is_file():
        return []
    lines = differences(spec, read_preprocess(sidecar))
    return [f"{sidecar} says otherwise than the recipe, which holds: {'; '.join(lines)}"] if lines else []


def refuse_unstated(recipe: Recipe) -> None:
    """Raise FgvcError with the keys of `deploy` that nothing states for a deployed file, and `image.size` where that is open."""
    deploy = recipe.deploy
    needed = [*STATED, *(["crop_pct"] if deploy.resize == "crop" else [])]
    keys = [f"deploy.{key}" for key in needed if key not in deploy.model_fields_set or getattr(deploy, key) is None]
    missing = [*(["image.size"] if "size" not in recipe.image.model_fields_set else []), *keys]
    if not missing or recipe.model.onnx is None:
        return
    raise FgvcError(
        f"{recipe.model.onnx}: how are its images prepared? Neither it nor a {PREPROCESS} beside it says {', '.join(missing)}. "
        "Give them in the recipe, such as deploy.resize=crop deploy.crop_pct=0.875 deploy.interpolation=bilinear "
        'deploy.mean="[0.485, 0.456, 0.406]" deploy.std="[0.229, 0.224, 0.225]" (and channel_order and input_range, where they '
        f"are not rgb and 1), or put a {PREPROCESS} as a bundle has it beside the file"
    )
