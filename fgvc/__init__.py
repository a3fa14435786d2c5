"""fgvc: raise the accuracy of the classifier you already deploy without changing a node of its graph.

The functions of `fgvc.api` are offered here, imported on first use: `import fgvc` itself stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fgvc.api import check, evaluate, export, forecast, load_recipe, train, verify
    from fgvc.export.bundle import load_bundle
    from fgvc.serve.engine import Engine

__all__ = ["Engine", "check", "evaluate", "export", "forecast", "load_bundle", "load_recipe", "train", "verify"]

# What runs in production comes from torch-free modules.
_LIGHT = {"Engine": "fgvc.serve.engine", "load_bundle": "fgvc.export.bundle"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fgvc' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LIGHT.get(name, "fgvc.api")), name)
