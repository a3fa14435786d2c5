"""How are kernels that a batch norm was folded into best trained: raw, by a scale of unit spread, by the scale of the net that
the file was made of, or with norms that are put back?

    python benchmarks/folded_kernels.py docs/results/folded-kernels.csv FILE.onnx CUB50 NET.safetensors [--epochs 3] [--folds 1]

Each arm is a run of the base recipe from the file, on one half of the train split, and is scored on the other. The head is fitted
anew on the half (`model.head: probe`): the file's own was fitted on the whole train split, and is right there from the start.
NET.safetensors are the weights of timm's net, norms included. Rows come as they are done; those that are there are kept.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fgvc import api
from fgvc.config.shipped import recipe_file
from fgvc.reparam.unfold import ScaledConv2d
from fgvc.runs import build, checkpoint
from fgvc.runs.folder import read_run
from fgvc.runs.images import read_index
from fgvc.training import images, start, trainer

HALVES = 2
KERNELS = ("raw", "unit spread", "restore", "twin")
OPTIMIZERS = {
    "adamw 3e-4": [],
    "sgd 0.01": ["optim.name=sgd", "optim.lr=0.01", "optim.momentum=0.9", "optim.weight_decay=1e-4", "optim.warmup_epochs=0.5"],
}
RECIPE = [
    "model.head=probe", "deploy.seen=none", "deploy.resize=crop", "deploy.crop_pct=0.875", "deploy.interpolation=bicubic",
    "deploy.mean=[0.5,0.5,0.5]", "deploy.std=[0.5,0.5,0.5]", "augment.crop_scale=[0.35,1.0]", "augment.flip=0.5", "ema=null",
    "train.workers=0", "train.device=cpu", "select=last", "cache=disk",
]  # fmt: skip
FIELDS = ("optimizer", "kernel", "fold", "learned", "held_out", "floor", "epochs", "losses", "end", "seconds", "right")


def twin_scales(weights: Path) -> list[Tensor]:
    """gamma / sigma of each norm of tf_efficientnet_lite0, in order."""
    net = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    net.load_state_dict(load_file(weights))
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    return [(norm.weight.detach() / (norm.running_var + norm.eps).sqrt()).abs() for norm in norms]  # type: ignore[operator]


def rescale(scales: list[Tensor]) -> Callable[[nn.Module, Iterable[Tensor], object], None]:
    def fit(net: nn.Module, _batches: Iterable[Tensor], _known: object) -> None:
        convolutions = [module for module in net.modules() if isinstance(module, ScaledConv2d)]
        for convolution, scale in zip(convolutions, scales, strict=True):
            convolution.rescale(scale)

    return fit


def arm(given: argparse.Namespace, optimizer: str, kernel: str, fold: int) -> dict[str, object]:
    with TemporaryDirectory() as scratch:
        labels = Path(scratch) / "labels.txt"
        labels.write_text("\n".join(line.split()[1] for line in (given.data / "classes.txt").read_text().splitlines()))
        overrides = [
            *RECIPE, *OPTIMIZERS[optimizer], f"model.onnx={given.file}", f"data.root={given.data}", f"deploy.labels={labels}",
            f"data.fold=[{fold},{HALVES}]", f"train.epochs={given.epochs}",
            f"model.batch_norm={'restore' if kernel == 'restore' else 'frozen'}", *given.overrides,
        ]  # fmt: skip
        # Of the train split alone: the fold holds out, and no test picture chooses.
        own_split = patch.object(images, "judged_apart", lambda index, *_, **__: index)
        ways = {
            "raw": patch.object(build, "_unfold", lambda net, model: None),
            "twin": patch.object(start, "fit", rescale(twin_scales(given.weights))),
        }
        began = time.perf_counter()
        with own_split, ways.get(kernel, nullcontext()):
            run = trainer.train(api.load_recipe(recipe_file("any/plain"), overrides), Path(scratch) / "run")
        state = checkpoint.load(run / "ckpt")
        rows, predicted = state.rest["answers"].numpy()
        index = read_index(read_run(run))
        right = index.labels[rows] == predicted
        history = state.progress.history
        floor = checkpoint.load(run / "ckpt", "start").rest["floor"]
        return {
            "optimizer": optimizer, "kernel": kernel, "fold": fold, "learned": len(index.rows("train")), "held_out": len(rows),
            "floor": f"{100 * floor['top1']:.2f}", "epochs": " ".join(f"{100 * row['val_top1']:.2f}" for row in history),
            "losses": " ".join(f"{row['base']:.3f}" for row in history), "end": f"{100 * right.mean():.2f}",
            "seconds": round(time.perf_counter() - began), "right": "".join(str(int(one)) for one in right),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--folds", type=int, default=1)
    parser.add_argument("--optimizers", nargs="*", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--overrides", nargs="*", default=[])
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.out.exists():
        given.out.write_text(",".join(FIELDS) + "\n")
    with given.out.open(newline="") as stream:
        rows = csv.DictReader(line for line in stream if not line.startswith("#"))
        done = {(row["optimizer"], row["kernel"], row["fold"]) for row in rows}
    for fold in range(given.folds):
        for optimizer in given.optimizers:
            for kernel in KERNELS:
                if (optimizer, kernel, str(fold)) not in done:
                    row = arm(given, optimizer, kernel, fold)
                    with given.out.open("a", newline="") as stream:
                        csv.DictWriter(stream, FIELDS, lineterminator="\n").writerow(row)
                    print({key: value for key, value in row.items() if key != "right"}, flush=True)


if __name__ == "__main__":
    main()
