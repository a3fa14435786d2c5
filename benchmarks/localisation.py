"""Where do runs look? One line a run from what `fgvc localize` wrote on validation, and one for each control.

    python benchmarks/localisation.py RUN... --out docs/results/old-base/cub50-localisation.csv

First, for each RUN: `fgvc localize RUN`.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

from fgvc.runs.folder import read_run

PACKAGES = ("fgvc", "torch", "torchvision", "timm")


def line(run: Path, key: str, of: str) -> dict[str, object]:
    """The scores of one kind of map in percent: of a run's true classes, or of the map in the middle."""
    entry = json.loads((run / "localisation.json").read_text(encoding="utf-8"))[key]
    boxes, parts, recipe = entry["boxes"][of], entry["parts"], read_run(run)
    shares = parts["map" if of == "true" else "centre"]
    environment = json.loads((run / "env.json").read_text(encoding="utf-8"))
    measured = {
        "top1": entry["top1"], "gt_known_loc": boxes["gt_known_loc"], "top1_loc": boxes["top1_loc"],
        "iou": boxes["iou"], "max_box_acc": boxes["max_box_acc"], "max_box_acc_v2": boxes["max_box_acc_v2"],
        "parts_in_10": shares[0], "parts_in_20": shares[1],
    }  # fmt: skip
    of_net = ("top1", "top1_loc")  # a map that knows no net has none
    facts = {"seed": recipe.train.seed, "epochs": recipe.train.epochs, "weights": key}
    facts |= {name: environment[name] for name in PACKAGES} | {"command": f"fgvc localize runs/{run.name}"}
    return {
        "map": run.name if of == "true" else "middle (control)",
        "images": boxes["images"],
        "parts": parts["visible"],
        **{name: "" if of != "true" and name in of_net else f"{100 * x:.1f}" for name, x in measured.items()},
        "tau": f"{boxes['tau']:.2f}",
        **(facts if of == "true" else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--key", default="val.last.gradcam", help="of localisation.json")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = [line(run, options.key, "true") for run in options.runs]
    rows.append(line(options.runs[0], options.key, "centre"))
    rows.append({"map": "chance (control)", "parts_in_10": "10.0", "parts_in_20": "20.0"})
    with options.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
