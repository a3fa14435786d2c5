"""Where tokens lie in the picture, by planting a patch in it: nets whose grids are no squares, of every way to lay tokens out."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from fgvc.errors import FgvcError
from fgvc.models.backbone import feature_layout, feature_map, scale_cells
from fgvc.models.tokens import token_grid

DYNAMIC = {"dynamic_img_size": True}
SMALL = {"depth": 1, "embed_dim": 48, "num_heads": 3}
TWINS = {"embed_dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
XCIT = {"depth": 1, "embed_dim": 32, "num_heads": 2, "cls_attn_layers": 1}
OVERLAPPING = ("xcit", "twins_pcpvt")  # convolutions of a cell reach into its neighbours
# name, keyword arguments, input's height and width, the map's
NETS = [
    ("vit_tiny_patch16_224", {**DYNAMIC, **SMALL}, (144, 256), (9, 16)),  # 144 tokens: a square, too
    ("vit_tiny_patch16_224", {**DYNAMIC, **SMALL}, (112, 448), (7, 28)),  # as many as the net's own 14 x 14
    ("vit_tiny_patch16_224", {**DYNAMIC, **SMALL}, (128, 256), (8, 16)),
    ("vit_tiny_patch16_224", {**DYNAMIC, **SMALL}, (256, 64), (16, 4)),
    ("vit_tiny_patch16_224", {**DYNAMIC, **SMALL, "dynamic_img_pad": True}, (108, 188), (7, 12)),
    ("vit_tiny_patch16_224", {"img_size": (144, 256), **SMALL}, (144, 256), (9, 16)),
    ("vit_tiny_patch16_224", {"img_size": (128, 64), "patch_size": (16, 8), **SMALL}, (128, 64), (8, 8)),
    ("vit_tiny_patch16_224", {**DYNAMIC, **SMALL, "reg_tokens": 4}, (64, 256), (4, 16)),
    ("vit_tiny_patch16_224", {**DYNAMIC, **SMALL, "class_token": False, "global_pool": "avg"}, (64, 256), (4, 16)),
    ("deit_tiny_distilled_patch16_224", {**DYNAMIC, **SMALL}, (144, 256), (9, 16)),
    ("eva02_tiny_patch14_224", {**DYNAMIC, **SMALL}, (126, 224), (9, 16)),
    ("flexivit_small", {**DYNAMIC, **SMALL}, (144, 256), (9, 16)),
    ("beit_base_patch16_224", {"img_size": (64, 256), **SMALL}, (64, 256), (4, 16)),
    ("cait_xxs24_224", {"img_size": (64, 256), **SMALL}, (64, 256), (4, 16)),
    ("tnt_s_patch16_224", {"img_size": (64, 256), "depth": 1}, (64, 256), (4, 16)),
    ("xcit_nano_12_p16_224", XCIT, (144, 256), (9, 16)),
    ("xcit_nano_12_p16_224", XCIT, (128, 256), (8, 16)),
    ("xcit_nano_12_p16_224", XCIT, (16, 256), (1, 16)),
    ("twins_svt_small", TWINS, (64, 256), (2, 8)),
    ("twins_pcpvt_small", TWINS, (128, 256), (4, 8)),
    ("hiera_tiny_224", {"img_size": (64, 256), "stages": (1, 1, 1, 1), "embed_dim": 32}, (64, 256), (2, 8)),
    ("coat_lite_tiny", {"img_size": (64, 256)}, (64, 256), (2, 8)),  # a class token it does not tell of
    ("swin_tiny_patch4_window7_224", {"img_size": (64, 256), "depths": (1, 1)}, (64, 256), (8, 32)),
]  # fmt: skip


def separate_cells(name: str, kwargs: dict) -> nn.Module:
    """A net without what mixes cells: every block's own part is small, so that a cell stays where it was embedded."""
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=3, **kwargs).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm) and module is not net.get_classifier():
                module.weight.mul_(0.05 if isinstance(module, nn.Linear) else 1.0)
        for key, value in net.named_parameters():
            if key.rpartition(".")[2].startswith("gamma"):
                value.mul_(0.05)
    return net


