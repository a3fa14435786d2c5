"""ACNet: Strengthening the Kernel Skeletons (Ding et al., ICCV 2019), grafted into any timm convolution it fits.

Every square k x k convolution gets a 1 x k and a k x 1 branch beside it, each with its own batch norm. After stripping
nothing is left: the branches are folded into the plain kernels, exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from pydantic import Field

from fgvc.config import Section
from fgvc.model.plan import Plan
from fgvc.reparam.acb import AcbBlock, refusal
from fgvc.types import FgvcError

SHOWN = 4  # names listed of those left alone for one reason


class AcbConfig(Section):
    """Asymmetric branches beside square convolutions; step 0 is the pretrained function."""

    kind: Literal["acb"] = "acb"
    include: tuple[str, ...] = Field(
        ("*",), description="which convolutions, by their name in the timm net; * and ? stand for anything"
    )
    exclude: tuple[str, ...] = Field((), description="which of those to leave alone, e.g. [conv_stem]")

    def build(self) -> Acb:
        return Acb(self)


class Acb:
    """Grafts an AcbBlock onto every convolution that `config` selects and that can be folded back."""

    source: ClassVar[str] = "ACNet, ICCV 2019"
    forwards: ClassVar[str] = "0"
    leaves: ClassVar[str] = "nothing: folded into the plain kernels"

    def __init__(self, config: AcbConfig) -> None:
        self.config = config

    def setup(self, plan: Plan) -> None:
        """Raises FgvcError where a pattern fits no convolution, or nothing can be grafted."""
        names = [site.name for site in plan.sites] + list(plan.refused)
        chosen = self._chosen(names)
        left = {name: reason for name, reason in plan.refused.items() if name in chosen}
        left |= dict.fromkeys((name for name in names if name not in chosen), "not selected by include and exclude")
        grafted = 0
        for site in plan.sites:
            if site.name not in chosen:
                continue
            conv = plan.module(site.name)
            if reason := refusal(conv):  # type: ignore[arg-type]
                left[site.name] = reason
                continue
            norm = plan.module(site.norm) if site.norm else None
            plan.graft(site, AcbBlock(conv, norm))  # type: ignore[arg-type]
            grafted += 1
        if not grafted:
            raise FgvcError(
                "techniques.acb: no convolution of this backbone can take asymmetric branches "
                f"({'; '.join(_grouped(left)) or 'it has none'}); remove techniques.acb or choose another backbone"
            )
        plan.note(f"{grafted} of {len(names)} convolutions grew a 1xk and a kx1 branch")
        for line in _grouped(left):
            plan.note(f"left alone: {line}")

    def _chosen(self, names: list[str]) -> set[str]:
        for key, patterns in (("include", self.config.include), ("exclude", self.config.exclude)):
            for pattern in patterns:
                if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names):
                    raise FgvcError(
                        f"techniques.acb.{key}: {pattern!r} fits none of the backbone's {len(names)} convolutions, "
                        f"such as {', '.join(names[:SHOWN])}"
                    )
        included = {name for name in names if _fits(name, self.config.include)}
        return {name for name in included if not _fits(name, self.config.exclude)}


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _grouped(left: dict[str, str]) -> list[str]:
    """One line a reason, with its first few names."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left.items():
        by_reason.setdefault(reason, []).append(name)
    return [
        f"{len(names)} ({reason}): {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        for reason, names in by_reason.items()
    ]
