"""Hooks are plain methods: a batch made by hand, and a context that has what they read."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from fgvc_resize_mix.settings import ResizeMixSettings

from fgvc.techniques.api import Batch
from fgvc.techniques.registry import build_technique


def test_labels_have_the_shares_of_the_pixels() -> None:
    labels = torch.arange(4)
    x = labels[:, None, None, None].expand(4, 3, 8, 8).float()
    batch = Batch(x=x, target=[(labels, None)], x_clean=x, labels=labels, index=labels, geometry=torch.eye(2, 3).expand(4, 2, 3))
    technique = build_technique(ResizeMixSettings())
    ctx = SimpleNamespace(draw=technique.draw(np.random.default_rng(0), batch))
    mixed = technique.on_batch(batch, ctx)
    expected = sum(label * share for label, share in mixed.target)
    torch.testing.assert_close(mixed.x.mean(dim=(1, 2, 3)), expected)
