"""Which technique applies to which backbone, and whether the plain net's ONNX runs: tried, not promised.

    python benchmarks/architectures.py [BACKBONE...]      # fills docs/results/architectures.csv, then docs/tables.py

For every backbone and technique (its defaults): the net is built as `fgvc train` builds it, makes one step, forward and
backward, on random images, and is stripped. The row `ONNX` is the plain net, exported with the defaults and run by
onnxruntime against torch.
Only what the CSV lacks is tried, so a run that was stopped goes on and a new technique costs one row for each backbone;
delete rows to try them again. Exits with 1 where something failed that is no refusal.
"""

from __future__ import annotations

import argparse
import copy
import csv
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fgvc.config.exporting import Export
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.config.techniques import settings_by_kind
from fgvc.errors import FgvcError
from fgvc.exporting.onnx import export_onnx, serialised
from fgvc.exporting.reference import randomise, versions
from fgvc.models.backbone import deployed, plain_model
from fgvc.reparam.plain import strip
from fgvc.runs.build import BuiltNet, build_net
from fgvc.runtime.engine import OnnxSession
from fgvc.techniques.api import Batch

OUT = Path(__file__).parents[1] / "docs" / "results" / "architectures.csv"
ONNX = "ONNX"
COLUMNS = ("backbone", "family", "pixels", "technique", "result", "detail", "torch", "timm", "onnxruntime")
CLASSES, IMAGES = 10, 4
TOLERANCE = 1e-4  # of onnxruntime against torch, relative to the largest logit: random weights make logits of up to 1e7

# timm's name -> family, kwargs
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet18": ("ResNet", {}),
    "resnet50": ("ResNet-B", {}),
    "resnet50c": ("ResNet-C", {}),
    "resnet18d": ("ResNet-D", {}),
    "resnet50d": ("ResNet-D", {}),
    "resnet26t": ("ResNet-T", {}),
    "legacy_seresnet18": ("SENet", {}),
    "seresnet50": ("SENet", {}),
    "skresnet18": ("SKNet", {}),
    "densenet121": ("DenseNet", {}),
    "efficientnet_b0": ("EfficientNet", {}),
    "tf_efficientnet_b0": ("EfficientNet", {}),
    "tf_efficientnet_lite0": ("EfficientNet-Lite", {}),
    "mobilenetv2_100": ("MobileNet v2", {}),
    "mobilenetv3_small_100": ("MobileNet v3", {}),
    "darknet53": ("DarkNet", {}),
    "cspdarknet53": ("CSPDarkNet", {}),
    "regnety_002": ("RegNet", {}),
    "convnext_atto": ("ConvNeXt", {}),
    "repvgg_a0": ("RepVGG", {}),
    "mobileone_s0": ("MobileOne", {}),
    "fastvit_t8": ("FastViT", {}),
    "repvit_m1": ("RepViT", {}),
    "vit_tiny_patch16_224": ("ViT", {"img_size": 64}),
    "deit_tiny_patch16_224": ("DeiT", {"img_size": 64}),
    "swin_tiny_patch4_window7_224": ("Swin", {"img_size": 64}),
    "resnet18_deform": ("deformable ResNet", {}),
}
SIZE = 64


def recipe(backbone: str, kwargs: Mapping[str, Any], *techniques: str) -> Recipe:
    """Long enough for rounds, and with a moving average for the techniques that ask for one. Its data is never read."""
    tree = {
        "data": {"kind": "folder", "root": "."},
        "image": {"size": SIZE},
        "model": {"backbone": backbone, "kwargs": dict(kwargs)},
        "train": {"epochs": 12, "batch_size": IMAGES, "workers": 0, "device": "cpu"},
        "ema": {"decay": 0.9},
        "techniques": {kind: {} for kind in techniques},
    }
    return validate(Recipe, tree, where="architectures")


