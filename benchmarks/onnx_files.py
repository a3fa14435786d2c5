"""Which classifiers' files open as a net, agree with onnxruntime, learn, and are written back?

    python benchmarks/onnx_files.py make FOLDER [NAME...]           # export timm nets: both exporters, norms folded and kept
    python benchmarks/onnx_files.py table files.csv FILE.onnx...    # a row a file; --size HxW where files leave it open
        --peers LINES.jsonl...       # what benchmarks/onnx_makers.py printed of onnx2torch and of onnxruntime-training
        --add                        # keep the rows that are there

benchmarks/onnx_makers.py makes files of other torches, of Keras and Paddle, and of optimisers, each in its own environment.

agrees: the largest difference from onnxruntime over the largest answer, on random images. trains: every trained tensor gets a
gradient and moves. written: the untouched copy has the file's bytes, the trained one differs in payloads alone, and onnxruntime's
answers of it are the net's. timm: the nets that it is, by `fgvc.models.lookup`. onnx2torch, ort_training: whether the peer loads
the file and agrees, and which share of the values of its float initializers trains (running statistics apart).
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import tempfile
import warnings
from pathlib import Path

import onnx
import timm
import torch
from torch import nn
from torch.nn import functional as F

from fgvc.errors import FgvcError
from fgvc.exporting.inspect import HALF_TOLERANCE, TOLERANCE, difference_from_onnxruntime, noise
from fgvc.exporting.into import differences_outside, write_into
from fgvc.models.lookup.twin import look_up
from fgvc.models.onnxnet.net import OnnxNet, open_onnx

NETS = (
    "resnet18", "tf_efficientnet_lite0", "mobilenetv3_small_050", "convnext_atto", "densenet121", "regnetx_002", "repvgg_a0",
    "test_vit", "mobilevit_xxs", "ghostnet_050", "mixnet_s", "edgenext_xx_small", "efficientvit_b0", "poolformer_s12",
    "xcit_nano_12_p16_224", "test_efficientnet", "hardcorenas_a", "lcnet_035", "nf_regnet_b0", "levit_128s", "inception_v3",
)  # fmt: skip
KINDS = {
    "torchscript-13": {"dynamo": False, "opset_version": 13},
    "torchscript-17-fixed": {"dynamo": False, "opset_version": 17},
    "torchscript-13-norms": {"dynamo": False, "opset_version": 13, "do_constant_folding": False,
                             "training": torch.onnx.TrainingMode.PRESERVE},
    "dynamo-18": {"dynamo": True, "opset_version": 18, "external_data": False},
    "dynamo-20-external": {"dynamo": True, "opset_version": 20, "external_data": True},
}  # fmt: skip
PEERS = ("onnx2torch", "ort_training")
FIELDS = ("file", "producer", "opset", "nodes", "loads", "agrees", "trained", "trains", "written", "timm", *PEERS, "detail")
PIXELS = 96


def make(folder: Path, names: list[str]) -> None:
    """Random weights, not degenerate; 10 classes; small images where the net takes them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or NETS:
        for kind, options in KINDS.items():
            out = folder / f"{name}-{kind}.onnx"
            if out.exists():
                continue
            torch.manual_seed(0)
            try:
                net, size = timm.create_model(name, num_classes=10, img_size=PIXELS), PIXELS
            except TypeError:
                net = timm.create_model(name, num_classes=10)
                size = net.default_cfg["input_size"][1] if net.default_cfg.get("fixed_input_size") else PIXELS
            net = net.eval()
            with torch.no_grad():
                for weight in net.parameters():
                    weight.add_(0.1 * torch.randn_like(weight)) if weight.dim() == 1 else None
                for norm in net.modules():
                    if isinstance(norm, nn.BatchNorm2d):
                        norm.running_mean.normal_(0, 0.1), norm.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            free = {} if kind.endswith("fixed") else (
                {"dynamic_shapes": ({0: torch.export.Dim("n")},)}
                if options["dynamo"]
                else {"dynamic_axes": {"input": {0: "n"}}, "input_names": ["input"]}
            )  # fmt: skip
            try:
                torch.onnx.export(net, (torch.randn(1, 3, size, size),), str(out), **options, **free)  # type: ignore[arg-type]
                print(out.name, flush=True)
            except Exception as error:  # torch's exporters raise their own kinds
                print(f"{out.name}: not exported: {type(error).__name__}: {str(error).splitlines()[0][:100]}", flush=True)


