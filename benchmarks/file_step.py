"""What does a training step of a deployed file cost, beside one of the timm net that it was made of?

    python benchmarks/file_step.py file-step.csv [NAME...] [--pairs 10] [--batch 16] [--size 160]

Of each net two files, norms folded (trained with scales, and with norms that are put back) and kept. A step is forward, backward
and AdamW, statistics frozen (with norms put back: of the batch, as the twin's then), images channels_last as in training. The two
take turns, A/B/B/A, in one process; the ratio is the median over the pairs, between its quartiles.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import nn
from torch.nn import functional as F

from fgvc.models.backbone import memory_format
from fgvc.models.onnxnet.folded import folded_convolutions
from fgvc.models.onnxnet.net import open_onnx
from fgvc.reparam.unfold import fit, unfold

NETS = ("tf_efficientnet_lite0", "resnet50")
FIELDS = ("net", "file", "batch", "size", "twin_ms", "file_ms", "ratio", "low", "high", "pairs", "threads")
CLASSES = 50


def exported(net: nn.Module, out: Path, size: int, *, kept: bool) -> Path:
    options = {"do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE} if kept else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net.eval(), (torch.randn(1, 3, size, size),), str(out), dynamo=False, opset_version=13, input_names=["image"],
            dynamic_axes={"image": {0: "n"}}, **options,
        )  # type: ignore[call-overload]  # fmt: skip
    return out


def step_of(net: nn.Module, batch: int, size: int, *, frozen: bool) -> Callable[[], float]:
    """A function that makes a step, and returns its seconds."""
    layout = memory_format(net)
    net.to(memory_format=layout).train()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and frozen:
            module.eval()
    optimizer = torch.optim.AdamW([value for value in net.parameters() if value.requires_grad], lr=1e-6, foreach=True)
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout)
    y = torch.arange(batch) % CLASSES

    def step() -> float:
        began = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        return time.perf_counter() - began

    return step


def compared(name: str, kind: str, batch: int, size: int, pairs: int) -> dict[str, object]:
    torch.manual_seed(0)
    twin = timm.create_model(name, num_classes=CLASSES)
    with tempfile.TemporaryDirectory() as scratch:
        net = open_onnx(exported(twin, Path(scratch) / "net.onnx", size, kept=kind == "kept"))
    if kind != "kept":
        unfold(net, folded_convolutions(net).names, norms=kind == "restored")
        fit(net, [torch.randn(4, 3, size, size)])
    a, b = (step_of(one, batch, size, frozen=kind != "restored") for one in (twin, net))
    a(), b()  # the first are slower
    twins, files, ratios = [], [], []
    for number in range(pairs):
        order = (a, b) if number % 2 == 0 else (b, a)
        seconds = {step: step() for step in order}
        twins.append(seconds[a])
        files.append(seconds[b])
        ratios.append(seconds[b] / seconds[a])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "net": name, "file": kind, "batch": batch, "size": size, "twin_ms": round(1e3 * statistics.median(twins)),
        "file_ms": round(1e3 * statistics.median(files)), "ratio": f"{middle:.3f}", "low": f"{low:.3f}", "high": f"{high:.3f}",
        "pairs": pairs, "threads": torch.get_num_threads(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", default=list(NETS))
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=160)
    given = parser.parse_args()
    with given.out.open("w", newline="") as stream:
        table = csv.DictWriter(stream, FIELDS, lineterminator="\n")
        table.writeheader()
        for name in given.names or NETS:
            for kind in ("scaled", "restored", "kept"):
                table.writerow(row := compared(name, kind, given.batch, given.size, given.pairs))
                stream.flush()
                print(row, flush=True)


if __name__ == "__main__":
    main()
