"""Export with proof: numeric, structural, behavioural (docs/design.md). Where one fails, no bundle is written."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from fgvc import __version__
from fgvc.config.exporting import Export, Exporter
from fgvc.errors import FgvcError
from fgvc.exporting.canonical import Merged, canonicalise, shared_initializers
from fgvc.exporting.difference import Difference, compare_graphs, notes
from fgvc.exporting.onnx import ExplainNet, Interface, explain_model, export_onnx, interface_of, load_onnx, serialised
from fgvc.exporting.reference import Plain, cached_plain, versions
from fgvc.exporting.ties import nudged
from fgvc.models.backbone import deployed, memory_format
from fgvc.reparam.plain import strip
from fgvc.runtime.engine import Session

FOLD_TOLERANCE = 1e-9  # float64, relative to max |logit|
SHIPPED_TOLERANCE = 1e-4  # float32, relative to max |logit|
ONNX_TOLERANCE = 1e-4  # per logit, relative to max(1, |logit|)
BATCH_TOLERANCE = 1e-5
MAX_IMAGES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Numeric:
    """The trained net with its branches, in float64, against the plain one: max |difference| / max |logit|."""

    folded_float64: float
    shipped_float32: float
    images: int

    @property
    def passed(self) -> bool:
        return self.folded_float64 <= FOLD_TOLERANCE and self.shipped_float32 <= SHIPPED_TOLERANCE


@dataclass(frozen=True, slots=True, kw_only=True)
class Structural:
    """The canonical hash against the independent plain model's, and where the two graphs part."""

    sha256: str
    reference_sha256: str
    differences: tuple[Difference, ...] = ()
    merged: tuple[Merged, ...] = ()  # what the exporter merged or dropped because of equal or zero weights

    @property
    def passed(self) -> bool:
        return self.sha256 == self.reference_sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """An image for which onnxruntime and torch name different classes."""

    image: int
    torch_class: int
    onnx_class: int
    margin: float  # between torch's two best logits
    excused: bool  # the margin is within twice the tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class Behavioural:
    """onnxruntime against torch on real images. `worst`: max |difference| / max(1, |logit|)."""

    images: int
    worst: float
    worst_batch: float | None  # the same, batch 1 against batch 8; None where the batch is fixed or there is one image
    disagreements: tuple[Disagreement, ...]

    @property
    def passed(self) -> bool:
        batches = self.worst_batch is None or self.worst_batch <= BATCH_TOLERANCE
        return batches and self.worst <= ONNX_TOLERANCE and all(d.excused for d in self.disagreements)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvedExport:
    """An export that passed. `contract` is what contract.json says."""

    model: bytes
    explain: bytes | None
    contract: Mapping[str, Any]
    numeric: Numeric
    structural: Structural
    behavioural: Behavioural
    warnings: tuple[str, ...]
    plain: tuple[Plain, Plain]  # the graph that was exported, and the independent plain model's


