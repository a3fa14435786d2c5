"""Export with proof (docs/design.md): where one of the three fails, nothing is exported."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import torch
from torch import nn

from fgvc import __version__
from fgvc.config.exporting import Export, Exporter
from fgvc.errors import FgvcError, ProofError
from fgvc.exporting.difference import notes
from fgvc.exporting.fit import Fit, fit
from fgvc.exporting.into import Written
from fgvc.exporting.onnx import ExplainNet, Interface, explain_model, export_onnx, serialised
from fgvc.exporting.proofs import (
    ONNX_TOLERANCE,
    Behavioural,
    Numeric,
    Structural,
    compare_behaviour,
    compare_numbers,
    compare_structure,
    largest_error,
    peek,
)
from fgvc.exporting.reference import Plain, cached_plain, versions
from fgvc.exporting.spelling import CANONICAL
from fgvc.exporting.ties import nudged
from fgvc.models.backbone import deployed
from fgvc.reparam.plain import strip
from fgvc.runtime.engine import OnnxSession


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvedExport:
    """An export that passed all proofs. `contract` is the content of contract.json."""

    model: bytes = field(repr=False)
    explain: bytes | None = field(repr=False)
    contract: Mapping[str, Any] = field(repr=False)
    numeric: Numeric
    structural: Structural | None  # None: the proof is of bytes
    behavioural: Behavioural
    warnings: tuple[str, ...]
    # The graph that was exported, and the independent plain model's, or the deployed file's.
    plain: tuple[Plain, Plain] = field(repr=False)
    written: Written | None = None  # into a deployed file
    data: Mapping[str, bytes] = field(default_factory=dict, repr=False)  # files with its weights, beside it
    runnable: Path | None = None  # the model on the disk, with its data; None: `model` is whole

    @property
    def divided_by(self) -> float:
        """The temperature that is in the last layer of a deployed file; 1: none is."""
        return float(self.contract.get("temperature", {}).get("divided_by", 1.0))

    @property
    def source(self) -> bytes | Path:
        """The model as onnxruntime loads it: its bytes, or the path of a file with external data."""
        return self.model if self.runnable is None else self.runnable


class Contract(Protocol):
    """Definition of what a run ships, with its proof."""

    def prove(self, net: nn.Module, images: Iterable[np.ndarray]) -> ProvedExport:
        """Export the trained `net` (its replaced modules still in it) and prove it. `images`: batches (B,3,H,W) float32 of real
        images, of which the first 256 images are used. Raises ProofError at the first proof that fails, with all differences."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainBackbone:
    """Contract of a run of `model.backbone`: it ships timm's plain net of that name, freshly exported."""

    backbone: str
    num_classes: int
    kwargs: Mapping[str, Any]
    size: tuple[int, int]  # height, width of the images
    export: Export
    against: Path | None = None  # a deployed file, whose I/O names, axes, opset and exporter it has, and whose graph

    def prove(self, net: nn.Module, images: Iterable[np.ndarray]) -> ProvedExport:
        """Strip and fold the trained `net`, export it and prove it: see `Contract`."""
        trained = copy.deepcopy(net).cpu().eval()
        recipe: dict[str, Any] = {"backbone": self.backbone, "num_classes": self.num_classes, "kwargs": dict(self.kwargs)}
        plain, exact = (strip(trained, **recipe, dtype=dtype) for dtype in (torch.float32, torch.float64))
        sample, images = peek(images)
        fitted = self._fit(plain)
        interface, exporter = fitted.interface, fitted.exporter
        with ThreadPoolExecutor(1) as pool:  # the independent model is exported meanwhile, in its own process
            future = pool.submit(cached_plain, **recipe, interface=interface, exporter=exporter)
            exported = _export(plain, sample, interface=interface, exporter=exporter)
            reference, positions, origin = future.result()
        structural = compare_structure(exported.proto, reference, positions)
        ties: tuple[str, ...] = ()
        if not structural.passed:
            against_plain = (structural, reference, positions)
            plain, structural, ties = untie(plain, *against_plain, interface=interface, exporter=exporter)
            exported = _export(plain, sample, interface=interface, exporter=exporter)
        proto, shipped = exported.proto, exported.shipped
        numeric = compare_numbers(trained.double(), deployed(exact), shipped, sample)
        if not numeric.passed:
            raise ProofError(numeric.failure)
        behavioural = compare_behaviour(serialised(proto), shipped, images)
        if not behavioural.passed:
            raise ProofError(behavioural.failure)
        contract = {
            "fgvc": __version__,
            "versions": versions(),
            **recipe,
            "exporter": exporter,
            "interface": asdict(replace(interface, ir_version=proto.ir_version)),
            "canonical": CANONICAL,
            "sha256": structural.sha256,
            "verdict": fitted.verdict,
            "spelling": dict(fitted.spelling),
            "reference": origin,
            "weights": sorted(positions),
            "proofs": _figures(numeric, behavioural, proto),
            "ties_broken": list(ties),
            "explain": exported.reason,
            "against": hashlib.sha256(self.against.read_bytes()).hexdigest() if self.against else None,
        }
        warnings = (*(notes(proto, fitted.target) if fitted.target is not None else ()), *_tie_warnings(ties), *exported.warnings)
        return ProvedExport(
            model=serialised(proto), explain=exported.explain, contract=contract, numeric=numeric, structural=structural,
            behavioural=behavioural, warnings=warnings,
            plain=(Plain(proto, positions, interface.size), Plain(reference, positions, interface.size)),
        )  # fmt: skip

    def _fit(self, plain: nn.Module) -> Fit:
        if self.against is not None:
            return fit(plain, self.against, size=self.size, num_classes=self.num_classes)
        return Fit(interface=Interface.of(self.export, self.size), exporter=self.export.exporter)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Exported:
    shipped: nn.Module  # what `proto` was exported from
    proto: onnx.ModelProto
    explain: bytes | None
    reason: str  # why there is an explain.onnx, or none
    warnings: tuple[str, ...] = ()


