"""What a deployed file is, and what of it can be trained."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fgvc.config.images import Triple
from fgvc.models.onnxnet.folded import folded_convolutions
from fgvc.models.onnxnet.net import OnnxNet
from fgvc.models.onnxnet.payload import external_files, stored_tensors
from fgvc.models.onnxnet.read import load_model, read_graph
from fgvc.runtime.engine import load_session

TOLERANCE = 1e-4  # of the largest answer: float32 in another order; half floats have their own bar
HALF_TOLERANCE = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A classifier's file as it will be trained."""

    path: Path
    producer: str  # program and version, as the file says
    opset: int
    nodes: int
    external_files: tuple[str, ...]
    layout: str  # of the input: NCHW | NHWC
    dtype: str  # of the input
    size: tuple[int, int]
    batch: int | None  # where it is fixed
    in_graph: tuple[str, ...]  # what the graph does to the pixels before its first layer
    mean: Triple | None  # that the graph subtracts by itself, and
    std: Triple | None  # divides by then, in the units of its input; None: it does not normalise
    output: str  # whose numbers are the classes'
    classes: int
    ending: str | None  # softmax, sigmoid or log_softmax at its end, which the loss does without
    features: tuple[int, ...]  # (C,h,w) of the last map, or (N,C) of the last tokens
    stages: tuple[dict[str, Any], ...]  # channels, reduction and module of each resolution
    classifier: tuple[int, int]  # features, classes
    norms: int  # batch norms that it kept
    folded: tuple[str, ...]  # convolutions that one was folded into: `model.batch_norm: restore` puts it back
    bare: dict[str, str]  # other convolutions without a batch norm -> why none is put there
    trainable: dict[str, tuple[int, ...]]  # stored tensor -> its shape
    untrained: dict[str, str]  # stored tensor of floats -> why it is left as it is
    difference: float  # of onnxruntime's answers from the net's, over the largest of them, on random images

    @property
    def agrees(self) -> bool:
        return self.difference <= (HALF_TOLERANCE if self.dtype == "float16" else TOLERANCE)

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"path": str(self.path), "agrees": self.agrees}

    def lines(self) -> list[str]:
        """For people."""
        values = sum(math.prod(shape) for shape in self.trainable.values())
        batch = "any batch" if self.batch is None else f"a batch of {self.batch} alone"
        ending = f", {self.ending} at the end" if self.ending else ""
        stages = ", ".join(f"{stage['num_chs']} at 1/{stage['reduction']}" for stage in self.stages) or "none"
        reasons = Counter(self.untrained.values())
        untrained = "; ".join(f"{count} ({reason})" for reason, count in reasons.most_common()) or "nothing"
        bare = [f"{count} convolutions have none ({reason})" for reason, count in Counter(self.bare.values()).most_common()]
        norms = "; ".join([f"{self.norms} kept, {len(self.folded)} folded into convolutions", *bare])
        verdict = "it can be trained as it is" if self.agrees else "NOT the same function: it can't be trained here"
        return [
            f"{self.path}: {self.nodes} nodes, opset {self.opset}, by {self.producer or 'an unnamed program'}",
            *([f"weights in {', '.join(self.external_files)} beside it"] if self.external_files else []),
            f"input: {self.dtype} {self.layout}, {self.size[0]} x {self.size[1]} pixels, {batch}",
            *([f"the graph itself does: {'; '.join(self.in_graph)}"] if self.in_graph else []),
            f"output: {self.classes} classes{ending}, from a linear layer of {self.classifier[0]} features",
            f"last features: {' x '.join(map(str, self.features))}; stages (channels): {stages}",
            f"batch norms: {norms}",
            *([f"model.batch_norm: restore puts {len(self.folded)} norms back for training"] if self.folded else []),
            f"trained: {len(self.trainable)} tensors, {values / 1e6:.2f} million values",
            f"left as it is: {untrained}",
            f"answers beside onnxruntime's: {self.difference:.1e} apart; {verdict}",
        ]


def inspect_file(path: Path, size: tuple[int, int] | None = None, *, output: str | None = None) -> Inspection:
    """Read a classifier's ONNX file, and compare what it answers as a net with what onnxruntime says. `size`: height and width,
    where the file leaves them open; `output`: which of several. Raises FgvcError where it is no classifier that can be read."""
    model = load_model(path)
    net = OnnxNet(read_graph(path, model, size, output=output)).eval()
    tensors = stored_tensors(model)
    folded = folded_convolutions(net)
    with torch.no_grad():
        features = net.forward_features(torch.zeros(1, 3, *net.size))
    trained = {name for name, slots in net.slots.items() if any(slot.trained for slot in slots)}
    return Inspection(
        path=path,
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
        opset=next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0),
        nodes=len(model.graph.node),
        external_files=tuple(external_files(model)),
        layout=net.layout,
        dtype=net.dtype,
        size=net.size,
        batch=net.batch,
        in_graph=net.file.in_graph,
        mean=net.file.mean,
        std=net.file.std,
        output=net.file.output,
        classes=net.num_classes,
        ending=net.ending,
        features=tuple(features.shape[1:]),
        stages=tuple(net.feature_info),
        classifier=(net.num_features, net.num_classes),
        norms=sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules()),
        folded=folded.names,
        bare=folded.left,
        trainable={name: tuple(tensors[name].dims) for name in tensors if name in trained},
        untrained=net.untouched,
        difference=difference_from_onnxruntime(path, net),
    )


def difference_from_onnxruntime(path: Path, net: OnnxNet, images: int = 2, seed: int = 0) -> float:
    """The largest difference between a net's answers and onnxruntime's on random images, over the largest answer. Raises
    FgvcError where onnxruntime can't load the file."""
    rng = np.random.default_rng(seed)
    shape = (images, 3, *net.size)
    x = (rng.integers(0, 256, shape) if net.dtype == "uint8" else rng.normal(0, 1, shape)).astype(net.dtype)
    session = load_session(path)
    fed, name = np.ascontiguousarray(x if net.layout == "NCHW" else x.transpose(0, 2, 3, 1)), session.get_inputs()[0].name
    step = net.batch or images
    pieces = [np.resize(fed[at : at + step], (step, *fed.shape[1:])) for at in range(0, images, step)]
    answers = np.concatenate([session.run([net.output_name], {name: piece})[0] for piece in pieces])[:images]
    with torch.no_grad():
        own = net.probabilities(net(torch.from_numpy(x.astype(np.float32)))).double().numpy()
    wanted = answers.reshape(images, -1).astype(np.float64)
    return float(np.abs(own - wanted).max() / max(np.abs(wanted).max(), 1e-30))