def row(file: Path, size: tuple[int, int] | None) -> dict[str, object]:
    model = onnx.load(str(file), load_external_data=False)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    facts: dict[str, object] = {
        "file": file.name, "producer": f"{model.producer_name} {model.producer_version}".strip(), "opset": opset,
        "nodes": len(model.graph.node),
    }  # fmt: skip
    try:
        net = open_onnx(file, size)
    except FgvcError as error:
        return facts | {"loads": "no", "detail": str(error).replace(f"{file}: ", "")[:160]}
    agrees = difference_from_onnxruntime(file, net, noise(net)).difference
    trained = [name for name, slots in net.slots.items() if slots[0].trained]
    bar = HALF_TOLERANCE if "fp16" in file.name else TOLERANCE
    facts |= {"timm": " ".join(dict.fromkeys(twin.name for twin in look_up(net).twins)) or "none"}
    facts |= {"loads": "yes", "agrees": f"{agrees:.1e}", "trained": len(trained)}
    with tempfile.TemporaryDirectory() as scratch:
        same = write_into(file, values(net), Path(scratch) / "same" / file.name)
        try:
            still = not learn(net)
        except RuntimeError as error:
            return facts | {"trains": "no", "detail": str(error).splitlines()[0][:160]}
        copy = write_into(file, values(net), Path(scratch) / "new" / file.name)
        written = (
            same.path.read_bytes() == file.read_bytes()
            and not differences_outside(copy.path, file)
            and difference_from_onnxruntime(copy.path, net, noise(net)).difference < bar
        )
        return facts | {"trains": "yes" if still else "no", "written": "yes" if written else "no", "detail": ""}


def values(net: OnnxNet) -> dict[str, object]:
    return {name: value.numpy() for name, value in net.stored()}


def learn(net: OnnxNet) -> list[str]:
    """Two steps with frozen norms; the parameters that did not move."""
    for module in net.train().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, eps=1e-30)
    x = torch.randn(4, 3, *net.size, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(net(x), torch.arange(4) % net.num_classes).backward()
        optimizer.step()
    net.eval()
    return [name for name, value in net.named_parameters() if value.requires_grad and torch.equal(value, before[name])]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("make", "table"))
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--size", type=lambda text: tuple(int(n) for n in text.split("x")))
    parser.add_argument("--peers", nargs="*", default=[], type=Path)
    parser.add_argument("--add", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "make":
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        return make(given.out, given.names)
    rows = {str(line["file"]): line for line in read(given.out)} if given.add else {}
    for file in sorted(map(Path, given.names)):
        if file.name not in rows:
            rows[file.name] = row(file, given.size)
            print(" ".join(str(value) for value in rows[file.name].values())[:200], flush=True)
            write(given.out, rows)
    for lines in given.peers:
        for peer in map(json.loads, lines.read_text().splitlines()):
            if peer["file"] in rows:
                rows[peer["file"]][lines.stem] = said(peer)
    write(given.out, rows)


def said(peer: dict[str, str]) -> str:
    """What a peer does with a file, in a word or two."""
    if peer["loads"] != "yes":
        return "does not load"
    agrees = f"{peer['agrees']} apart, " if "agrees" in peer else ""
    return f"{agrees}{peer['trains']} trains"


def read(path: Path) -> list[dict[str, object]]:
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def write(path: Path, rows: dict[str, dict[str, object]]) -> None:
    with path.open("w", newline="") as stream:
        table = csv.DictWriter(stream, FIELDS, lineterminator="\n", extrasaction="ignore")
        table.writeheader()
        table.writerows(rows.values())


if __name__ == "__main__":
    main()
