"""Settings of the exported file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from fgvc.config.section import Section

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
