"""Candidate nets for a set: local weights, runs and bundles, each with the features that its last layer reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
from onnx import GraphProto, NodeProto
from pydantic import ValidationError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fgvc.config.images import Deploy, Preprocess
from fgvc.config.models import Model, run_of
from fgvc.errors import FgvcError
from fgvc.evaluation.features import Embed, make_embedder, pooled
from fgvc.models.backbone import pretrained_cfg
from fgvc.models.classifier import as_classifier
from fgvc.models.net import shipped_net
from fgvc.models.weights import load_weights, preprocess_for, read_sidecar, stated_keys, unlikely
from fgvc.reparam.plain import strip_to
from fgvc.runs.folder import is_run
from fgvc.runs.loaded import load_run
from fgvc.runtime.bundle import MANIFEST
from fgvc.runtime.description import describe
from fgvc.runtime.engine import OnnxSession, refuse_misfit
from fgvc.runtime.stack import stack_of

WRITE = "NAME=FILE, NAME=hub, NAME=packaged, FILE, RUN or BUNDLE, NAME being timm's name of the net"
PASS_THROUGH = ("Add", "Identity", "Reshape", "Flatten", "Squeeze")  # between the last layer and the logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A net whose features are probed; it is not trained."""

    name: str
    spec: Preprocess  # of its input, at its own size
    fixed: bool  # it takes no other size
    parameters: int
    model: Model | None  # what trains from it; None: a bundle
    net: nn.Module | None = None
    session: OnnxSession | None = None
    run: Path | None = None  # whose images it was trained on
    notes: tuple[str, ...] = ()

    def embed(self, device: torch.device) -> Embed:
        """Make the function that computes its features on `device`; of a bundle on the CPU."""
        if self.net is not None:
            return make_embedder(self.net, device)
        assert self.session is not None
        session = self.session
        return lambda x: session.run(np.ascontiguousarray(x.numpy()))[-1].reshape(len(x), -1)

    def refuse_size(self, size: tuple[int, int]) -> None:
        """Raise FgvcError where it can't take images (height, width), or has no vector of features before its last layer."""
        if self.fixed and size != self.spec.size:
            raise FgvcError(f"{self.name}: takes images of {self.spec.size[0]} x {self.spec.size[1]} pixels only")
        x = torch.zeros(1, 3, *size)
        try:
            shape = self.embed(torch.device("cpu"))(x).shape
        except (RuntimeError, AssertionError, ValueError, AttributeError, TypeError) as error:
            raise FgvcError(f"{self.name}: can't take images of {size[0]} x {size[1]} pixels: {error}") from error
        if len(shape) != 2:
            raise FgvcError(f"{self.name}: has no pooled features before its last layer, but {shape[1:]}")

    def macs(self, size: tuple[int, int]) -> int | None:
        """Count the multiply-adds for one image (height, width); None for a bundle."""
        if self.net is None:
            return None
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            pooled(self.net, torch.zeros(1, 3, *size, device=next(self.net.parameters()).device))
        return int(counter.get_total_flops()) // 2


def open_candidate(text: str, *, deploy: Deploy, size: tuple[int, int] | None) -> Candidate:
    """Open what `--start` names, see WRITE. `size`: height and width in the place of its own, where it takes others.

    `deploy`: how images are fed, but for mean and std, which are the weights' own. Raises FgvcError where there is no such
    thing, or nothing tells which net the weights are of.
    """
    path = Path(text).expanduser()
    if path.is_dir() and is_run(path):
        return _from_run(path, size)
    if path.suffix == ".onnx" or (path.is_dir() and (path / MANIFEST).is_file()):
        return _from_onnx(path)
    if path.is_dir():
        raise FgvcError(f"--start {text}: a folder that is neither a run nor a bundle; give {WRITE}")
    return from_weights(start_model(text), deploy.model_copy(update={"mean": None, "std": None}), size)


def from_weights(model: Model, deploy: Deploy, size: tuple[int, int] | None) -> Candidate:
    """Load a timm net with weights. `size`: height and width; default: that of timm's weights. Raises FgvcError for random
    weights, and for a net or weights that can't be had."""
    if model.weights == "none":
        raise FgvcError(f"{model.name}: features of random weights say nothing of a set; name weights")
    net = shipped_net(model, None, size).eval()
    weights = load_weights(net, model, stated=stated_keys(deploy))
    spec = preprocess_for(deploy, size or pretrained_cfg(net)["input_size"][1:], weights)
    return Candidate(
        name=_name(model),
        spec=spec,
        fixed=model.onnx is not None,
        parameters=_count_parameters(net),
        model=model,
        net=net,
        run=run_of(Path(model.weights).expanduser()),
        notes=(*weights.doubts, *unlikely(spec, weights)),
    )


def _name(model: Model) -> str:
    """Name to display: of the net, and of the file where that has another."""
    if model.weights in ("hub", "packaged", "deployed"):
        return model.name
    stem = Path(model.weights).name.removesuffix(".safetensors").removesuffix(".pth")
    return stem if stem.startswith(model.name) else f"{model.name} ({stem})"


def named_weights(text: str) -> tuple[str, str]:
    """The net's name, empty where none is given, and the weights of NAME=WEIGHTS or WEIGHTS."""
    named, _, weights = text.partition("=")
    return ("", text) if Path(text).expanduser().is_file() or not weights else (named, weights)