def prove(
    net: nn.Module,
    images: Iterable[np.ndarray],
    *,
    backbone: str,
    num_classes: int,
    kwargs: Mapping[str, Any],
    size: tuple[int, int],
    export: Export,
    against: Path | None = None,
) -> ProvedExport:
    """Strip and fold the trained `net` (its replaced modules still in it), export it and prove it.

    `images`: batches (B,3,H,W) float32 of real images, of which the first 256 images are used.
    `against`: a deployed ONNX file, from which I/O names, axes, opset and exporter come, and with which the result
    must agree. Raises FgvcError at the first proof that fails, with all that it found.
    """
    trained = copy.deepcopy(net).cpu().eval()
    recipe: dict[str, Any] = {"backbone": backbone, "num_classes": num_classes, "kwargs": dict(kwargs)}
    plain, exact = (strip(trained, **recipe, dtype=dtype) for dtype in (torch.float32, torch.float64))
    sample, images = _peek(images)
    target, interface, exporter = _shape_of(plain, against, size=size, num_classes=num_classes, export=export)
    with ThreadPoolExecutor(1) as pool:  # the independent model is made meanwhile, in its own process
        future = pool.submit(cached_plain, **recipe, interface=interface, exporter=exporter)
        made = _make(plain, sample, interface=interface, exporter=exporter)
        reference, positions, made_when = future.result()
    structural = compare_structure(made.proto, reference, positions)
    ties: tuple[str, ...] = ()
    if not structural.passed:
        against_plain = (structural, reference, positions)
        plain, structural, ties = untie(plain, *against_plain, interface=interface, exporter=exporter)
        made = _make(plain, sample, interface=interface, exporter=exporter)
    proto, shipped = made.proto, made.shipped
    numeric = compare_numbers(trained.double(), deployed(exact), shipped, sample)
    if not numeric.passed:
        raise FgvcError(_misfolded(numeric))
    behavioural = compare_behaviour(serialised(proto), shipped, images)
    if not behavioural.passed:
        raise FgvcError(_misbehaviour(behavioural))
    contract = {
        "fgvc": __version__,
        "versions": versions(),
        **recipe,
        "exporter": exporter,
        "interface": asdict(replace(interface, ir_version=proto.ir_version)),
        "sha256": structural.sha256,
        "reference": made_when,
        "weights": sorted(positions),
        "proofs": _figures(numeric, behavioural, proto),
        "ties_broken": list(ties),
        "explain": made.reason,
        "against": hashlib.sha256(against.read_bytes()).hexdigest() if against else None,
    }
    said = [*(notes(proto, target) if target is not None else ()), *_about(ties), *made.warnings]
    return ProvedExport(
        model=serialised(proto), explain=made.explain, contract=contract, numeric=numeric, structural=structural,
        behavioural=behavioural, warnings=tuple(said),
        plain=(Plain(proto, positions, interface.size), Plain(reference, positions, interface.size)),
    )  # fmt: skip


def compare_numbers(trained: nn.Module, exact: nn.Module, shipped: nn.Module, x: np.ndarray) -> Numeric:
    """Level 1. `trained` and `exact` are float64, `shipped` float32, all in eval mode; x (B,3,H,W) float32."""
    images = torch.from_numpy(x)
    threads = torch.get_num_threads()
    # torch splits a grouped float64 convolution into one small job a group: with threads lite0 takes 20 s, not 0.4.
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            z = trained(images.double())
            scale = float(z.abs().max().clamp_min(1e-30))
            folded = float((exact(images.double()) - z).abs().max()) / scale
            float32 = float((shipped(images).double() - z).abs().max()) / scale
    finally:
        torch.set_num_threads(threads)
    return Numeric(folded_float64=folded, shipped_float32=float32, images=len(x))


def compare_structure(candidate: onnx.ModelProto, reference: onnx.ModelProto, positions: frozenset[int]) -> Structural:
    """Level 2."""
    ours, theirs = (canonicalise(model, weights=positions) for model in (candidate, reference))
    if ours.sha256 == theirs.sha256:
        return Structural(sha256=ours.sha256, reference_sha256=theirs.sha256)
    # Where positions have shifted they point at other tensors: to say what differs, all weights are left out.
    blank, plain = (canonicalise(model, weights=None) for model in (candidate, reference))
    return Structural(
        sha256=ours.sha256,
        reference_sha256=theirs.sha256,
        differences=tuple(compare_graphs(blank, plain) or compare_graphs(ours, theirs)),
        merged=tuple(shared_initializers(blank, plain)),
    )


def compare_behaviour(model: bytes, shipped: nn.Module, images: Iterable[np.ndarray]) -> Behavioural:
    """Level 3, on at most 256 images in batches (B,3,H,W) float32."""
    session = Session(model, threads=torch.get_num_threads())
    layout = memory_format(shipped)  # twice as fast for depthwise convolutions
    shipped = copy.deepcopy(shipped).to(memory_format=layout)
    seen, worst, found = 0, 0.0, list[Disagreement]()
    worst_batch: float | None = None
    for batch in images:
        x = np.ascontiguousarray(batch[: MAX_IMAGES - seen], dtype=np.float32)
        with torch.no_grad():
            z = shipped(torch.from_numpy(x).contiguous(memory_format=layout)).numpy()
        said = session.logits(x)
        worst = float(np.maximum(worst, _apart(said, z)))  # unlike max(), never loses a NaN
        found += _disagreements(said, z, seen)
        if session.shape[0] is None and len(x) > 1 and worst_batch is None:
            together = session.logits(x[:8])
            alone = np.concatenate([session.logits(x[k : k + 1]) for k in range(len(together))])
            worst_batch = _apart(alone, together)
        seen += len(x)
        if seen >= MAX_IMAGES:
            break
    return Behavioural(images=seen, worst=worst, worst_batch=worst_batch, disagreements=tuple(found))


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    return float((np.abs(a.astype(np.float64) - b) / np.maximum(1.0, np.abs(b))).max())


