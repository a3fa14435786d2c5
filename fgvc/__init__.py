"""fgvc: raise the accuracy of the classifier you already deploy without changing a node of its graph.

In Python: `fgvc.train` gives a `fgvc.Run`, which evaluates, exports, explains; `fgvc.Bundle` predicts, and needs no torch. These
and the verbs of `fgvc.api` are imported when one of them is first asked for.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fgvc.api import Run as Run
    from fgvc.api import check as check
    from fgvc.api import compare as compare
    from fgvc.api import evaluate as evaluate
    from fgvc.api import explain as explain
    from fgvc.api import export as export
    from fgvc.api import forecast as forecast
    from fgvc.api import inspect as inspect
    from fgvc.api import interpolate as interpolate
    from fgvc.api import load_recipe as load_recipe
    from fgvc.api import localize as localize
    from fgvc.api import preview as preview
    from fgvc.api import probe as probe
    from fgvc.api import train as train
    from fgvc.api import verify as verify
    from fgvc.improvement.improve import improve as improve
    from fgvc.runtime.bundle import Bundle as Bundle
    from fgvc.runtime.bundle import load_bundle as load_bundle

__version__ = "0.1.0"

LIGHT = {"Bundle": "fgvc.runtime.bundle", "load_bundle": "fgvc.runtime.bundle"}  # without torch
NAMES = {
    **dict.fromkeys(
        (
            "Run", "check", "compare", "evaluate", "explain", "export", "forecast", "inspect", "interpolate", "load_recipe",
            "localize", "preview", "probe", "train", "verify",
        ),
        "fgvc.api",
    ),
    "improve": "fgvc.improvement.improve",
    **LIGHT,
}  # fmt: skip

# onnxruntime (1.29 and later) reports its use to its makers unless it is told not to before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    if name in NAMES:
        return getattr(import_module(NAMES[name]), name)
    raise AttributeError(f"module 'fgvc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *NAMES])
