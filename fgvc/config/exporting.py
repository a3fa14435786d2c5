"""Settings of the exported file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from fgvc.config.section import Section
from fgvc.errors import FgvcError

Exporter = Literal["dynamo", "torchscript"]
BatchNorm = Literal["fold", "keep"]
OPSETS: Mapping[Exporter, range] = {"dynamo": range(18, 27), "torchscript": range(7, 24)}  # that each of torch's writes


class Export(Section):
    """Export of the ONNX file. All settings change the graph, so they are recorded in the contract."""

    exporter: Exporter = Field("dynamo", description="torch's: dynamo (by torch.export) | torchscript (the older one)")
    opset: int = Field(
        20, ge=11, le=26, description="version of ONNX's operator set; 18 or newer for dynamo, up to 23 for torchscript"
    )
    batch_norm: BatchNorm = Field(
        "fold", description="batch norms behind convolutions: fold, into them | keep, as nodes of their own"
    )


def refuse_opset(exporter: Exporter, opset: int) -> None:
    """Raise FgvcError where this exporter does not write that opset; call it before the long work."""
    if opset not in (opsets := OPSETS[exporter]):
        raise FgvcError(
            f"export.opset={opset}: torch's {exporter} exporter writes opset {opsets[0]} to {opsets[-1]}; "
            + another_exporter(exporter, opset)
        )


def another_exporter(exporter: Exporter, opset: int) -> str:
    """Advice on the other exporter, for an opset or a net that this one does not write."""
    other: Exporter = "torchscript" if exporter == "dynamo" else "dynamo"
    near = min(OPSETS[other], key=lambda candidate: abs(candidate - opset))
    with_opset = "" if near == opset else f" and export.opset={near}"
    also = "" if near == opset else f" --opset {near}"
    return f"set export.exporter={other}{with_opset}; of a run that is there, fgvc export --exporter {other}{also}"
