"""Grad-CAM by `fgvc explain` against pytorch-grad-cam's own batch use: `python benchmarks/explain_speed.py RUN IMAGES`.

IMAGES is a folder; 100 of its pictures are taken, evenly spread. `maps`: prepared batches to maps. `files`: pictures to files,
on both sides decoding, preprocessing, maps and an overlay; fgvc writes the panel and the numbers, too.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
from torch import nn

from fgvc.images.decode import decode
from fgvc.images.preprocess import fit, normalise
from fgvc.report.explain import open_explainer
from fgvc.runs.loaded import load_run
from fgvc.runtime.explain import explain_files
from fgvc.runtime.predict import expand
from fgvc.studies.speed import interleaved

BATCH, COUNT, PAIRS = 16, 100, 12


def main(run: Path, folder: Path) -> None:
    files = list(expand([folder]))
    files = [files[at] for at in np.linspace(0, len(files) - 1, COUNT).astype(int)]
    with (
        open_explainer(load_run(run), ("gradcam",)) as explainer,
        tempfile.TemporaryDirectory() as tmp,
    ):
        spec, net = explainer.spec, copy.deepcopy(explainer.class_maps.net)
        for parameter in net.parameters():
            parameter.requires_grad_(True)  # as whoever uses the library has them
        last = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)][-1]
        crops = [fit(decode(path), spec) for path in files]
        x = torch.from_numpy(np.stack([normalise(crop, spec) for crop in crops]))
        batches = [part.to(memory_format=explainer.layout) for part in x.split(BATCH)]

        def ours() -> None:
            for part in (same.view_as(same) for same in batches):  # other tensors: nothing is remembered of these
                explainer.class_maps(part, explainer.class_maps.logits(part).argmax(1), "gradcam")

        def theirs() -> None:
            for part in batches:
                cam(part, None)

        def ours_to_files() -> None:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                explain_files([explainer], files, Path(tmp) / "ours", target="predicted", batch=BATCH)

        def theirs_to_files() -> None:
            (Path(tmp) / "theirs").mkdir(exist_ok=True)
            for start in range(0, COUNT, BATCH):
                some = [fit(decode(path), spec) for path in files[start : start + BATCH]]
                part = torch.from_numpy(np.stack([normalise(crop, spec) for crop in some]))
                for at, (crop, found) in enumerate(
                    zip(some, cam(part.to(memory_format=explainer.layout), None), strict=True)
                ):
                    drawn = show_cam_on_image(np.float32(crop) / 255, found, use_rgb=True)
                    Image.fromarray(drawn).save(Path(tmp) / "theirs" / f"{start + at}.png")

        def apart() -> float:
            """The largest difference of the two maps of any pixel of the first batch: it must be the same that is timed."""
            found = explainer.class_maps(batches[0], net(batches[0]).argmax(1), "gradcam")[0].numpy()
            return float(np.abs(found - cam(batches[0], None)).max())

        for name, a, b in (("maps", ours, theirs), ("files", ours_to_files, theirs_to_files)):
            with GradCAM(net, [last]) as cam:
                found = interleaved(f"{name}: fgvc / pytorch-grad-cam", a, b, pairs=PAIRS, warm_up=1)
                print(
                    f"{found.name}, {COUNT} images, batch {BATCH}, {torch.get_num_threads()} threads: {found.median:.3f} "
                    f"({found.low:.3f}-{found.high:.3f}, {found.pairs} pairs; {found.a_seconds:.2f} / {found.b_seconds:.2f} s); "
                    f"maps apart by {apart():.1e}"
                )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
