"""The whole chain on real backbones with both exporters: `make test-all`.

Each net is grafted with ACB where it can be, trained for a few steps on noise, then stripped, folded, exported and
proved against its independent plain model. With FGVC_WRITE_RESULTS set to a file, every row is appended to it as CSV.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fgvc.config.exporting import Export
from fgvc.errors import FgvcError
from fgvc.exporting.prove import PlainBackbone
from fgvc.models.backbone import plain_model
from fgvc.runs.step import StepModule
from fgvc.techniques.acb.settings import AcbSettings
from fgvc.techniques.api import Batch, Draws
from fgvc.techniques.registry import build_technique

SIZE, CLASSES = (64, 64), 10
COLUMNS = (
    "backbone,exporter,grafted,nodes,initializers,sha256,fold_float64,shipped_float32,onnx_torch,ties,explain,seconds"
)
BACKBONES = {
    "resnet18": {},
    "resnet50": {},
    "tf_efficientnet_lite0": {},
    "mobilenetv2_100": {},
    "mobilenetv3_small_100": {},
    "densenet121": {},
    "regnety_004": {},
    "repvgg_a0": {},
    "convnext_atto": {},
    "seresnet50": {},
    "resnet50d": {},
    "vit_tiny_patch16_224": {"img_size": 64},
}


def trained(backbone: str, kwargs: dict) -> tuple[torch.nn.Module, int]:
    """The net after a few steps, and how many of its convolutions were grafted."""
    torch.manual_seed(0)
    net = plain_model(backbone, CLASSES, kwargs)
    try:
        step = StepModule(net, {"acb": build_technique(AcbSettings())}, size=SIZE)
    except FgvcError:  # nothing to graft: a ViT, or a net that re-parameterises itself
        step = StepModule(plain_model(backbone, CLASSES, kwargs), {}, size=SIZE)
    step.train()
    optimizer = torch.optim.SGD(step.parameters(), lr=0.02, momentum=0.9)
    for _ in range(3):
        x, y = torch.randn(8, 3, *SIZE), torch.randint(0, CLASSES, (8,))
        losses, _ = step(Batch(x, [(y, None)], x, y, y, torch.zeros(8, 2, 3)), Draws(0.0))
        optimizer.zero_grad()
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(step.parameters(), 1.0)
        optimizer.step()
    grafted = sum(hasattr(module, "fold") for module in step.net.modules())
    return step.net.eval(), grafted


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_contract_holds(backbone: str, exporter: str) -> None:
    kwargs = BACKBONES[backbone]
    net, grafted = trained(backbone, kwargs)
    images = np.random.default_rng(0).normal(size=(16, 3, *SIZE)).astype(np.float32)
    started = time.monotonic()
    contract = PlainBackbone(
        backbone=backbone, num_classes=CLASSES, kwargs=kwargs, size=SIZE, export=Export(exporter=exporter)
    )
    proven = contract.prove(net, [images])
    seconds = time.monotonic() - started
    assert proven.numeric.passed
    assert proven.structural.passed
    assert proven.behavioural.passed
    structural = proven.contract["proofs"]["structural"]
    row = (
        f"{backbone},{exporter},{grafted},{structural['nodes']},{structural['initializers']},{proven.structural.sha256[:12]},"
        f"{proven.numeric.folded_float64:.0e},{proven.numeric.shipped_float32:.0e},{proven.behavioural.worst:.0e},"
        f"{len(proven.contract['ties_broken'])},{'yes' if proven.explain else 'no'},{seconds:.0f}"
    )
    if out := os.environ.get("FGVC_WRITE_RESULTS"):
        path = Path(out)
        new = not path.exists()
        with path.open("a", encoding="utf-8") as file:
            file.write((COLUMNS + "\n" if new else "") + row + "\n")
