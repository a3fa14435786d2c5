"""Does `fgvc preprocess` name the preprocessing that a file was fitted under, and wrong orders of its labels?

    python benchmarks/preprocess_found.py docs/results/preprocess-found.csv DEPLOYED CUB50 MOBILENET.safetensors [--limit 200]

DEPLOYED is a folder of files of other programs. Into each of the mobilenetv2_100 kind the weights of MOBILENET are laid (timm's
names), and a head of cub50's classes is fitted (`fgvc.models.probe`) on train images that are prepared as planted; the birds file
is taken as it is. Then the file alone is asked. Ten wrong orders of labels are stated of the birds file. Rows come as they are
made; those that are there are kept. `cpu_seconds` are of all threads, so that another program on the machine does not count.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from fgvc.config.data import AutoData
from fgvc.config.images import Preprocess
from fgvc.data.index import ImageIndex, decode_row
from fgvc.data.sources.read import read_source
from fgvc.evaluation.assignment import output_order
from fgvc.evaluation.file_preprocessing import FileSearch, search_file
from fgvc.evaluation.preprocessing import NORMALISATIONS, sample_rows
from fgvc.exporting.into import write_into
from fgvc.images.preprocess import described, differences, preprocess
from fgvc.models.lookup.twin import look_up
from fgvc.models.onnxnet.net import OnnxNet, open_onnx
from fgvc.models.probe import fit_probe

BIRDS = "birds-tf_efficientnet_lite0-torch1.13-opset11"
HEAD_IMAGES = 400  # that a head is fitted on
FIELDS = (
    "file", "planted", "named", "apart", "undecided", "right", "images", "trials", "cpu_seconds", "seconds",
)  # fmt: skip


def planted(size: tuple[int, int], normalisation: str, order: str = "rgb", **more: Any) -> Preprocess:
    white, mean, std = NORMALISATIONS[normalisation]
    turn = slice(None, None, 1 if order == "rgb" else -1)
    return Preprocess(size=size, channel_order=order, input_range=white, mean=mean[turn], std=std[turn], **more)  # type: ignore[arg-type]


def plants() -> dict[str, Preprocess]:
    """A preprocessing a file: another one each."""
    size, names = (224, 224), list(NORMALISATIONS)
    imagenet, inception, unit, whole, caffe = names
    return {
        BIRDS: planted((160, 160), inception, resize="crop", crop_pct=0.875, interpolation="bicubic"),
        "timm-mobilenetv2_100-torch2.4-opset17-bn-kept": planted(
            size, imagenet, resize="crop", crop_pct=0.875, interpolation="bicubic"
        ),
        "torchvision-mobilenet_v2-torch1.13-opset13": planted(
            size, unit, resize="squash", crop_pct=1.0, interpolation="bilinear"
        ),
        "timm-mobilenetv2_100-torch2.9-opset18-dynamo": planted(
            size, caffe, "bgr", resize="crop", crop_pct=0.875, interpolation="bilinear", antialias=False
        ),
        "timm-mobilenetv2_100-opset13-onnxsim": planted(
            size, unit, "bgr", resize="pad", crop_pct=1.0, fill=(114, 114, 114), interpolation="bilinear", antialias=False
        ),
        "timm-mobilenetv2_100-opset13-ort-extended": planted(
            size, whole, resize="crop", crop_pct=1.0, interpolation="lanczos"
        ),
        "keras-MobileNetV2-tf2onnx-opset13-nhwc": planted(
            size, inception, resize="squash", crop_pct=1.0, interpolation="bilinear", antialias=False
        ),
    }  # fmt: skip


def write_planted(source: Path, weights: Path, spec: Preprocess, index: ImageIndex, out: Path) -> None:
    """Write a copy of the file with these weights and a head that was fitted under `spec`."""
    net = open_onnx(source, spec.size).eval()
    donor = timm.create_model("mobilenetv2_100", num_classes=net.num_classes)
    state = {key: value for key, value in load_file(weights).items() if not key.startswith("classifier.")}
    donor.load_state_dict(state, strict=False)
    twin = look_up(net, first="mobilenetv2_100").twin
    exact = open_onnx(source, spec.size).double()
    if twin is not None:
        values = {name: value.double() for name, value in twin.tensors(donor.eval()).items()}
        exact.load_state_dict(exact.by_own_names(values), strict=False)
    else:  # the same layers in the same order, padded on other sides
        lay_by_order(exact, donor.eval())
    rows = index.rows("train")
    rows = rows[sample_rows(index.labels[rows].astype(np.int64), HEAD_IMAGES)]
    vectors = features(exact.float(), spec, index, rows)
    probe = fit_probe(vectors, index.labels[rows].astype(np.int64), classes=net.num_classes)
    exact.double()
    with torch.no_grad():
        exact.get_classifier().weight.copy_(torch.from_numpy(probe.weight))
        exact.get_classifier().bias.copy_(torch.from_numpy(probe.bias))
    write_into(source, {name: value.numpy() for name, value in exact.stored() if name in exact.movable}, out)


def lay_by_order(net: OnnxNet, donor: nn.Module) -> None:
    """Lay the donor's convolutions, norms folded, into those of a net without norms."""
    theirs = [module for module in donor.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in donor.modules() if isinstance(module, nn.BatchNorm2d)]
    ours = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        for mine, other, norm in zip(ours, theirs, norms, strict=True):
            assert norm.running_var is not None
            assert norm.running_mean is not None
            assert mine.bias is not None
            scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            mine.weight.copy_(other.weight.double() * scale[:, None, None, None])
            mine.bias.copy_(norm.bias.double() - norm.running_mean.double() * scale)


