"""timm nets and the files that torch writes of them, norms kept and folded."""

from __future__ import annotations

import warnings
from pathlib import Path

import timm
import torch
from torch import nn

from tests.trained import Once

PIXELS, CLASSES = 64, 5
EXPORTS = {
    "folded": {},
    "kept": {"do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE},
}


def twin(name: str) -> nn.Module:
    """A timm net of random weights, whose norms do something; no two tensors are equal, which torch would store once."""
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=CLASSES).eval()
    with torch.no_grad():
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                assert norm.running_mean is not None
                assert norm.running_var is not None
                norm.running_mean.normal_(0, 0.1)
                norm.running_var.uniform_(0.5, 1.5)
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0, 0.1)
            elif isinstance(norm, nn.Conv2d | nn.Linear) and norm.bias is not None:
                norm.bias.normal_(0, 0.1)
    return net


def exported(once: Once, name: str, kind: str) -> Path:
    """The file of `twin(name)`; of this process's own if that is asked for first."""

    def export(folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                twin(name), (torch.randn(1, 3, PIXELS, PIXELS),), str(folder / "net.onnx"), dynamo=False, opset_version=13,
                input_names=["image"], dynamic_axes={"image": {0: "n"}}, **EXPORTS[kind],
            )  # type: ignore[call-overload]  # fmt: skip

    return once.made(f"twins/{name}-{kind}", export) / "net.onnx"
