"""Advice after `fgvc probe`: what limits the best net that costs no more than the deployed one, how to train from it, and
which larger net could teach it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from fgvc.config.template import recipes
from fgvc.evaluation.learning_curve import FOLDS, SHARES, Share
from fgvc.studies.probe import ProbeResults, Result, Size

RECIPES = ("any/good", "any/plain", "cub50/plain")  # for a folder or a table: the first that there is
CEILING = 0.99
SAME_MACS, SAME_SECONDS = 1.05, 1.25  # times the deployed net's cost that are no more than it, by what is known of all


@dataclass(frozen=True, slots=True)
class Limitation:
    """Whether something holds the accuracy down."""

    what: str  # images, resolution, start or ceiling
    limiting: bool | None  # None: not tried
    text: str
    gain: Share | None = None


@dataclass(frozen=True, slots=True)
class Advice:
    """What is made of a probing."""

    best: Result  # the most accurate that costs no more than the deployed net
    limits: tuple[Limitation, ...]
    command: str  # trains from it, or from the best of these that is no bundle; empty where all are
    larger: bool  # whether a net that costs more was tried
    teacher: Result | None  # the most accurate that costs more, and names more images rightly
    teacher_gain: Share | None

    @property
    def teacher_line(self) -> str:
        """For the recipe's techniques section; empty without a teacher."""
        if self.teacher is None or (model := self.teacher.candidate.model) is None:
            return ""
        wanted: dict[str, Any] = {
            "kind": "probe",
            "backbone": model.backbone,
            "weights": model.weights,
            "size": _written(self.teacher),
        }
        if model.kwargs:
            wanted["kwargs"] = dict(model.kwargs)
        return f"distill.teachers: [{_flow(wanted)}]"


def advise(found: ProbeResults) -> Advice:
    """By results of nets that were not trained on the images, where there are such."""
    honest = [one for one in found.results if not one.learned] or list(found.results)
    affordable = [one for one in honest if _affordable(one, found)] or honest
    best = max(affordable, key=_accuracy)
    trained = max((one for one in affordable if one.candidate.model is not None), key=_accuracy, default=None)
    larger = [one for one in honest if not _affordable(one, found) and one.candidate.model is not None]
    teacher = max(larger, key=_accuracy, default=None)
    if teacher is not None and teacher.accuracy <= best.accuracy:
        teacher = None
    return Advice(
        best=best,
        limits=(_images(best), _resolution(best, honest), _start(best, honest), *_ceiling(best)),
        command="" if trained is None else _command(found, trained),
        larger=len(larger) > 0,
        teacher=teacher,
        teacher_gain=None if teacher is None else teacher.curve.gain(best.curve),
    )


def _accuracy(one: Result) -> float:
    return one.accuracy


def cost_ratio(one: Result, other: Result) -> float:
    """How many times the other's cost, in multiply-adds where both are known, else in measured seconds."""
    if one.macs is not None and other.macs is not None:
        return one.macs / other.macs
    return one.seconds / other.seconds


def _affordable(one: Result, found: ProbeResults) -> bool:
    """Whether it costs no more than the deployed net at the size that it is deployed at."""
    own = [result for result in found.results if result.candidate is found.first]
    first = min(own, key=lambda result: (result.size != found.first.spec.size, math.prod(result.size)))
    counted = one.macs is not None and first.macs is not None
    return cost_ratio(one, first) <= (SAME_MACS if counted else SAME_SECONDS)


def _images(best: Result) -> Limitation:
    gain = best.curve.gain(share=0.5)
    rising = gain.low > 0
    said = "the curve still rises: more images will help" if rising else "within chance"
    return Limitation("images", rising, f"all of them instead of a half give {points(gain)}; {said}", gain)


def _resolution(best: Result, results: Iterable[Result]) -> Limitation:
    own = [one for one in results if one.candidate is best.candidate and math.prod(one.size) > math.prod(best.size)]
    if not own:
        height, width = best.size
        more = 32 * math.ceil(1.3 * height / 32), 32 * math.ceil(1.3 * width / 32)
        text = f"not tried; give a larger size, such as --size {sides(best.size)} --size {sides(more)}"
        return Limitation("resolution", None, text)
    larger = max(own, key=_accuracy)
    gain = larger.curve.gain(best.curve)
    costs = f"{sides(larger.size)} instead of {sides(best.size)} px, {cost_ratio(larger, best):.1f} x the cost"
    return Limitation("resolution", gain.low > 0, f"{costs}: {points(gain)}", gain)


