"""Explanations of runs by any method of `fgvc.models.cam.offline` (`fgvc explain`); drawn by `fgvc.runtime.explain`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fgvc.config.calibration import Calibration
from fgvc.config.images import MAX_PIXELS, Preprocess
from fgvc.config.recipe import Selected
from fgvc.errors import FgvcError
from fgvc.evaluation.temperature import calibration_without_data
from fgvc.io.files import StrPath, as_paths
from fgvc.models.cam.offline import ClassMaps, class_maps_of, method_name
from fgvc.runs.loaded import LoadedRun, load_run
from fgvc.runtime import explain as drawing
from fgvc.runtime.bundle import load_bundle
from fgvc.runtime.engine import is_rejected, probabilities, refuse_no_numbers
from fgvc.runtime.explain import BundleExplainer, Explanation, Floats, is_bundle, load_explainer
from fgvc.runtime.predict import expand


@dataclass(frozen=True, slots=True)
class RunExplainer:
    """Explainer of a run's net; see `fgvc.runtime.explain.Explainer`."""

    folder: Path
    labels: tuple[str, ...]
    spec: Preprocess
    methods: tuple[str, ...]
    calibration: Calibration | None
    class_maps: ClassMaps
    device: torch.device
    layout: torch.memory_format

    def __call__(self, x: Floats, label: int | None) -> list[Explanation]:
        images = torch.from_numpy(x).to(self.device, memory_format=self.layout)
        logits = self.class_maps.logits(images).float().cpu().numpy()
        refuse_no_numbers(logits, self.folder)
        p = probabilities(logits, self.calibration, self.spec.ending)
        classes = p.argmax(1) if label is None else np.full(len(p), label)
        maps_by_method = {method: self.class_maps(images, torch.from_numpy(classes), method) for method in self.methods}
        return [
            Explanation(
                int(classes[at]), p[at],
                {method: maps[at].numpy() for method, (maps, _) in maps_by_method.items()},
                {method: raw[at].numpy() for method, (_, raw) in maps_by_method.items()},
                rejected=is_rejected(p[at], self.calibration),
            )
            for at in range(len(p))
        ]  # fmt: skip


def explain(
    run: StrPath,
    paths: StrPath | Sequence[StrPath],
    out: StrPath,
    *,
    methods: Sequence[str] = ("gradcam",),
    against: StrPath | None = None,
    target: str = drawing.PREDICTED,
    select: Selected | None = None,
    device: str | None = None,
    channels: int | None = None,
    batch: int = 16,
    overwrite: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> int:
    """Write overlays, panels and raw maps of pictures (files, or folders of them) by each method into `out`; see
    `fgvc.runtime.explain` for what is written. Returns 0, or 1 where a picture could not be read. The data that the run was
    trained on need not be there.

    `against`: a second run, or a bundle, side by side. `target`: a class by name instead of the predicted one. `channels`: so
    many of the most active, for methods that try them one by one; 0: all. `select`, `device`: as in `evaluate`. `overwrite`:
    what explain wrote into `out` before. `max_pixels`: of a picture that is read.
    Raises FgvcError, before anything is written, for a method, class or path that does not exist, and for a net that can't
    have such a map.
    """
    method_names = tuple(dict.fromkeys(method_name(method) for method in methods))
    files, out = list(expand(as_paths(paths))), Path(out)
    drawing.refuse_out(out, overwrite=overwrite)
    with ExitStack() as stack:
        explainers: list[RunExplainer | BundleExplainer] = []
        for path in as_paths([run] if against is None else [run, against]):
            if is_bundle(path):
                if method_names != ("cam",):
                    raise FgvcError(f"{path}: a bundle holds class activation maps alone; compare it by --method cam")
                explainers.append(load_explainer(load_bundle(path)))
            else:
                explainer = open_explainer(load_run(path, select), method_names, device=device, channels=channels)
                explainers.append(stack.enter_context(explainer))
        return drawing.explain_files(explainers, files, out, target=target, batch=batch, max_pixels=max_pixels)


@contextmanager
def open_explainer(
    run: LoadedRun, methods: tuple[str, ...], *, device: str | None = None, channels: int | None = None
) -> Iterator[RunExplainer]:
    """Open the explainer of a run on its device; stderr gets the cost of expensive methods first. Raises FgvcError where the net
    has no maps of these methods."""
    run_calibration = calibration_without_data(run, device=device)
    if not run_calibration.calibrated:
        print(f"{run.folder}: its probabilities are not calibrated: {run_calibration.reason}", file=sys.stderr)
    with run.on_device(device) as (place, layout), ExitStack() as stack:
        try:
            class_maps = stack.enter_context(class_maps_of(run.step.net, run.preprocess.size, methods, channels=channels))
        except FgvcError as error:
            raise FgvcError(f"{run.folder}: {error}") from error
        for method in methods:
            if (cost := class_maps.cost(method)) is not None:
                print(f"{run.folder}: {method}: {cost}", file=sys.stderr)
        yield RunExplainer(
            folder=run.folder, labels=run.classes, spec=run.preprocess, methods=methods,
            calibration=run_calibration.calibration, class_maps=class_maps, device=place, layout=layout,
        )  # fmt: skip