def features(net: OnnxNet, spec: Preprocess, index: ImageIndex, rows: Sequence[int]) -> np.ndarray:
    """Pooled features (N,D) of images."""
    vectors = []
    with torch.no_grad():
        for start in range(0, len(rows), 16):
            x = np.stack([preprocess(decode_row(index, int(row)), spec) for row in rows[start : start + 16]])
            vectors.append(net.forward_head(net.forward_features(torch.from_numpy(x)), pre_logits=True).flatten(1).numpy())
    return np.concatenate(vectors)


def row_of(name: str, spec: Preprocess, result: FileSearch, cpu: float) -> dict[str, object]:
    found = result.search
    return {
        "file": name, "planted": described(spec), "named": described(found.best.spec),
        "apart": "; ".join(differences(found.best.spec, spec)), "undecided": " ".join(a.factor for a in found.undecided),
        "right": f"{found.best.accuracy:.3f}", "images": found.images, "trials": found.trials,
        "cpu_seconds": f"{cpu:.0f}", "seconds": f"{found.seconds:.0f}",
    }  # fmt: skip


def wrong_orders(labels: Sequence[str], number: int = 10) -> list[tuple[str, ...]]:
    """Orders of labels that are wrong in two places, in three, ... and in all."""
    random = np.random.default_rng(0)
    orders = []
    for wrong in np.linspace(2, len(labels), number).astype(int):
        places = random.choice(len(labels), wrong, replace=False)
        order = list(labels)
        for place, other in zip(places, np.roll(places, 1), strict=True):
            order[place] = labels[other]
        orders.append(tuple(order))
    return orders


def order_rows(result: FileSearch, index: ImageIndex, labels: Sequence[str]) -> list[dict[str, object]]:
    rows = []
    for stated in wrong_orders(labels):
        order = output_order(result.search.best.answers, result.search.labels, index.classes, stated)
        moved = {name for name, true in zip(stated, labels, strict=True) if name != true}
        right = sum(a == b for a, b in zip(order.assigned, labels, strict=True))
        rows.append(
            {
                "file": BIRDS, "planted": f"labels: {len(moved)} in wrong places",
                "named": f"{len(moved & set(order.other))} of them, {len(set(order.other) - moved)} others; {right} of "
                f"{len(labels)} outputs assigned rightly",
                "undecided": "" if order.decided else "labels", "images": result.search.images,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("deployed", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--limit", type=int, default=200)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    remarks: list[str] = []
    if options.out.exists():
        lines = options.out.read_text(encoding="utf-8").splitlines(keepends=True)
        remarks = [line for line in lines if line.startswith("#")]
        rows = list(csv.DictReader(line for line in lines if line not in remarks))
    index = read_source(AutoData(root=options.images, val_fraction=0.0))
    for name, spec in plants().items():
        if any(row["file"] == name for row in rows):
            continue
        with TemporaryDirectory() as scratch:
            path = options.deployed / f"{name}.onnx"
            if name != BIRDS:
                path = Path(scratch) / f"{name}.onnx"
                write_planted(options.deployed / path.name, options.weights, spec, index, path)
            before = time.process_time()
            result = search_file(path, options.images, index=index, limit=options.limit, seconds=1e9)
            rows.append(row_of(name, spec, result, time.process_time() - before))
        if name == BIRDS:  # stated nowhere, so that the order is that of the set, which is right
            rows += order_rows(result, index, tuple(index.classes))
        with options.out.open("w", newline="", encoding="utf-8") as file:
            file.writelines(remarks)
            writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
