"""Advice from the results of `fgvc probe`: what limits the best affordable net, how to train from it, and a teacher for it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fgvc.config.models import Model
from fgvc.config.shipped import recipes
from fgvc.data.recipe import kind_at
from fgvc.evaluation.learning_curve import FOLDS, SHARES, Share
from fgvc.studies.probe import ProbeResults, Result, Size

RECIPES = ("any/good", "any/plain", "cub50/plain")  # for a folder or a table: the first that there is
CEILING = 0.99
TAUGHT = {"temperature": 2, "kd": 4}  # with which every teacher in docs/results.md was measured
SAME_MACS, SAME_SECONDS = 1.05, 1.25  # times the deployed net's cost that count as no more


@dataclass(frozen=True, slots=True)
class Limitation:
    """A possible limit of the accuracy, and whether it applies."""

    what: str  # images, resolution, start or ceiling
    limiting: bool | None  # None: not tried
    text: str
    gain: Share | None = None


@dataclass(frozen=True, slots=True)
class Advice:
    """Conclusions from probe results."""

    best: Result  # the most accurate that costs no more than the deployed net
    limits: tuple[Limitation, ...]
    command: str  # trains from it, or from the best of these that is no bundle; empty where all are
    larger: bool  # whether a net that costs more was tried
    teacher: Result | None  # the most accurate that costs more, if it is more accurate than the best
    teacher_gain: Share | None

    @property
    def teacher_line(self) -> str:
        """Line for the recipe's techniques section, distillation as it was measured; empty without a teacher."""
        if self.teacher is None or (model := self.teacher.candidate.model) is None:
            return ""
        net: dict[str, Any] = {"backbone": model.backbone, "weights": model.weights}
        if model.onnx is not None:
            net = {"onnx": str(model.onnx)}
        settings = {"kind": "probe", **net, "size": _size_setting(self.teacher)}
        if model.kwargs:
            settings["kwargs"] = dict(model.kwargs)
        remark = "  # by the file's own weights, not the run's" * (model.onnx is not None and model.weights != "deployed")
        return f"distill: {_flow({'teachers': [settings], **TAUGHT})}{remark}"


def advise(probed: ProbeResults) -> Advice:
    """Draw conclusions from the results of nets that were not trained on the images, where there are any."""
    unbiased = [result for result in probed.results if not result.trained_images] or list(probed.results)
    affordable = [result for result in unbiased if _affordable(result, probed)] or unbiased
    best = max(affordable, key=_accuracy)
    trainable = max((result for result in affordable if result.candidate.model is not None), key=_accuracy, default=None)
    larger = [result for result in unbiased if not _affordable(result, probed) and result.candidate.model is not None]
    teacher = max(larger, key=_accuracy, default=None)
    if teacher is not None and teacher.accuracy <= best.accuracy:
        teacher = None
    return Advice(
        best=best,
        limits=(_images(best), _resolution(best, unbiased), _start(best, unbiased), *_ceiling(best)),
        command="" if trainable is None else _command(probed, trainable),
        larger=len(larger) > 0,
        teacher=teacher,
        teacher_gain=None if teacher is None else teacher.curve.gain(best.curve),
    )


def _accuracy(result: Result) -> float:
    return result.accuracy


def cost_ratio(result: Result, other: Result) -> float:
    """Ratio of the costs, in multiply-adds where both are known, else in measured seconds."""
    if result.macs is not None and other.macs is not None:
        return result.macs / other.macs
    return result.seconds / other.seconds


def _affordable(result: Result, probed: ProbeResults) -> bool:
    """Whether a result costs no more than the deployed net at its deployed size."""
    of_first = [r for r in probed.results if r.candidate is probed.first]
    first = min(of_first, key=lambda r: (r.size != probed.first.spec.size, math.prod(r.size)))
    counted = result.macs is not None and first.macs is not None
    return cost_ratio(result, first) <= (SAME_MACS if counted else SAME_SECONDS)


def _images(best: Result) -> Limitation:
    gain = best.curve.gain(share=0.5)
    rising = gain.low > 0
    remark = "the curve still rises: more images will help" if rising else "within chance"
    return Limitation("images", rising, f"all of them instead of a half give {points(gain)}; {remark}", gain)


def _resolution(best: Result, results: Iterable[Result]) -> Limitation:
    pixels = math.prod(best.size)
    larger_sizes = [
        result for result in results if result.candidate is best.candidate and math.prod(result.size) > pixels
    ]
    if not larger_sizes:
        height, width = best.size
        more = 32 * math.ceil(1.3 * height / 32), 32 * math.ceil(1.3 * width / 32)
        text = f"not tried; give a larger size, such as --size {sides(best.size)} --size {sides(more)}"
        return Limitation("resolution", None, text)
    larger = max(larger_sizes, key=_accuracy)
    gain = larger.curve.gain(best.curve)
    costs = f"{sides(larger.size)} instead of {sides(best.size)} px, {cost_ratio(larger, best):.1f} x the cost"
    return Limitation("resolution", gain.low > 0, f"{costs}: {points(gain)}", gain)