def _start(best: Result, results: Iterable[Result]) -> Limitation:
    others = [one for one in results if one.candidate is not best.candidate]
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
    wrong, count = int((~best.curve.right[0] & best.curve.judged).sum()), int(best.curve.judged.sum())
    text = f"{wrong} of {count} are named wrongly: nothing is left to gain"
    if wrong:
        text = f"{wrong} of {count} are named wrongly: look at these labels first (fgvc data check --suspects)"
    return [Limitation("ceiling", True, text)]


def points(gain: Share) -> str:
    return f"{100 * gain.value:+.1f} points (95 %: {100 * gain.low:+.1f} to {100 * gain.high:+.1f})"


def sides(size: Size) -> str:
    """160, or 112x224 (height and width): as `--size` reads it."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"


def _written(result: Result) -> int | list[int]:
    return result.size[0] if result.size[0] == result.size[1] else list(result.size)


def _flow(value: Any) -> str:
    """YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True)
    return text.strip().removesuffix("...").strip()


def _command(found: ProbeResults, best: Result) -> str:
    """`fgvc train` with this net, size and crop; as far as they are not the recipe's already."""
    model, data = best.candidate.model, found.data
    assert model is not None
    if data.path is None:
        known = recipes()
        recipe = next(name for name in RECIPES if name in known)
        settings = {"data.kind": "auto", "data.root": data.given}
    else:
        recipe, settings = data.given, {}
    own, given = data.recipe, {text.partition("=")[0] for text in data.overrides}
    wanted: dict[str, Any] = {
        "model.backbone": model.backbone, "model.kwargs": dict(model.kwargs), "model.weights": model.weights,
        "image.size": _written(best), "deploy.crop_pct": best.crop,
    }  # fmt: skip
    has = {
        "model.backbone": own.model.backbone, "model.kwargs": dict(own.model.kwargs), "model.weights": own.model.weights,
        "image.size": own.image.size[0] if own.image.size[0] == own.image.size[1] else list(own.image.size),
        "deploy.crop_pct": own.deploy.crop_pct,
    }  # fmt: skip
    if data.path is None:
        has = {"model.kwargs": {}}
    if best.crop == best.candidate.spec.crop_pct:  # what the weights ask for anyway
        del wanted["deploy.crop_pct"]
    recipes_own = all(getattr(model, key) == getattr(own.model, key) for key in ("backbone", "kwargs", "weights"))
    for key in ("mean", "std"):  # other nets were fed as their weights ask
        if getattr(own.deploy, key) is not None and not recipes_own:
            wanted[f"deploy.{key}"] = None
    settings |= {key: value for key, value in wanted.items() if has.get(key, ...) != value or key in given}
    kept = [text for text in data.overrides if text.partition("=")[0] not in settings]
    texts = [*kept, *(f"{key}={value if isinstance(value, str) else _flow(value)}" for key, value in settings.items())]
    return " ".join(["fgvc train", shlex.quote(recipe), *map(shlex.quote, texts)])


def summary(found: ProbeResults) -> dict[str, Any]:
    """All of it, for JSON."""
    advice, data = advise(found), found.data
    return {
        "data": data.given,
        "recognised": data.index.recognised,
        "images": len(data.rows),
        "available": data.available,
        "classes": len(data.index.classes),
        "classes_too_small": data.scarce,
        "groups": None if data.groups is None else len(set(data.groups.tolist())),
        "folds": FOLDS,
        "device": found.device,
        "threads": found.threads,
        "results": [_row(one) for one in found.results],
        "best": found.results.index(advice.best),
        "limits": [
            {"what": one.what, "limiting": one.limiting, "text": one.text, "gain": _share(one.gain)} for one in advice.limits
        ],
        "command": advice.command or None,
        "teacher": advice.teacher_line or None,
        "notes": list(found.notes),
    }  # fmt: skip


def _row(one: Result) -> dict[str, Any]:
    model = one.candidate.model
    return {
        "start": one.candidate.name,
        "backbone": None if model is None else model.backbone,
        "kwargs": None if model is None else dict(model.kwargs),
        "weights": None if model is None else model.weights,
        "size": list(one.size),
        "crop": one.crop,
        "top1": {f"{share:g}": _share(one.curve.accuracy(share)) for share in sorted(SHARES)},
        "seconds_per_image": one.seconds,
        "macs": one.macs,
        "parameters": one.candidate.parameters,
        "strength": one.curve.strength,
        "trained_on": one.learned,
    }


def _share(share: Share | None) -> dict[str, float] | None:
    return None if share is None else {"value": share.value, "low": share.low, "high": share.high}
