"""The sheet of overlays in the README: `python docs/overlay_sheet.py RUN IMAGES OUT.jpg`; IMAGES has a folder for each class.

Of every class the pictures in the middle of each third: as the network sees them, with what they are, and Grad-CAM of what they
are taken for.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from fgvc.images.decode import decode
from fgvc.images.lettering import writable
from fgvc.images.overlay import overlay
from fgvc.images.preprocess import fit, normalise
from fgvc.images.sheet import Cell, save_sheet
from fgvc.report.explain import open_explainer
from fgvc.runs.loaded import load_run

EACH = 3  # pictures of a class


def main(run: Path, folder: Path, out: Path) -> None:
    rows = []
    with open_explainer(load_run(run), ("gradcam",)) as explainer:
        names, font = writable(explainer.labels)
        for name, kind in zip(names, explainer.labels, strict=True):
            files = sorted(path for path in (folder / kind).iterdir() if path.is_file())
            row = []
            for third in range(EACH):
                crop = fit(decode(files[len(files) * (2 * third + 1) // (2 * EACH)]), explainer.spec)
                (seen,) = explainer(normalise(crop, explainer.spec)[None], None)
                taken = f"taken for {names[seen.label]} {100 * seen.p[seen.label]:.0f} %"
                row.append(Cell(Image.fromarray(crop), name))
                row.append(Cell(overlay(Image.fromarray(crop), seen.maps["gradcam"]), taken))
            rows.append(row)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_sheet(rows, out, font=font)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
