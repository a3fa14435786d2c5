"""Images of another size than a file's own go through its net, as a teacher needs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from fgvc.errors import FgvcError
from fgvc.models.onnxnet.net import open_onnx


def exported(net: nn.Module, place: Path, side: int) -> Path:
    torch.onnx.export(net.eval(), (torch.zeros(1, 3, side, side),), str(place), dynamo=False)
    return place


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the older exporter
@pytest.mark.parametrize("size", [(64, 64), (32, 32), (96, 64)])
def test_it_answers_as_timm_s_net_of_that_size(size: tuple[int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = timm.create_model("test_efficientnet", num_classes=5).eval()
    opened = open_onnx(exported(net, tmp_path / "net.onnx", 48), size, resized=True)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(opened(x), net(x), atol=1e-5, rtol=1e-4)
    assert opened.size == (48, 48)


def test_padding_computed_for_one_size_is_that_of_the_net(shared: Path) -> None:
    """The file pads to numbers of 160 pixels: read at 224 it would cut the middle out of the image."""
    file = shared / "deployed" / "birds-tf_efficientnet_lite0-torch1.13-opset11.onnx"
    net = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    state = load_file(shared / "weights" / "tf_efficientnet_lite0.safetensors")
    net.load_state_dict({key: value for key, value in state.items() if not key.startswith("classifier")})
    opened = open_onnx(file, (224, 224), resized=True)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = opened.forward_head(opened.forward_features(x), pre_logits=True)
        torch.testing.assert_close(features, net(x), atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_net_of_one_size_is_refused(tmp_path: Path) -> None:
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16 * 16, 5)
    file = exported(nn.Sequential(*layers), tmp_path / "net.onnx", 16)
    assert open_onnx(file, (16, 16), resized=True).size == (16, 16)
    with pytest.raises(FgvcError, match=r"made for images of 16 x 16 pixels: none of 32 x 32"):
        open_onnx(file, (32, 32), resized=True)