def lit(net: nn.Module, size: tuple[int, int], cells: tuple[int, int], at: tuple[int, int]) -> tuple[int, int]:
    """The cell of the map that changes most where the middle of a cell of the picture does."""
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1)) * 0.3
    top, left = (int((place + 0.25) * side / count) for place, side, count in zip(at, size, cells, strict=True))
    high, wide = (side // count // 2 for side, count in zip(size, cells, strict=True))
    planted = x.clone()
    planted[:, :, top : top + high, left : left + wide] += 3
    with torch.no_grad():
        before, after = (feature_map(net, net.forward_features(image), size) for image in (x, planted))
    assert before.shape[2:] == cells
    row, column = divmod(int((after - before).square().sum(1).argmax()), cells[1])
    return row, column


@pytest.mark.parametrize(("name", "kwargs", "size", "cells"), NETS)
def test_a_patch_of_the_picture_comes_out_at_its_cell(
    name: str, kwargs: dict, size: tuple[int, int], cells: tuple[int, int]
) -> None:
    net, (rows, columns) = separate_cells(name, kwargs), cells
    reach = 1 if name.startswith(OVERLAPPING) else 0
    for at in {(0, 0), (0, columns - 1), (rows - 1, 0), (rows // 2, columns // 3), (rows - 1, columns - 1)}:
        row, column = lit(net, size, cells, at)
        assert max(abs(row - at[0]), abs(column - at[1])) <= reach, (at, row, column)


@pytest.mark.parametrize(
    ("name", "kwargs", "module", "size", "cells"),
    [
        ("xcit_nano_12_p16_224", XCIT, "blocks.0", (144, 256), (9, 16)),  # no class token yet
        ("cait_xxs24_224", {"img_size": (64, 256), **SMALL}, "blocks.0.norm1", (64, 256), (4, 16)),
        ("twins_svt_small", TWINS, "blocks.1.0", (64, 256), (8, 32)),
        ("levit_128s", {"img_size": (64, 256)}, "stages.0.blocks.0", (64, 256), (4, 16)),
    ],
)
def test_tokens_in_the_middle_of_a_net(
    name: str, kwargs: dict, module: str, size: tuple[int, int], cells: tuple[int, int]
) -> None:
    net, tokens = separate_cells(name, kwargs), []
    net.get_submodule(module).register_forward_hook(lambda _m, _x, output: tokens.append(output))
    x = torch.zeros(1, 3, *size)
    x[:, :, : size[0] // cells[0], -size[1] // cells[1] :] = 3  # the upper right corner
    with torch.no_grad():
        net.forward_features(torch.zeros_like(x)), net.forward_features(x)
    maps = feature_map(net, tokens[1], size) - feature_map(net, tokens[0], size)
    assert maps.shape[2:] == cells
    row, column = divmod(int(maps.square().sum(1).argmax()), cells[1])
    assert row <= 1, "convolutions may reach into the next cell"
    assert column >= cells[1] - 2


def test_maps_with_the_channels_last_in_the_middle_of_a_net() -> None:
    """Of a width that is not that of the last features."""
    net = timm.create_model("sequencer2d_s", num_classes=3, layers=(1, 1, 1, 1), embed_dims=(16, 32, 32, 32))
    assert feature_layout(net, torch.zeros(1, 8, 16, 16)) == "NHWC"


def test_tokens_that_lie_otherwise_in_the_middle_of_a_net_are_refused() -> None:
    net = timm.create_model("hiera_tiny_224", img_size=(64, 256), stages=(1, 1, 1, 1), embed_dim=32)
    assert token_grid(net, 16, (64, 256)) == (0, (2, 8))
    with pytest.raises(FgvcError, match="not in the order of the picture"):
        token_grid(net, 64, (64, 256))


@pytest.mark.parametrize(
    ("name", "kwargs", "tokens", "size", "says"),
    [
        ("vit_tiny_patch16_224", DYNAMIC, 197, None, "several grids"),  # its own 14 x 14, or 7 x 28
        ("xcit_nano_12_p16_224", XCIT, 145, None, "several grids"),
        ("twins_svt_small", TWINS, 16, None, "several grids"),
        ("vit_tiny_patch16_224", {}, 145, None, "several grids"),  # not its own
        ("vit_tiny_patch16_224", DYNAMIC, 140, (144, 256), "do not form a grid of 144 x 256"),
        ("pit_ti_224", {}, 1, (224, 224), "class tokens alone"),
        ("pit_ti_distilled_224", {}, 2, (64, 128), "class tokens alone"),
    ],
)
def test_a_number_of_tokens_without_one_grid_is_refused(
    name: str, kwargs: dict, tokens: int, size: tuple[int, int] | None, says: str
) -> None:
    net = timm.create_model(name, num_classes=3, **kwargs)
    with pytest.raises(FgvcError, match=says):
        feature_map(net, torch.zeros(1, tokens, 8), size)


def test_a_net_of_one_size_needs_no_size() -> None:
    net = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=(144, 256))
    assert feature_map(net, torch.zeros(1, 145, 192)).shape == (1, 192, 9, 16)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_weights_of_cells_leave_the_tokens_before_them_alone(prefix: int) -> None:
    net, weights = nn.Module(), torch.rand(2, 2, 8)
    net.num_prefix_tokens = prefix
    f: Tensor = torch.rand(2, prefix + 16, 3)
    scaled = scale_cells(net, f, weights)
    assert torch.equal(scaled[:, :prefix], f[:, :prefix])
    assert torch.equal(feature_map(net, scaled, (32, 128)), feature_map(net, f, (32, 128)) * weights[:, None])
