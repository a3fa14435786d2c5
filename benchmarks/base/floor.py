"""The floor: logistic regression on the frozen net's features, learned from the whole train split and scored on test.

    python benchmarks/base/floor.py cub50/plain data.root=CUB50 model.weights=FILE data.val_fraction=0

Features are of images as evaluation sees them, and of two augmented views beside them with the second figure. Prints a CSV.
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version

import numpy as np
import torch

from fgvc import api
from fgvc.config.shipped import recipe_file
from fgvc.errors import FgvcError
from fgvc.evaluation.features import compute_features, load_frozen
from fgvc.models.probe import fit_probe
from fgvc.runs.images import read_index
from fgvc.training.start import view_features


def main(config: str, overrides: list[str]) -> None:
    recipe = api.load_recipe(recipe_file(config), overrides)
    if recipe.data.val_fraction:
        raise FgvcError("data.val_fraction: the floor of the whole train split; give data.val_fraction=0")
    index = read_index(recipe)
    backbone = load_frozen(recipe, len(index.classes))
    train, test = (compute_features(recipe, backbone, index, index.rows(split)) for split in ("train", "test"))
    spec, seed = backbone.spec, recipe.train.seed
    seen = view_features(backbone.net, spec, index, train.rows, recipe=recipe, device=torch.device("cpu"))
    print("views,images,strength,held-out loss,test images,test top-1 %,95 % interval half")
    for views in (1, 3):
        v, r = (train.vectors, train.rows) if views == 1 else (seen.vectors, seen.rows)
        probe = fit_probe(v, index.labels[r], classes=len(index.classes), groups=r, seed=seed)
        right = probe.logits(test.vectors).argmax(1) == index.labels[test.rows]
        half = 196 * right.std() / np.sqrt(len(right))
        top1 = 100 * right.mean()
        print(views, len(train.rows), probe.strength, f"{probe.loss:.4f},{len(right)},{top1:.2f},{half:.2f}", sep=",")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "scikit-learn"))
    print(f"# {recipe.model.backbone} {spec.size}, seed {seed}, {versions}, {platform.machine()}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
