"""Backbones that timm itself re-parameterises: trained with their branches, shipped fused, on both sides of the comparison."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fgvc.config.exporting import Export
from fgvc.exporting.prove import PlainBackbone
from fgvc.exporting.reference import randomise
from fgvc.models.backbone import deployed, plain_model
from fgvc.models.norms import reestimate_norms
from fgvc.runs.step import StepModule
from fgvc.techniques.api import Batch, Draws

SIZE, CLASSES = (64, 64), 5


def convolutions(net: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in net.modules())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backbone", ["repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9"])
def test_trained_with_branches_and_shipped_without(backbone: str) -> None:
    torch.manual_seed(0)
    step = StepModule(plain_model(backbone, CLASSES), {}, size=SIZE).train()
    optimizer = torch.optim.SGD(step.parameters(), lr=0.02)
    x, y = torch.randn(8, 3, *SIZE), torch.randint(0, CLASSES, (8,))
    losses, _ = step(Batch(x, [(y, None)], x, y, y, torch.zeros(8, 2, 3)), Draws(0.0))
    losses["loss"].backward()
    nn.utils.clip_grad_norm_(step.parameters(), 1.0)
    optimizer.step()
    norms = [m for m in step.net.modules() if isinstance(m, _BatchNorm)]
    assert all(norm.num_batches_tracked == 1 for norm in norms)
    assert all(value.grad is not None and value.grad.isfinite().all() for value in step.net.parameters())
    # Statistics that still remember where they started let the logits of a MobileOne grow to 1e11.
    reestimate_norms(step.net, [x, torch.randn(8, 3, *SIZE)])

    images = np.random.default_rng(0).normal(size=(16, 3, *SIZE)).astype(np.float32)
    recipe = {"backbone": backbone, "num_classes": CLASSES, "kwargs": {}}
    proven = PlainBackbone(**recipe, size=SIZE, export=Export()).prove(step.net, [images])
    assert proven.numeric.passed
    assert proven.structural.passed
    assert proven.behavioural.passed
    fused = deployed(plain_model(backbone, CLASSES))
    assert convolutions(fused) < convolutions(step.net)
    exported = proven.contract["proofs"]["structural"]["initializers"]
    assert exported < len(list(step.net.parameters()))


@pytest.mark.parametrize("backbone", ["repvit_m0_9", "levit_128s"])
def test_nets_that_fuse_into_modules_of_their_own_keep_their_digits(backbone: str) -> None:
    """timm makes those modules in the default dtype, and RepViT's two heads are averaged in place."""
    net = plain_model(backbone, CLASSES)
    randomise(net, 1)
    net.double().eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    fused = deployed(net)
    assert torch.get_default_dtype() == torch.float32
    assert {value.dtype for value in fused.parameters()} == {torch.float64}
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        assert (fused(x) - net(x)).abs().max() < 1e-12 * net(x).abs().max()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(value.dtype == torch.float32 for value in deployed(plain_model(backbone, CLASSES)).parameters())
