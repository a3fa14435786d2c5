"""Inspection of a deployed file: what it is, and whether it can be trained."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fgvc.config.images import Preprocess, Triple
from fgvc.data.deployed import PREPROCESS
from fgvc.errors import FgvcError, ImageError
from fgvc.evaluation.file_preprocessing import FileSearch, search_file
from fgvc.exporting.proofs import MAX_IMAGES
from fgvc.images.preprocess import described
from fgvc.images.preprocess import preprocess as preprocess_image
from fgvc.io.display import Display, table
from fgvc.io.files import StrPath, as_path, as_paths
from fgvc.io.names import few
from fgvc.models.lookup.twin import look_up
from fgvc.models.onnxnet.folded import folded_convolutions
from fgvc.models.onnxnet.net import OnnxNet
from fgvc.models.onnxnet.payload import external_files, stored_tensors
from fgvc.models.onnxnet.read import load_model, read_graph
from fgvc.runtime.description import describe
from fgvc.runtime.engine import OnnxSession
from fgvc.runtime.labels import Labels, labels_of
from fgvc.runtime.predict import BATCH, decoded, expand
from fgvc.runtime.stack import stack_of

TOLERANCE = 1e-4  # of the largest answer: float32 in another order; half floats have their own bar
HALF_TOLERANCE = 1e-2
UNKNOWN_PREPROCESS = f"how they are prepared is not known; to train from it, give deploy.* or a {PREPROCESS} beside it"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Inspection(Display):
    """Facts of a classifier's file as it will be trained."""

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
    arithmetic: int  # that are written as products and sums: trained as they are
    folded: tuple[str, ...]  # convolutions that one was folded into: `model.batch_norm: restore` puts it back
    bare: dict[str, str]  # other convolutions without a batch norm -> why none is put there
    trainable: dict[str, tuple[int, ...]]  # stored tensor -> its shape
    untrained: dict[str, str]  # stored tensor of floats -> why it is left as it is
    timm: dict[str, Any]  # which of timm's nets it is: `LookUp.numbers`, and `line` for people
    labels: Labels | None  # names of the classes; None: nothing says them
    preprocess: Preprocess | None  # how its images are prepared; None: nothing says that
    search: FileSearch | None  # what its answers about labelled images say of that, where nothing else does
    difference: float  # of onnxruntime's answers from the net's, over the largest of them
    images: int  # that both answered; 0: noise
    answers: dict[str, int]  # name, or number, of a class -> of how many of the images

    @property
    def agrees(self) -> bool:
        return self.difference <= (HALF_TOLERANCE if self.dtype == "float16" else TOLERANCE)

    def numbers(self) -> dict[str, Any]:
        """Values for JSON."""
        preprocess = None if self.preprocess is None else self.preprocess.model_dump(mode="json")
        search = None if self.search is None else self.search.numbers()
        own = asdict(replace(self, search=None))
        return own | {"path": str(self.path), "agrees": self.agrees, "preprocess": preprocess, "search": search}

    def lines(self) -> list[str]:
        """Lines of text for the terminal."""
        values = sum(math.prod(shape) for shape in self.trainable.values())
        batch = "any batch" if self.batch is None else f"a batch of {self.batch} alone"
        ending = f", {self.ending} at the end" if self.ending else ""
        stages = ", ".join(f"{stage['num_chs']} at 1/{stage['reduction']}" for stage in self.stages) or "none"
        reasons = Counter(self.untrained.values())
        untrained = "; ".join(f"{count} ({reason})" for reason, count in reasons.most_common()) or "nothing"
        bare = [f"{count} convolutions have none ({reason})" for reason, count in Counter(self.bare.values()).most_common()]
        written = f", {self.arithmetic} written as products and sums" if self.arithmetic else ""
        norms = "; ".join([f"{self.norms} kept{written}, {len(self.folded)} folded into convolutions", *bare])
        on = f"on {self.images} images" if self.images else "on noise"
        verdict = "it can be trained as it is" if self.agrees else "NOT the same function: it can't be trained here"
        return [
            f"{self.path}: {self.nodes} nodes, opset {self.opset}, by {self.producer or 'an unnamed program'}",
            *([f"weights in {', '.join(self.external_files)} beside it"] if self.external_files else []),
            f"input: {self.dtype} {self.layout}, {self.size[0]} x {self.size[1]} pixels, {batch}",
            *([f"the graph itself does: {'; '.join(self.in_graph)}"] if self.in_graph else []),
            f"net: {self.timm['line']}",
            f"output: {self.classes} classes{ending}, from a linear layer of {self.classifier[0]} features",
            f"last features: {' x '.join(map(str, self.features))}; stages (channels): {stages}",
            f"batch norms: {norms}",
            *([f"model.batch_norm: restore puts {len(self.folded)} norms back for training"] if self.folded else []),
            f"trained: {len(self.trainable)} tensors, {values / 1e6:.2f} million values",
            f"left as it is: {untrained}",
            f"labels: {self._labels}",
            *self._images,
            *([f"answers: {', '.join(f'{name} {count}' for name, count in self.answers.items())}"] if self.answers else []),
            f"answers beside onnxruntime's: {self.difference:.1e} apart {on}; {verdict}",
        ]

    @property
    def _images(self) -> list[str]:
        if self.search is not None:
            lines = [f"  {line}" for line in self.search.lines()]
            return ["images: nothing states how they are prepared; by its answers:", *lines]
        return [f"images: {described(self.preprocess) if self.preprocess else UNKNOWN_PREPROCESS}"]

    @property
    def _labels(self) -> str:
        if self.labels is None:
            return "not known; to train from it, give deploy.labels"
        names = self.labels.names
        wrong = "" if len(names) == self.classes else f", NOT one for each of the {self.classes} outputs"
        return f"{len(names)} by {self.labels.source}{wrong}: {few(names)}"

    @property
    def facts(self) -> Mapping[str, object]:
        verdict = "can be trained as it is" if self.agrees else "NOT the same function: can't be trained"
        return {"": self.path, "net": self.timm["line"], "classes": self.classes, "verdict": verdict}

    def _repr_html_(self) -> str:
        return table((line,) for line in self.lines())


