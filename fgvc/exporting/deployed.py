"""Export of a run into its deployed file: payloads of weights differ, nothing else, and that is proved (docs/deployed.md)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from fgvc import __version__
from fgvc.errors import FgvcError, ProofError
from fgvc.exporting.canonical import canonicalise
from fgvc.exporting.changed import refuse_shape, shape_free_sha256, write_changed
from fgvc.exporting.into import Written, differences_outside, moved_between, skeleton, write_into
from fgvc.exporting.proofs import (
    MAX_IMAGES,
    ONNX_TOLERANCE,
    SHIPPED_TOLERANCE,
    Behavioural,
    Disagreement,
    compare_numbers,
    differing_rows,
    peek,
)
from fgvc.exporting.prove import PlainBackbone, ProvedExport
from fgvc.exporting.reference import Plain, versions
from fgvc.exporting.spelling import CANONICAL
from fgvc.exporting.temperature import Divided, divide_last
from fgvc.io.display import Display
from fgvc.io.files import file_sha256
from fgvc.io.names import some
from fgvc.models.backbone import feature_layout, memory_format
from fgvc.models.class_maps import closed_form
from fgvc.models.lookup.twin import look_up
from fgvc.models.onnxnet.classes import change_classes, last_tensors
from fgvc.models.onnxnet.net import OnnxNet, open_onnx
from fgvc.models.onnxnet.payload import external_files, stored_tensors
from fgvc.models.onnxnet.read import load_model
from fgvc.reparam.plain import strip, strip_to
from fgvc.runtime.bundle import DEPLOYED_FILE, OTHER_CLASSES
from fgvc.runtime.description import describe
from fgvc.runtime.engine import OnnxSession, feed

MAPS = "maps"  # output of explain.onnx
HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
OPEN = (224, 224)  # pixels
HALF_TOLERANCE = 1e-2  # in place of 1e-4 where weights or arithmetic are of half precision: three digits


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployedFile:
    """Contract of a run of `model.onnx`, and of one of `model.backbone` whose net the file is: it ships that file, in which
    payloads of weights alone differ."""

    file: Path
    size: tuple[int, int]  # height, width of the images
    output: str | None
    scratch: Path  # an empty folder, which the caller removes
    backbone: PlainBackbone | None = None  # the net of timm's that was trained; None: the file's own
    classes: int | None = None  # of a last layer made anew; None: the file's own classes
    temperature: float = 1.0  # that its last layer is divided by, where it can be

    def prove(self, net: nn.Module, images: Iterable[np.ndarray]) -> ProvedExport:
        """Write the trained `net`, its blocks folded, into a copy of the file, and prove it.

        `images`: batches (B,3,H,W) float32 of real images as they go into the file, of which the first 256 images are used.
        Raises ProofError at the first proof that fails."""
        trained = copy.deepcopy(net).cpu().eval()
        sample, images = peek(images)
        exact = self._open(self.file)
        self._refuse_lossy(exact)
        before = exact.num_classes
        if self.classes is not None:
            change_classes(exact, self.classes)
        if self.backbone is None:
            strip_to(exact, trained, dtype=torch.float64)
        else:
            self._lay_into(exact, trained, self.backbone)
        temperature = self._divide(exact, sample)
        values = {name: value.numpy() for name, value in exact.stored() if name in exact.movable}
        written = self._write(exact, values)
        shipped = self._open(written.path)
        refuse_shape(shipped.num_classes, exact.num_classes, self.file)
        bar = HALF_TOLERANCE if _is_half(written.path, shipped) else SHIPPED_TOLERANCE
        divided = Divided(trained.double(), temperature["divided_by"])
        numeric = compare_numbers(divided, exact, shipped, sample, bar=bar)
        if not numeric.passed:
            raise ProofError(numeric.failure)
        session = OnnxSession(written.path, output=shipped.output_name)
        behavioural = compare_answers(session, shipped, images, bar=bar)
        if not behavioural.passed:
            raise ProofError(behavioural.failure)
        explain, reason, warnings = _explain(session, written.path, shipped, sample, self.scratch / "explain", bar=bar)
        contract = {
            "fgvc": __version__,
            "contract": DEPLOYED_FILE if self.classes is None else OTHER_CLASSES,
            "versions": versions(),
            "num_classes": shipped.num_classes,
            "canonical": CANONICAL,
            "verdict": "identical" if self.classes is None else "different",
            **self._record(written, shipped),
            "proofs": {"written": self._outside(written), "numeric": asdict(numeric), "behavioural": asdict(behavioural)},
            "temperature": temperature,
            "explain": reason,
            "against": None,
        }
        if self.classes is not None:
            changed = f"{shipped.num_classes} numbers an image in place of {before}"
            warnings = (*warnings, f"the shape of its output changes, {changed}: it is no drop-in for {self.file.name}")
        return ProvedExport(
            model=written.path.read_bytes(), explain=explain, contract=contract, numeric=numeric, behavioural=behavioural,
            warnings=warnings, structural=None, written=written, runnable=written.path,
            data={name: written.path.with_name(name).read_bytes() for name in written.files},
            plain=(as_plain(written.path, shipped), as_plain(self.file if self.classes is None else written.path, shipped)),
        )  # fmt: skip

    def _divide(self, net: OnnxNet, x: np.ndarray) -> dict[str, Any]:
        """Divide the last layer by the temperature. Returns the record of that: the divisor, 1 where it could not be done, and
        the reason."""
        why = "" if self.temperature == 1 else divide_last(net, self.temperature, x)
        return {"divided_by": 1.0 if why else self.temperature, "why_not": why}

    def _lay_into(self, net: OnnxNet, trained: nn.Module, backbone: PlainBackbone) -> None:
        """Lay the weights of a trained net of timm's into the net of the file, in float64. Raises FgvcError where the file is
        another net, or of other classes."""
        if net.num_classes != backbone.num_classes:
            raise FgvcError(f"{self.file}: has {net.num_classes} classes, the run has {backbone.num_classes}")
        name = backbone.backbone.partition(".")[0]
        result = look_up(net, first=name)
        twin = next((twin for twin in result.twins if twin.name.partition(".")[0] == name), None)
        if twin is None:
            raise FgvcError(f"{self.file}: is not the {backbone.backbone} that was trained, but {result.line()}")
        plain = strip(
            trained, backbone=backbone.backbone, num_classes=backbone.num_classes, kwargs=backbone.kwargs, dtype=torch.float64
        )
        values = twin.tensors(plain)
        if left := sorted(net.movable - values.keys()):
            raise FgvcError(f"{self.file}: {some(left)}: no weights of {backbone.backbone} are for these tensors")
        net.double().load_state_dict(net.by_own_names({name: value.double() for name, value in values.items()}), strict=False)

    def _write(self, net: OnnxNet, values: Mapping[str, NDArray[np.float64]]) -> Written:
        """Write a copy of the file with these values. Raises FgvcError where more would differ than weights and what goes with
        the number of classes."""
        out = self.scratch / "written" / self.file.name
        if self.classes is None:
            written = write_into(self.file, values, out)
            if faults := differences_outside(written.path, self.file, written.moved):
                raise ProofError(f"{self.file}: more than weights would differ in its copy:\n  " + "\n  ".join(faults))
            return written
        last = list(last_tensors(net))
        written = write_changed(self.file, values, last, out, output=net.output_name, classes=self.classes)
        rest = [shape_free_sha256(path, written.moved, last, net.output_name) for path in (self.file, out)]
        if rest[0] != rest[1]:
            raise ProofError(f"{self.file}: more than weights and the shape of its output would differ in its copy")
        return written

    def _outside(self, written: Written) -> dict[str, Any]:
        """Figures of the proof of bytes."""
        outside = "equal" if self.classes is None else "equal but for the shape of the output"
        return {"outside": outside, "untrained": "equal", "moved": len(written.moved), "kept": len(written.kept)}

    def _open(self, path: Path) -> OnnxNet:
        return open_onnx(path, self.size, output=self.output)

    def _refuse_lossy(self, untrained: OnnxNet) -> None:
        """Raise FgvcError where the untrained net is not written back bit for bit."""
        values = {name: value.numpy() for name, value in untrained.stored()}
        same = write_into(self.file, values, self.scratch / "same" / self.file.name)
        pairs = [(same.path, self.file), *((same.path.with_name(name), self.file.with_name(name)) for name in same.files)]
        if wrong := [theirs for ours, theirs in pairs if ours.read_bytes() != theirs.read_bytes()]:
            raise FgvcError(f"{wrong[0]}: its weights are not written back as they were read: fgvc can't write this file")

    def _record(self, written: Written, net: OnnxNet) -> dict[str, Any]:
        """The record by which `fgvc verify` repeats the proof of bytes, from the bundle alone or with the deployed file."""
        files = [self.file, *(self.file.with_name(name) for name in written.files)]
        last = [] if self.classes is None else list(last_tensors(net))
        outside = skeleton(self.file, written.moved, parsed=written.reencoded)
        if last:
            outside = shape_free_sha256(self.file, written.moved, last, net.output_name)
        return {
            "file": {
                "name": self.file.name,
                "sha256": {path.name: file_sha256(path) for path in files},
                "skeleton_sha256": skeleton(self.file),
                "outside_sha256": outside,
            },
            **({"last": last} if last else {}),
            "reencoded": written.reencoded,
            "moved": list(written.moved),
            "kept": list(written.kept),
            "untrained": net.untouched,
            "external": list(written.files),
            "input": {"layout": net.layout, "dtype": net.dtype, "size": list(net.size), "batch": net.batch},
            "output": {"name": net.output_name, "ending": net.ending},
        }


def compare_answers(
    session: OnnxSession, net: OnnxNet, images: Iterable[np.ndarray], *, bar: float = ONNX_TOLERANCE
) -> Behavioural:
    """Behavioural proof of a file against its net, on at most 256 images in batches (B,3,H,W) float32: differences over the
    largest answer."""
    worst, worst_batch, count = 0.0, None, 0
    others, layout = list[Disagreement](), memory_format(net)
    net = net.to(memory_format=layout)
    for batch in images:
        x = np.ascontiguousarray(batch, np.float32)[: MAX_IMAGES - count]
        with torch.inference_mode():
            expected = net.probabilities(net(torch.from_numpy(x).contiguous(memory_format=layout))).double().numpy()
        answers = session.scores(x)
        worst = float(np.maximum(worst, _relative(answers, expected)))  # NaN stays
        if net.batch is None and len(x) > 1 and worst_batch is None:
            alone = np.concatenate([session.scores(x[at : at + 1]) for at in range(min(8, len(x)))])
            worst_batch = _relative(alone, session.scores(x[:8]))
        others += differing_rows(answers, expected, count, bar=bar * float(np.abs(expected).max()))
        count += len(x)
        if count >= MAX_IMAGES:
            break
    return Behavioural(images=count, worst=worst, worst_batch=worst_batch, disagreements=tuple(others), bar=bar)


def _relative(ours: NDArray[np.floating], theirs: NDArray[np.floating]) -> float:
    return float(np.abs(ours - theirs).max() / max(float(np.abs(theirs).max()), 1e-30))


def _is_half(path: Path, net: OnnxNet) -> bool:
    tensors = stored_tensors(load_model(path))
    return net.dtype == "float16" or any(tensors[name].data_type in HALVES for name in net.slots)


def as_plain(path: Path, net: OnnxNet) -> Plain:
    """A file as quantisation takes it: whole, with weights as initializers, and which of these are weights of the net."""
    proto = onnx.load(str(path))
    constants = [node for node in proto.graph.node if node.op_type == "Constant" and node.output[0] in net.movable]
    for node in constants:
        tensor = next(attribute.t for attribute in node.attribute if attribute.name == "value")
        tensor.name = node.output[0]
        proto.graph.initializer.append(tensor)
        proto.graph.node.remove(node)
    initializers = canonicalise(proto, weights=()).initializers
    weights = frozenset(at for at, stored in enumerate(initializers) if stored.stored_name in net.movable)
    return Plain(proto, weights, net.size)


def _explain(
    session: OnnxSession, path: Path, net: OnnxNet, x: np.ndarray, scratch: Path, *, bar: float
) -> tuple[bytes | None, str, tuple[str, ...]]:
    """explain.onnx: the written file, which `session` runs, with a few more nodes, for class maps; or None and why, with a
    warning."""
    linear, reason = closed_form(net, net.size)
    if linear is None:
        return None, reason, ()
    try:
        model = _with_maps(path, net)
        scratch.mkdir(parents=True, exist_ok=True)
        for name in external_files(model):
            (scratch / name).write_bytes(path.with_name(name).read_bytes())
        out = scratch / path.name
        out.write_bytes(model.SerializeToString(deterministic=True))
        answers, *_, maps = OnnxSession(out, output=net.output_name).infer(feed(x, net.file))
        if not _relative(answers.reshape(len(x), -1), session.scores(x)) <= bar:
            raise FgvcError("it gives other answers than model.onnx")
        _refuse_other_maps(maps, net, x, bar=bar)
    except FgvcError as error:
        reason = f"can't be made: {str(error).partition(chr(10))[0]}"
        return None, reason, (f"the bundle has no explain.onnx, which {reason}",)
    return out.read_bytes(), reason, ()


def _with_maps(path: Path, net: OnnxNet) -> onnx.ModelProto:
    """The file with class maps (B,K,h,w) as its second output: the last features through the classifier as a convolution."""
    model = load_model(path)
    graph = model.graph
    weights = [(name, slot) for name, slots in net.slots.items() for slot in slots if slot.target == "classifier.weight"]
    if not weights:
        raise FgvcError("the weight of its last layer is computed in the graph")
    name, slot = weights[0]
    with torch.no_grad():
        features = net.forward_features(torch.zeros(1, 3, *net.size))
    layout = feature_layout(net, features)
    if layout == "tokens":
        raise FgvcError("its features are tokens")
    if slot.joined is not None:
        raise FgvcError("its last layer is the mean of two of the file's")
    nodes: list[onnx.NodeProto] = []

    def add(operator: str, inputs: list[str], **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [f"{MAPS}/{len(nodes)}"], name=f"/{MAPS}/{len(nodes)}", **attributes))
        return str(nodes[-1].output[0])

    def shaped(tensor: str, shape: tuple[int, ...]) -> str:
        stored = numpy_helper.from_array(np.array(shape, np.int64), f"{MAPS}/shape{len(nodes)}")
        graph.initializer.append(stored)
        return add("Reshape", [tensor, stored.name])

    kernel = name
    for view in slot.views:
        permuted = view.kind == "permute"
        kernel = add("Transpose", [kernel], perm=list(view.argument)) if permuted else shaped(kernel, view.argument)
    kernel = shaped(kernel, (net.num_classes, net.num_features, 1, 1))
    place = net.features_name if layout == "NCHW" else add("Transpose", [net.features_name], perm=[0, 3, 1, 2])
    nodes.append(helper.make_node("Conv", [place, kernel], [MAPS], name=f"/{MAPS}"))
    graph.node.extend(nodes)
    kind = stored_tensors(model)[name].data_type
    shape = (net.batch, net.num_classes, *features.shape[-2:])
    graph.output.append(helper.make_tensor_value_info(MAPS, kind, shape))
    return model


def _refuse_other_maps(maps: NDArray[np.floating], net: OnnxNet, x: np.ndarray, *, bar: float) -> None:
    with torch.inference_mode():
        logits = net(torch.from_numpy(x)).double().numpy()
    bias = 0 if net.classifier.bias is None else net.classifier.bias.detach().numpy()
    if not _relative(maps.mean((2, 3)) + bias, logits) <= 10 * bar:
        raise FgvcError("its class activation maps do not add up to its logits")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class WrittenComparison(Display):
    """A file beside the deployed one that it was written into."""

    candidate: Path
    into: Path
    differences: tuple[str, ...]  # but for weights
    moved: tuple[str, ...]  # weights whose values differ

    @property
    def passed(self) -> bool:
        return not self.differences

    @property
    def facts(self) -> Mapping[str, object]:
        verdict = f"{len(self.moved)} payloads of weights differ, and nothing else" if self.passed else "NOT one graph"
        return {"": self.candidate, "in": self.into, "verdict": verdict}


def compare_written(
    candidate: Path, into: Path, *, size: tuple[int, int] | None = None, output: str | None = None
) -> WrittenComparison:
    """Compare two .onnx files (or a bundle's) byte by byte: whether weights alone differ, which are what training would move.

    `size`: height and width, where the deployed file leaves them open (by default OPEN: weights do not depend on it); `output`:
    which of several has the classes. Raises FgvcError where one is no classifier's file that can be read."""
    ours, theirs = (path / "model.onnx" if path.is_dir() else path for path in (candidate, into))
    load_model(ours)
    description = describe(theirs, output=output)
    size = None if description.height and description.width else (size or OPEN)
    weights = open_onnx(theirs, size, output=output).movable
    differences = differences_outside(ours, theirs, weights)
    return WrittenComparison(
        candidate=candidate, into=into, differences=tuple(differences),
        moved=() if differences else moved_between(ours, theirs),
    )  # fmt: skip
