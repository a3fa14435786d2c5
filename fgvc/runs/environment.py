"""Versions and machine of a run, for env.json and for every measured table."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

import torch

from fgvc import __version__
from fgvc.config.techniques import GROUP
from fgvc.runs.history import MACHINE

PACKAGES = ("torch", "torchvision", "timm", "albumentations", "numpy", "pillow", "onnx", "onnxruntime", "onnxscript")


def environment() -> dict[str, Any]:
    """Collect the versions of fgvc, of its packages and of those that bring techniques, and system, CPU and accelerator."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "fgvc": __version__,
        "python": platform.python_version(),
        **{name: installed_version(name) for name in PACKAGES},
        **technique_packages(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def technique_packages() -> dict[str, str]:
    """Versions of the installed packages that bring techniques, by their names."""
    return {point.dist.name: point.dist.version for point in entry_points(group=GROUP) if point.dist is not None}


def absent_packages(file: Path) -> list[str]:
    """Packages that brought techniques when this env.json was written and are not installed now, with their versions; none where
    it can't be read."""
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    others = {"fgvc", "python", "command", *PACKAGES, *MACHINE}
    return [f"{name} {number}" for name, number in recorded.items() if name not in others and installed_version(name) is None]


def installed_version(package: str) -> str | None:
    """Version of an installed package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