def step_of(built: BuiltNet) -> dict[str, torch.Tensor]:
    """The losses of one training step on random images, after its backward; at half of the run, so that schedules have begun.
    Raises FgvcError where anything is not finite."""
    step = built.step
    step.set_average(copy.deepcopy(step.net))
    step.attach_hooks()
    step.train()
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(IMAGES, 3, SIZE, SIZE, generator=rng)
    y = torch.randint(0, CLASSES, (IMAGES,), generator=rng)
    geometry = torch.eye(2, 3).repeat(IMAGES, 1, 1)
    larger = round(SIZE * step.attachments.render)
    render = torch.randn(IMAGES, 3, larger, larger, generator=rng) if larger > SIZE else None
    boxes = torch.tensor([8.0, 8.0, 48.0, 48.0]).repeat(IMAGES, 1)  # what box_head learns
    batch = Batch(x, [(y, None)], x, y, torch.arange(IMAGES), geometry, render, boxes)
    losses, _ = step(batch, step.draw(batch, 0.5, seed=0, step=0))
    losses["loss"].backward()
    for kind, after in step.hooks("after_step"):
        after(step.contexts[kind])
    for handle in step._handles:  # a net that is looked at once: nothing of it goes on
        handle.remove()
    wild = [name for name, value in losses.items() if not value.isfinite().all()]
    wild += [name for name, p in step.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if wild:
        raise FgvcError(f"not finite: {', '.join(wild[:3])}")
    return {name: value.detach() for name, value in losses.items()}


def onnx_of(backbone: str, kwargs: Mapping[str, Any]) -> tuple[float, int]:
    """The plain net by the default exporter: the worst difference between onnxruntime and torch, relative to the largest
    logit, and the number of its nodes."""
    net = plain_model(backbone, CLASSES, kwargs)
    randomise(net, 1)
    shipped, settings = deployed(net), Export()
    proto = export_onnx(shipped, size=(SIZE, SIZE), exporter=settings.exporter, opset=settings.opset)
    x = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = shipped(x)
    said = torch.from_numpy(OnnxSession(serialised(proto)).logits(x.numpy()))
    return float((said - z).abs().max() / z.abs().max()), len(proto.graph.node)


def tried(backbone: str, technique: str) -> tuple[str, str]:
    """Result (yes, no, or failed) and what there is to say."""
    _, kwargs = BACKBONES[backbone]
    torch.manual_seed(0)
    try:
        if technique == ONNX:
            apart, nodes = onnx_of(backbone, kwargs)
            return "yes" if apart <= TOLERANCE else "failed", f"{apart:.0e}; {nodes} nodes"
        built = build_net(recipe(backbone, kwargs, technique), CLASSES)
        step_of(built)
        strip(built.step.net.eval(), backbone=backbone, num_classes=CLASSES, kwargs=kwargs)
    except FgvcError as error:
        refused = technique == ONNX or f"techniques.{technique}" in str(error)
        return "no" if refused else "failed", brief(str(error), technique)
    except Exception as error:  # a defect: it is written down and the script goes on
        return "failed", f"{type(error).__name__}: {brief(str(error), technique)}"
    return "yes", brief(next(iter(built.step.attachments.notes), ""), technique)


def brief(message: str, technique: str) -> str:
    """A refusal without its address and its advice, on one line."""
    line = " ".join(message.split())
    line = re.sub(rf"^(.*?techniques\.)?{technique}(\.\w+)*: |; remove techniques\.{technique}.*", "", line)
    return re.sub(r"\b([Aa]|[Tt]his) [A-Z][a-z]+[A-Z]\w*", "this net", line)[:300]


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("backbones", nargs="*", help="default: all")
    chosen = arguments.parse_args().backbones or list(BACKBONES)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    if OUT.is_file():
        with OUT.open(newline="", encoding="utf-8") as file:
            rows = {(row["backbone"], row["technique"]): row for row in csv.DictReader(file)}
    about = {name: versions()[name] for name in ("torch", "timm", "onnxruntime")}
    for backbone in chosen:
        started, family = time.monotonic(), BACKBONES[backbone][0]
        for technique in (*settings_by_kind(), ONNX):
            if (backbone, technique) not in rows:
                result, detail = tried(backbone, technique)
                values = (backbone, family, str(SIZE), technique, result, detail, *about.values())
                rows[backbone, technique] = dict(zip(COLUMNS, values, strict=True))
        write(rows)
        print(f"{backbone}: {time.monotonic() - started:.0f} s", flush=True)
    failed = [row for row in rows.values() if row["result"] == "failed"]
    for row in failed:
        print(f"failed: {row['backbone']}, {row['technique']}: {row['detail']}", file=sys.stderr)
    return 1 if failed else 0


def write(rows: Mapping[tuple[str, str], dict[str, str]]) -> None:
    """In the order of the lists above; of what has left them nothing stays."""
    known = [(backbone, technique) for backbone in BACKBONES for technique in (ONNX, *settings_by_kind())]
    OUT.parent.mkdir(parents=True, exist_ok=True)
    with OUT.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in known if key in rows)


if __name__ == "__main__":
    sys.exit(main())