def _export(plain: nn.Module, x: np.ndarray, *, interface: Interface, exporter: Exporter) -> _Exported:
    """Export model.onnx and, as a by-product, explain.onnx: where that can't be made there is none, and `reason` says why."""
    shipped = deployed(plain)
    proto = export_onnx(shipped, exporter=exporter, **asdict(interface))
    model, reason = explain_model(shipped, size=interface.size)
    if model is None:
        return _Exported(shipped=shipped, proto=proto, explain=None, reason=reason)
    try:
        explain = _explain(model, proto, x, interface=interface, exporter=exporter)
    except FgvcError as error:
        reason = f"can't be made: {str(error).partition(chr(10))[0]}"
        warning = f"the bundle has no explain.onnx, which {reason}"
        return _Exported(shipped=shipped, proto=proto, explain=None, reason=reason, warnings=(warning,))
    return _Exported(shipped=shipped, proto=proto, explain=explain, reason=reason)


def _explain(
    model: ExplainNet, proto: onnx.ModelProto, x: np.ndarray, *, interface: Interface, exporter: Exporter
) -> bytes:
    """Export explain.onnx. Raises FgvcError where its logits are not those of `proto`, or its maps do not add up to them."""
    names = (*interface.output_names, "maps")
    explain = serialised(export_onnx(model, exporter=exporter, **asdict(replace(interface, output_names=names))))
    logits, *_, maps = OnnxSession(explain, output=names[0]).run(x)
    if not largest_error(logits, OnnxSession(serialised(proto), output=names[0]).logits(x)) <= ONNX_TOLERANCE:
        raise FgvcError("it gives other logits than model.onnx")
    whole = maps.mean((2, 3)) + (0 if model.bias is None else model.bias.numpy())
    if not largest_error(whole, logits) <= 10 * ONNX_TOLERANCE:
        raise FgvcError("its class activation maps do not add up to its logits")
    return explain


def untie(
    plain: nn.Module,
    structural: Structural,
    reference: onnx.ModelProto,
    positions: frozenset[int],
    *,
    interface: Interface,
    exporter: Exporter,
) -> tuple[nn.Module, Structural, tuple[str, ...]]:
    """Plain model whose dead channels are made distinct, its structure, which is the independent one's, and what was moved.

    Raises ProofError with the differences in `structural` where that does not help.
    """
    for strength in (1, 64):  # the second is for rules with a tolerance: multiplying by 1.0000001 is dropped too
        moved, ties = nudged(plain, strength=strength)
        if not ties:
            break
        proto = export_onnx(deployed(moved), exporter=exporter, **asdict(interface))
        again = compare_structure(proto, reference, positions)
        if again.passed:
            return moved, again, ties
    lines = [str(difference) for difference in structural.differences]
    lines += [f"because of equal or zero weights, {merged}" for merged in structural.merged]
    raise ProofError("the export is not the graph of the independent plain model:\n  " + "\n  ".join(lines))


def _figures(numeric: Numeric, behavioural: Behavioural, proto: onnx.ModelProto) -> dict[str, Any]:
    return {
        "numeric": asdict(numeric),
        "structural": {"equal": True, "nodes": len(proto.graph.node), "initializers": len(proto.graph.initializer)},
        "behavioural": asdict(behavioural),
    }


def _tie_warnings(ties: tuple[str, ...]) -> tuple[str, ...]:
    if not ties:
        return ()
    listed = ", ".join(ties[:3]) + (", ..." if len(ties) > 3 else "")
    return (f"dead channels: one value in each of {len(ties)} tensors was moved by about one last place ({listed})",)