def _disagreements(said: np.ndarray, z: np.ndarray, first: int) -> Iterator[Disagreement]:
    for row in np.flatnonzero(said.argmax(1) != z.argmax(1)):
        second, best = np.sort(z[row].astype(np.float64))[-2:]
        margin = best - second
        yield Disagreement(
            image=first + int(row),
            torch_class=int(z[row].argmax()),
            onnx_class=int(said[row].argmax()),
            margin=float(margin),
            excused=bool(margin <= 2 * ONNX_TOLERANCE * max(1.0, abs(best))),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    shipped: nn.Module  # what `proto` was exported from
    proto: onnx.ModelProto
    explain: bytes | None
    reason: str  # why there is an explain.onnx, or none
    warnings: tuple[str, ...] = ()


def _make(plain: nn.Module, x: np.ndarray, *, interface: Interface, exporter: Exporter) -> _Made:
    """The two files. The second is a by-product: where it can't be made there is none, and that is said."""
    shipped = deployed(plain)
    proto = export_onnx(shipped, exporter=exporter, **asdict(interface))
    model, reason = explain_model(shipped, size=interface.size)
    if model is None:
        return _Made(shipped=shipped, proto=proto, explain=None, reason=reason)
    try:
        explain = _explain(model, proto, x, interface=interface, exporter=exporter)
    except FgvcError as error:
        reason = f"can't be made: {str(error).partition(chr(10))[0]}"
        warning = f"the bundle has no explain.onnx, which {reason}"
        return _Made(shipped=shipped, proto=proto, explain=None, reason=reason, warnings=(warning,))
    return _Made(shipped=shipped, proto=proto, explain=explain, reason=reason)


def _explain(
    model: ExplainNet, proto: onnx.ModelProto, x: np.ndarray, *, interface: Interface, exporter: Exporter
) -> bytes:
    """`explain.onnx`. Raises FgvcError where it does not give the logits of `proto`, or its maps do not add up to them."""
    names = (*interface.output_names, "maps")
    explain = serialised(export_onnx(model, exporter=exporter, **asdict(replace(interface, output_names=names))))
    logits, maps = Session(explain).run(x)
    if not _apart(logits, Session(serialised(proto)).logits(x)) <= ONNX_TOLERANCE:
        raise FgvcError("it gives other logits than model.onnx")
    whole = maps.mean((2, 3)) + (0 if model.bias is None else model.bias.numpy())
    if not _apart(whole, logits) <= 10 * ONNX_TOLERANCE:
        raise FgvcError("its class activation maps do not add up to its logits")
    return explain


def untie(
    plain: nn.Module,
    found: Structural,
    reference: onnx.ModelProto,
    positions: frozenset[int],
    *,
    interface: Interface,
    exporter: Exporter,
) -> tuple[nn.Module, Structural, tuple[str, ...]]:
    """The plain model with its dead channels told apart, its structure now the independent one's, and what was moved.

    Raises FgvcError with the differences first found where that does not help.
    """
    for strength in (1, 64):  # the second is for rules with a tolerance: multiplying by 1.0000001 is dropped too
        moved, ties = nudged(plain, strength=strength)
        if not ties:
            break
        proto = export_onnx(deployed(moved), exporter=exporter, **asdict(interface))
        again = compare_structure(proto, reference, positions)
        if again.passed:
            return moved, again, ties
    lines = [str(difference) for difference in found.differences]
    lines += [f"because of equal or zero weights, {merged}" for merged in found.merged]
    raise FgvcError("the export is not the graph of the independent plain model:\n  " + "\n  ".join(lines))


def _shape_of(
    plain: nn.Module, against: Path | None, *, size: tuple[int, int], num_classes: int, export: Export
) -> tuple[onnx.ModelProto | None, Interface, Exporter]:
    """What the export is to look like: the deployed file, its interface and exporter, or what the recipe says."""
    if against is None:
        return None, Interface(size=size, opset=export.opset), export.exporter
    target, where = load_onnx(against), str(against)
    interface, exporters = _interface_against(target, where, size=size, num_classes=num_classes)
    return target, interface, _exporter_against(plain, target, where, interface=interface, exporters=exporters)


def _interface_against(
    target: onnx.ModelProto, where: str, *, size: tuple[int, int], num_classes: int
) -> tuple[Interface, tuple[Exporter, ...]]:
    interface, classes, exporters = interface_of(target, where=where)
    height, width = (have or want for have, want in zip(interface.size, size, strict=True))  # 0: dynamic
    if (height, width) != size:
        recipe = f"{size[0]}x{size[1]}"
        raise FgvcError(f"{where} takes images of {height}x{width}, the recipe's are {recipe}; set image.size")
    if classes != num_classes:
        raise FgvcError(f"{where} has {classes} classes, the recipe's data has {num_classes}")
    return replace(interface, size=size), exporters


def _exporter_against(
    plain: nn.Module, target: onnx.ModelProto, where: str, *, interface: Interface, exporters: tuple[Exporter, ...]
) -> Exporter:
    """The exporter whose graph is the deployed one. Raises FgvcError with the shortest list of differences."""
    wanted = canonicalise(target, weights=None)
    accounts: list[tuple[Exporter, list[Difference]]] = []
    failed: list[str] = []
    for exporter in exporters:
        # Ties would look like differences here, so they are broken first; what ships is judged by _structural.
        try:
            proto = export_onnx(deployed(nudged(plain)[0]), exporter=exporter, **asdict(interface))
        except FgvcError as error:  # the other may be the one that made the file
            failed.append(str(error).partition("\n")[0])
            continue
        found = compare_graphs(canonicalise(proto, weights=None), wanted)
        if not found:
            return exporter
        accounts.append((exporter, found))
    if not accounts:
        reasons = failed or [f"torch {versions()['torch']} does not write opset {interface.opset}"]
        raise FgvcError(f"no drop-in of {where} can be made:\n  " + "\n  ".join(reasons))
    exporter, found = min(accounts, key=lambda account: len(account[1]))
    raise FgvcError(
        f"the export is no drop-in replacement of {where}; nearest with the {exporter} exporter of torch "
        f"{versions()['torch']}:\n  " + "\n  ".join(map(str, found))
    )


def _peek(images: Iterable[np.ndarray]) -> tuple[np.ndarray, Iterable[np.ndarray]]:
    """Up to 8 images of the first batch, and all batches."""
    batches = iter(images)
    first = next((batch for batch in batches if len(batch)), None)
    if first is None:
        raise FgvcError("no images to prove the export on: give it validation or training images")
    first = np.ascontiguousarray(first, dtype=np.float32)
    return first[:8], chain([first], batches)


def _figures(numeric: Numeric, behavioural: Behavioural, proto: onnx.ModelProto) -> dict[str, Any]:
    return {
        "numeric": asdict(numeric),
        "structural": {"equal": True, "nodes": len(proto.graph.node), "initializers": len(proto.graph.initializer)},
        "behavioural": asdict(behavioural),
    }


def _about(ties: tuple[str, ...]) -> tuple[str, ...]:
    if not ties:
        return ()
    listed = ", ".join(ties[:3]) + (", ..." if len(ties) > 3 else "")
    return (f"dead channels: one value in each of {len(ties)} tensors was moved by about one last place ({listed})",)


def _misfolded(numeric: Numeric) -> str:
    return (
        "the plain network does not compute what the trained one does: relative to max |logit| the folded state "
        f"differs by {numeric.folded_float64:.2g} in float64 (at most {FOLD_TOLERANCE:g}) and by "
        f"{numeric.shipped_float32:.2g} as shipped (at most {SHIPPED_TOLERANCE:g}). Something that acts in eval mode "
        "was not folded, or the weights are far out of scale"
    )


def _misbehaviour(behavioural: Behavioural) -> str:
    lines = [
        f"onnxruntime does not compute what torch does: the logits of {behavioural.images} images differ by up to "
        f"{behavioural.worst:.2g} of max(1, |logit|) (at most {ONNX_TOLERANCE:g})"
    ]
    if behavioural.worst_batch is not None:
        lines.append(f"batch 1 and batch 8 differ by {behavioural.worst_batch:.2g} (at most {BATCH_TOLERANCE:g})")
    lines += [
        f"image {d.image}: class {d.onnx_class} in onnxruntime, {d.torch_class} in torch, by a margin of {d.margin:.2g}"
        for d in behavioural.disagreements
        if not d.excused
    ][:10]
    return "\n  ".join(lines)