def _start(best: Result, results: Iterable[Result]) -> Limitation:
    others = [result for result in results if result.candidate is not best.candidate]
    if not others:
        return Limitation("start", None, "no other net was tried; name more by --start")
    other = max(others, key=_accuracy)
    gain = other.curve.gain(best.curve)
    costs = f"{other.candidate.name} at {sides(other.size)} px, {cost_ratio(other, best):.1f} x the cost"
    return Limitation("start", gain.low > 0, f"{costs}: {points(gain)}", gain)


def _ceiling(best: Result) -> list[Limitation]:
    accuracy = best.curve.accuracy()
    if accuracy.high < CEILING:
        return []
    wrong, count = int((~best.curve.right[0] & best.curve.held_out).sum()), int(best.curve.held_out.sum())
    text = f"{wrong} of {count} are named wrongly: nothing is left to gain"
    if wrong:
        text = f"{wrong} of {count} are named wrongly: look at these labels first (fgvc data check --suspects)"
    return [Limitation("ceiling", True, text)]


def points(gain: Share) -> str:
    """Text of a gain in points with its 95 % interval."""
    return f"{100 * gain.value:+.1f} points (95 %: {100 * gain.low:+.1f} to {100 * gain.high:+.1f})"


def sides(size: Size) -> str:
    """Text of a size as `--size` reads it: 160, or 112x224 (height and width)."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"


def _size_setting(result: Result) -> int | list[int]:
    return result.size[0] if result.size[0] == result.size[1] else list(result.size)


def _flow(value: Any) -> str:
    """Dump as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True)
    return text.strip().removesuffix("...").strip()


def _command(probed: ProbeResults, best: Result) -> str:
    """Command `fgvc train` with this net, size and crop, as far as they are not the recipe's already."""
    model, data = best.candidate.model, probed.data
    assert model is not None
    if data.path is None:
        available = recipes()
        recipe = next(name for name in RECIPES if name in available)
        settings = {"data.kind": kind_at(Path(data.source)), "data.root": data.source}
    else:
        recipe, settings = data.source, {}
    now, overridden = data.recipe, {text.partition("=")[0] for text in data.overrides}
    wanted: dict[str, Any] = {
        **_net(model), "model.weights": model.weights,
        "image.size": _size_setting(best), "deploy.crop_pct": best.crop,
    }  # fmt: skip
    has = {
        **_net(now.model), "model.weights": now.model.weights,
        "image.size": now.image.size[0] if now.image.size[0] == now.image.size[1] else list(now.image.size),
        "deploy.crop_pct": now.deploy.crop_pct,
    }  # fmt: skip
    if data.path is None:
        has = {"model.kwargs": {}}
    if best.crop == best.candidate.spec.crop_pct:  # what the weights ask for anyway
        del wanted["deploy.crop_pct"]
    same_model = all(getattr(model, key) == getattr(now.model, key) for key in ("backbone", "onnx", "kwargs", "weights"))
    for key in ("mean", "std"):  # other nets were fed as their weights ask
        if getattr(now.deploy, key) is not None and not same_model:
            wanted[f"deploy.{key}"] = None
    settings |= {key: value for key, value in wanted.items() if has.get(key, ...) != value or key in overridden}
    other_overrides = [text for text in data.overrides if text.partition("=")[0] not in settings]
    texts = [*other_overrides, *(f"{key}={value if isinstance(value, str) else _flow(value)}" for key, value in settings.items())]
    return " ".join(["fgvc train", shlex.quote(recipe), *map(shlex.quote, texts)])


def _net(model: Model) -> dict[str, Any]:
    """Settings of the net, as on the command line."""
    if model.onnx is not None:
        return {"model.backbone": None, "model.onnx": str(model.onnx), "model.kwargs": {}}
    return {"model.backbone": model.backbone, "model.kwargs": dict(model.kwargs)}


def summary(probed: ProbeResults) -> dict[str, Any]:
    """Results and advice as JSON."""
    advice, data = advise(probed), probed.data
    return {
        "data": data.source,
        "recognised": data.index.recognised,
        "images": len(data.rows),
        "available": data.available,
        "classes": len(data.index.classes),
        "classes_too_small": data.scarce,
        "groups": None if data.groups is None else len(set(data.groups.tolist())),
        "folds": FOLDS,
        "device": probed.device,
        "threads": probed.threads,
        "results": [_row(result) for result in probed.results],
        "best": probed.results.index(advice.best),
        "limits": [
            {"what": limit.what, "limiting": limit.limiting, "text": limit.text, "gain": _share(limit.gain)}
            for limit in advice.limits
        ],
        "command": advice.command or None,
        "teacher": advice.teacher_line or None,
        "notes": list(probed.notes),
    }  # fmt: skip


def _row(result: Result) -> dict[str, Any]:
    model = result.candidate.model
    return {
        "start": result.candidate.name,
        "backbone": None if model is None else model.backbone,
        "onnx": None if model is None or model.onnx is None else str(model.onnx),
        "kwargs": None if model is None else dict(model.kwargs),
        "weights": None if model is None else model.weights,
        "size": list(result.size),
        "crop": result.crop,
        "top1": {f"{share:g}": _share(result.curve.accuracy(share)) for share in sorted(SHARES)},
        "seconds_per_image": result.seconds,
        "macs": result.macs,
        "parameters": result.candidate.parameters,
        "strength": result.curve.strength,
        "trained_on": result.trained_images,
    }


def _share(share: Share | None) -> dict[str, float] | None:
    return None if share is None else {"value": share.value, "low": share.low, "high": share.high}
