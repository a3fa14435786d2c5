"""Charts of runs and scores, left unpainted: painting takes as long as the steps of a tiny run."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import ModuleType

from PIL import Image


def unpainted() -> list[tuple[ModuleType, str, Callable[..., object]]]:
    """Modules, names in them, and functions in place of these that give a picture of one pixel."""
    from fgvc.evaluation import evaluate
    from fgvc.training import trainer

    stream = io.BytesIO()
    Image.new("RGB", (1, 1)).save(stream, "png")
    blank = stream.getvalue()

    def calibration(calibrated: object, *, split: str) -> dict[str, bytes]:
        return {f"{name}-{split}.png": blank for name in ("reliability", "risk-coverage")}

    charts = [(trainer, "plot_curves"), (trainer, "plot_confusion"), (evaluate, "plot_confusion")]
    return [*((module, name, lambda *_, **__: blank) for module, name in charts), (evaluate, "plot_calibration", calibration)]
