"""Adding branches to the selected convolutions of a backbone, and notes on those left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

from fgvc.errors import FgvcError
from fgvc.reparam.block import Branched, refusal
from fgvc.reparam.replace import is_replaced
from fgvc.techniques.plan import Plan
from fgvc.techniques.settings import ConvSelection

SHOWN = 4  # names listed of the convolutions left alone for one reason


def add_branches(
    plan: Plan, where: ConvSelection, make: Callable[[nn.Conv2d, nn.Module | None], Branched], *, smallest: int = 3
) -> None:
    """Replace every selected convolution that can be folded back by the block that `make` returns, and note all others.

    `make` takes the convolution and the batch norm behind it. `smallest`: the least side of a kernel. Raises FgvcError
    where a pattern fits no convolution, nothing can be replaced, or another technique has replaced one already.
    """
    names = [site.name for site in plan.sites] + list(plan.refused)
    selected = _select(plan.kind, where, names)
    unchanged = {name: reason for name, reason in plan.refused.items() if name in selected}
    unchanged |= dict.fromkeys((name for name in names if name not in selected), "not selected by include and exclude")
    _refuse_replaced(plan, selected)
    sites_by_branches: dict[str, list[str]] = {}
    for site in plan.sites:
        if site.name not in selected:
            continue
        conv = plan.module(site.name)
        if reason := refusal(conv, smallest):  # type: ignore[arg-type]
            unchanged[site.name] = reason
            continue
        block = make(conv, plan.module(site.norm) if site.norm else None)  # type: ignore[arg-type]
        plan.replace(site, block)
        sites_by_branches.setdefault(", ".join(block.branches), []).append(site.name)
    if not sites_by_branches:
        raise FgvcError(
            f"techniques.{plan.kind}: no convolution of this backbone can take its branches "
            f"({'; '.join(_grouped(unchanged)) or 'it has none'}); remove techniques.{plan.kind} or choose another backbone"
        )
    for branches, sites in sites_by_branches.items():
        plan.note(f"{len(sites)} of {len(names)} convolutions grew branches: {branches}")
    for line in _grouped(unchanged):
        plan.note(f"left alone: {line}")


def _select(kind: str, where: ConvSelection, names: list[str]) -> set[str]:
    for key, patterns in (("include", where.include), ("exclude", where.exclude)):
        for pattern in patterns:
            if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names):
                raise FgvcError(
                    f"techniques.{kind}.{key}: {pattern!r} fits none of the backbone's {len(names)} convolutions, "
                    f"such as {', '.join(names[:SHOWN])}"
                )
    included = {name for name in names if _fits(name, where.include)}
    return {name for name in included if not _fits(name, where.exclude)}


def _refuse_replaced(plan: Plan, selected: set[str]) -> None:
    replaced = [site.name for site in plan.sites if site.name in selected and is_replaced(plan.module(site.name))]
    if replaced:
        raise FgvcError(
            f"techniques.{plan.kind}: {len(replaced)} of its convolutions were replaced by another technique already: "
            f"{_listed(replaced)}; keep the two apart with include and exclude, or remove one"
        )


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _grouped(unchanged: dict[str, str]) -> list[str]:
    """Group the reasons: one line for each, with its first few names."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in unchanged.items():
        by_reason.setdefault(reason, []).append(name)
    return [f"{len(names)} ({reason}): {_listed(names)}" for reason, names in by_reason.items()]


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