def inspect_file(
    path: StrPath,
    size: tuple[int, int] | None = None,
    *,
    output: str | None = None,
    images: StrPath | Sequence[StrPath] = (),
    labels: StrPath | None = None,
    preprocess: StrPath | None = None,
) -> Inspection:
    """Read a classifier's ONNX file, and compare what it answers as a net with what onnxruntime says.

    `size`: height and width, where the file leaves them open; `output`: which of several; `images`: files and folders of
    pictures to answer, up to MAX_IMAGES, in the place of noise; `labels`, `preprocess`: files as in a bundle, where none lie
    beside it. Where nothing says how images are prepared, and they are one folder with labels, its answers are asked. Raises
    FgvcError where it is no classifier that can be read, and for images where neither says how they are prepared."""
    path, labels, pictures = Path(path), as_path(labels), as_paths(images)
    model = load_model(path)
    stack = stack_of(path, labels=labels, preprocess=as_path(preprocess))
    spec = stack.preprocess
    search = None
    if pictures and spec is None:
        search = _asked(path, pictures, size, output)
        spec = search.spec
    if size is None and spec is not None and None in _sides(path, output):
        size = spec.size
    net = OnnxNet(read_graph(path, model, size, output=output)).eval()
    tensors = stored_tensors(model)
    folded = folded_convolutions(net)
    twins = look_up(net)
    if twins.twin is not None:
        net.set_stages(twins.twin.stages)
    with torch.no_grad():
        features = net.forward_features(torch.zeros(1, 3, *net.size))
    trained = {name for name, slots in net.slots.items() if any(slot.trained for slot in slots)}
    x, count = noise(net), 0
    if pictures and spec is not None:
        x = _prepared(pictures, spec, path, net)
        count = len(x)
    answers = difference_from_onnxruntime(path, net, x)
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
        arithmetic=folded.arithmetic,
        folded=folded.names,
        bare=folded.left,
        trainable={name: tuple(tensors[name].dims) for name in tensors if name in trained},
        untrained=net.untouched,
        timm=twins.numbers() | {"line": twins.line()},
        labels=labels_of(path) if labels is None else Labels(stack.labels or (), str(labels)),
        preprocess=spec,
        search=search,
        difference=answers.difference,
        images=count,
        answers=_counted(answers.classes, stack.labels) if count else {},
    )