def start_model(text: str) -> Model:
    """Parse the net and its weights, see WRITE. A file's name may have a `=` in it. Raises FgvcError where there is no such file,
    or nothing tells which net it is of."""
    named, weights = named_weights(text)
    file = Path(weights).expanduser()
    if weights not in ("hub", "packaged") and not file.is_file():
        near = "" if named else f"; give {WRITE}"
        raise FgvcError(f"--start {text}: no file {file}{near}")
    sidecar = read_sidecar(file) if file.is_file() else None
    if not named:
        named = sidecar.backbone if sidecar is not None and sidecar.backbone else _backbone_of_file_name(text, file)
    try:
        return Model(backbone=named, kwargs=dict(sidecar.kwargs) if sidecar is not None else {}, weights=weights)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise FgvcError(f"--start {text}: {reason}; give {WRITE}") from error


def _backbone_of_file_name(text: str, file: Path) -> str:
    """Backbone in a file's name: `mobilenetv2_100` of mobilenetv2_100.birds.safetensors, with timm's tag where it has one."""
    words = file.name.split(".")
    for end in range(len(words) - 1, 0, -1):
        name = ".".join(words[:end])
        if timm.is_model_pretrained(name) or (end == 1 and timm.is_model(name)):
            return name
    raise FgvcError(
        f"--start {text}: weights of which net? Give --start NAME={text}, or a file {file.name}.json beside it with "
        '"backbone" (and "kwargs"), "mean" and "std"'
    )


def _from_run(path: Path, size: tuple[int, int] | None) -> Candidate:
    run = load_run(path)
    model = run.recipe.model
    net = strip_to(shipped_net(model, len(run.classes), run.recipe.image.size), run.step.net)
    place = path / "ckpt" / ("best" if run.select == "best" else "last")
    averaged = run.select in ("ema", "swa") or (run.select == "best" and (place / "ema.safetensors").is_file())
    return Candidate(
        name=str(path),
        spec=run.preprocess if size is None or model.onnx is not None else run.preprocess.model_copy(update={"size": size}),
        fixed=model.onnx is not None,
        parameters=_count_parameters(net),
        model=Model(
            backbone=model.backbone, onnx=model.onnx, output=model.output, kwargs=model.kwargs,
            weights=str(place / f"{'ema' if averaged else 'net'}.safetensors"),
        ),
        net=net,
        run=path,
    )


def _count_parameters(net: nn.Module) -> int:
    """Count the parameters without the classifier's, which depend on the number of classes."""
    head = as_classifier(net).get_classifier()
    inside = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    return sum(p.numel() for p in net.parameters() if id(p) not in inside)


def _from_onnx(path: Path) -> Candidate:
    stack = stack_of(path)
    if stack.preprocess is None:
        raise FgvcError(f"{path}: how does it see an image? There is no preprocess.json beside it; name a bundle")
    try:
        model = onnx.load(stack.model)
    except Exception as error:  # protobuf and onnx have kinds of their own
        raise FgvcError(f"{stack.model}: onnx can't read it: {error}") from error
    classes = None if stack.labels is None else len(stack.labels)
    output = None if stack.preprocess.network is None else stack.preprocess.network.output
    file = describe(stack.model, output=output, classes=classes)
    refuse_misfit(file, stack.preprocess, model=stack.model, where=path)
    name = _last_layer_input(model.graph, stack.model, file.logits)
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = OnnxSession(model.SerializeToString(), output=file.output)
    return Candidate(
        name=str(path),
        spec=stack.preprocess.model_copy(update={"network": None}),  # how its images are made; the session does the rest
        fixed=all(side is not None for side in session.shape[2:]),
        parameters=sum(
            math.prod(tensor.dims) for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT
        ),
        model=None,
        session=session,
        notes=(f"{path}: what it was trained on is not known; if on these images, its figures are too high",),
    )


def _last_layer_input(graph: GraphProto, where: Path, logits: str) -> str:
    """Name of the tensor (B,D) that the last Gemm, MatMul or 1x1 Conv before `logits` reads. Raises FgvcError where the graph
    ends otherwise."""
    producers: dict[str, NodeProto] = {output: node for node in graph.node for output in node.output}
    stored = {tensor.name for tensor in graph.initializer}
    name = logits
    while (node := producers.get(name)) is not None and node.op_type in PASS_THROUGH:
        name = next((tensor for tensor in node.input if tensor in producers and tensor not in stored), "")
    if node is not None and (node.op_type in ("Gemm", "MatMul") or _is_pointwise(node, graph)):
        return str(node.input[0])
    last = "nothing" if node is None else f"a {node.op_type}"
    raise FgvcError(
        f"{where}: no features can be had: its logits come from {last}, not from a Gemm, a MatMul or a 1x1 Conv; name the run "
        "that it was exported from, or its weights"
    )


def _is_pointwise(node: NodeProto, graph: GraphProto) -> bool:
    """Whether a node is a convolution with a kernel of one cell, which is a linear layer."""
    weight = next((tensor for tensor in graph.initializer if node.op_type == "Conv" and tensor.name == node.input[1]), None)
    return weight is not None and all(side == 1 for side in weight.dims[2:])