def _asked(path: Path, pictures: Sequence[Path], size: tuple[int, int] | None, output: str | None) -> FileSearch:
    """Search for the file's preprocessing by its answers about a folder of labelled images."""
    reason = ""
    if len(pictures) == 1 and pictures[0].is_dir():
        try:
            return search_file(path, pictures[0], size=size, output=output)
        except FgvcError as error:
            reason = f" ({error})"
    raise FgvcError(
        f"{path}: how does it see an image? {PREPROCESS} does not lie beside it: give --preprocess FILE, or one folder of "
        f"labelled images, so that its answers tell{reason}"
    )


@dataclass(frozen=True, slots=True)
class Answers:
    """Agreement of a net's answers with those of onnxruntime."""

    difference: float  # the largest of onnxruntime's from the net's, over the largest answer
    classes: list[int]  # onnxruntime's, of each image


def difference_from_onnxruntime(path: Path, net: OnnxNet, x: NDArray[np.float32]) -> Answers:
    """Compare a net's answers for x (B,3,H,W), as it takes images, with onnxruntime's. Raises FgvcError where onnxruntime can't
    load the file."""
    session = OnnxSession(path, output=net.output_name)
    worst, largest, classes = 0.0, 1e-30, list[int]()
    for start in range(0, len(x), BATCH):
        images = x[start : start + BATCH]
        reference = session.scores(images)
        with torch.no_grad():
            own = net.probabilities(net(torch.from_numpy(images))).double().numpy()
        worst = float(np.maximum(worst, np.abs(own - reference).max()))  # NaN stays
        largest = max(largest, float(np.abs(reference).max()))
        classes += reference.argmax(1).tolist()
    return Answers(worst / largest, classes)


def noise(net: OnnxNet, images: int = 2, seed: int = 0) -> NDArray[np.float32]:
    """Random images (B,3,H,W) as the net takes them: standard normal, or 0 to 255 where it takes bytes."""
    rng, shape = np.random.default_rng(seed), (images, 3, *net.size)
    noise = rng.integers(0, 256, shape) if net.dtype == "uint8" else rng.normal(0, 1, shape)
    return noise.astype(net.dtype).astype(np.float32)


def _prepared(paths: Sequence[Path], spec: Preprocess, file: Path, net: OnnxNet) -> NDArray[np.float32]:
    """Preprocess up to MAX_IMAGES pictures of these files and folders for the file; those that can't be read are reported."""
    if spec.size != net.size:
        raise FgvcError(f"{file}: takes images of {net.size[0]} x {net.size[1]}, its preprocessing makes {spec.size}")
    inputs = []
    for path in islice(expand(paths), MAX_IMAGES):
        picture = decoded(path)
        if isinstance(picture, ImageError):
            print(f"skipped: {picture}", file=sys.stderr)
        else:
            inputs.append(preprocess_image(picture, spec))
    if not inputs:
        raise FgvcError("none of the images can be read")
    return np.stack(inputs)


def _counted(classes: Sequence[int], labels: Sequence[str] | None) -> dict[str, int]:
    """Count the images by the class that is answered, the most frequent first."""
    names = [str(number) if labels is None or number >= len(labels) else labels[number] for number in classes]
    return dict(Counter(names).most_common())


def _sides(path: Path, output: str | None) -> tuple[int | None, int | None]:
    description = describe(path, output=output)
    return description.height, description.width
