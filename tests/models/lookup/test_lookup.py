"""Files that other programs wrote are known as the nets of timm that they are, and timm's weights come into their places."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import numpy_helper
from torch import nn

from fgvc.errors import FgvcError
from fgvc.exporting.inspect import difference_from_onnxruntime, noise
from fgvc.exporting.into import differences_outside, write_into
from fgvc.models.lookup import make_table, table
from fgvc.models.lookup.match import pairings
from fgvc.models.lookup.table import nearest, timm_table
from fgvc.models.lookup.trace import traced
from fgvc.models.lookup.twin import Twin, look_up, timm_stages
from fgvc.models.onnxnet.net import OnnxNet, open_onnx
from tests.trained import Once

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's exporters
PIXELS, CLASSES = 64, 5
KEPT = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
# A residual net, blocks whose branches timm fuses, layer scales, a class token, dense concatenation, squeeze and excitation.
NETS = ("test_resnet", "mobileone_s0", "test_convnext", "test_vit", "test_efficientnet", "test_byobnet")


def shifted_net(name: str, seed: int = 0) -> nn.Module:
    """A timm net whose weights are far from their first values, none near zero."""
    torch.manual_seed(seed)
    try:
        net = timm.create_model(name, num_classes=CLASSES, img_size=PIXELS)
    except TypeError:
        net = timm.create_model(name, num_classes=CLASSES)
    with torch.no_grad():
        for weight in net.parameters():
            if weight.dim() == 1:
                weight.add_(0.1 + 0.2 * torch.randn_like(weight).abs())
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_(0, 0.1)
                norm.running_var.uniform_(0.5, 1.5)
    return net.eval()


@pytest.fixture(scope="session")
def files(once: Once) -> Path:
    return once.made("lookup", lambda folder: [export(name, folder) for name in NETS])


def export(name: str, folder: Path) -> None:
    net = shifted_net(name)
    fused = timm.utils.reparameterize_model(net)
    for kind, options in {"folded": {}, "kept": KEPT}.items():
        torch.onnx.export(
            fused, (torch.zeros(1, 3, PIXELS, PIXELS),), str(folder / f"{name}-{kind}.onnx"), dynamo=False, opset_version=17,
            **options,
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["folded", "kept"])
@pytest.mark.parametrize("name", NETS)
def test_a_file_is_the_net_that_it_was_made_from(name: str, kind: str, files: Path, tmp_path: Path) -> None:
    file = files / f"{name}-{kind}.onnx"
    net = open_onnx(file)
    lookup = look_up(net)
    assert name in {twin.name for twin in lookup.twins}
    twin = next(twin for twin in lookup.twins if twin.name == name)
    other = shifted_net(name, seed=1)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    tensors = twin.tensors(other)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items()), (
        "the net given is as it was"
    )
    assert {stored for stored, slots in net.slots.items() if slots[0].trained} <= tensors.keys()
    copy = write_into(file, {key: value.numpy() for key, value in tensors.items()}, tmp_path / "copy.onnx").path
    assert differences_outside(copy, file) == []
    with torch.no_grad():
        x = torch.randn(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(2))
        expected, answers = other(x), open_onnx(copy)(x)
    assert (expected - net(x)).abs().max() > 1e-2 * expected.abs().max(), "other weights, other answers"
    torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert difference_from_onnxruntime(copy, net, noise(net)).difference > 1e-2
    assert difference_from_onnxruntime(copy, open_onnx(copy), noise(net)).difference < 1e-5


def test_scales_are_gamma_over_sigma(files: Path) -> None:
    net = open_onnx(files / "test_efficientnet-folded.onnx")
    twin = look_up(net).twin
    assert twin is not None
    plain = shifted_net("test_efficientnet", seed=3)
    scales = twin.scales(plain)
    norms = [module for module in plain.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(scales) == len(norms)
    by_hand = [(norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()).detach() for norm in norms]
    for name, scale in scales.items():
        assert net.get_parameter(name).shape[0] == len(scale)
    order = [scales[name] for name, _ in net.named_parameters() if name in scales]
    for mine, hand in zip(
        sorted(order, key=lambda v: float(v.sum())), sorted(by_hand, key=lambda v: float(v.sum())), strict=True
    ):
        torch.testing.assert_close(mine, hand, rtol=1e-12, atol=0)


def test_one_layer_more_or_other_is_near_and_never_the_net(files: Path, tmp_path: Path) -> None:
    model = onnx.load(str(files / "test_efficientnet-folded.onnx"))
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    at = next(i for i, node in enumerate(convs) if list(weights[node.input[1]].dims[2:]) == [1, 1])
    old = numpy_helper.to_array(weights[convs[at].input[1]])
    wide = np.zeros((*old.shape[:2], 3, 3), np.float32)
    wide[..., 1:2, 1:2] = old  # the same function, by other layers
    weights[convs[at].input[1]].CopyFrom(numpy_helper.from_array(wide, convs[at].input[1]))
    for attribute in convs[at].attribute:
        if attribute.name in ("kernel_shape", "pads"):
            attribute.ints[:] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}[attribute.name]
    onnx.save(model, str(tmp_path / "deployed.onnx"))
    lookup = look_up(open_onnx(tmp_path / "deployed.onnx"))
    assert lookup.twin is None
    assert lookup.near[0].differences == 1
    assert "test_efficientnet" in lookup.near[0].entry.names
    assert "but for 1 layer" in lookup.line()


def test_the_same_layers_with_another_activation_are_another_net(files: Path, tmp_path: Path) -> None:
    model = onnx.load(str(files / "test_resnet-folded.onnx"))
    node = next(node for node in model.graph.node if node.op_type == "Relu")
    node.op_type = "Softplus"
    onnx.save(model, str(tmp_path / "deployed.onnx"))
    lookup = look_up(open_onnx(tmp_path / "deployed.onnx"))
    assert lookup.twin is None
    assert dict(lookup.others)["test_resnet"] > 1e-5
    assert "the logits are not" in lookup.line()


def test_branches_are_told_apart_in_any_order() -> None:
    """Two branches of the same shapes, computed in the other order."""

    class Branches(nn.Module):
        def __init__(self, order: tuple[int, int]) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
            self.long = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)])
            self.short = nn.Conv2d(4, 4, 3, padding=1)
            self.order = order

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            branches = [lambda: self.long[1](self.long[0](x)), lambda: self.short(x)]
            first = branches[self.order[0]]()
            return self.head((first + branches[self.order[1]]()).mean((2, 3)))

    x = torch.randn(1, 3, 4, 4)
    one, two = Branches((0, 1)), Branches((1, 0))
    a, b = traced(one, x), traced(two, x)
    pairs = {layer.twin: layer.file for layer in pairings(a, b)[0].layers}
    names = {mine: (a.uses[mine].operands[0].names, b.uses[other].operands[0].names) for mine, other in pairs.items()}
    assert all(mine == other for mine, other in names.values())


def test_stages_are_timms(files: Path) -> None:
    net = open_onnx(files / "test_efficientnet-folded.onnx")
    x = torch.randn(2, 3, PIXELS, PIXELS)
    with torch.no_grad():
        before = net(x)
    info = timm.create_model("test_efficientnet").feature_info
    stages = [(stage["num_chs"], stage["reduction"]) for stage in info]
    assert list(timm_stages(net)) == stages
    net.set_stages(stages)
    net.set_stages(stages)
    assert [(stage["num_chs"], stage["reduction"]) for stage in net.feature_info] == stages
    shapes: list[tuple[int, ...]] = []
    for stage in net.feature_info:
        net.get_submodule(stage["module"]).register_forward_hook(lambda m, i, out: shapes.append(tuple(out.shape[1:])))
    with torch.no_grad():
        assert torch.equal(net(x), before)
    assert shapes == [(channels, PIXELS // reduction, PIXELS // reduction) for channels, reduction in stages]
    net.set_stages([(7, 2)])
    assert len(net.feature_info) == len(stages)


def test_the_table_is_of_timm_and_made_by_its_script(tmp_path: Path) -> None:
    version, entries = timm_table()
    assert version
    names = {name for entry in entries for name in entry.names}
    assert len(names) > 1000
    make_table.main(tmp_path / "table.json.gz", ["test_resnet", "test_vit", "mobileone_s0"])
    made_here = json.loads(gzip.decompress((tmp_path / "table.json.gz").read_bytes()))
    for net in made_here["nets"]:
        layers = Counter(tuple(made_here["shapes"][number]) for number in net["layers"])
        if version == timm.__version__:
            assert any(net["names"][0] in entry.names and entry.layers == layers for entry in entries)
    assert sum(net["fused"] for net in made_here["nets"]) == 1


def test_other_weights_that_do_not_fit_are_refused(files: Path) -> None:
    twin = look_up(open_onnx(files / "test_resnet-folded.onnx")).twin
    assert isinstance(twin, Twin)
    plain = shifted_net("test_resnet")
    plain.get_submodule("layer1").register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(FgvcError, match="its answers would be others"):
        twin.tensors(plain)


@pytest.mark.parametrize(
    ("start", "name"),
    [
        ("birds", "tf_efficientnet_lite0"), ("timm-mobilenetv2_100-opset13-onnxsim", "mobilenetv2_100"),
        ("timm-mobilenetv2_100-opset13-ort", "mobilenetv2_100"), ("timm-mobilenetv2_100-torch2.4", "mobilenetv2_100"),
        ("timm-mobilenetv2_100-torch2.9", "mobilenetv2_100"), ("torchvision", "mobilenetv2_100"), ("keras", None),
    ],
)  # fmt: skip
def test_deployed_files(start: str, name: str | None, shared: Path) -> None:
    (file,) = (shared / "deployed").glob(f"{start}*.onnx")
    lookup = look_up(open_onnx(file))
    assert [twin.name for twin in lookup.twins] == ([] if name is None else [name])
    if name is None:  # Keras pads on other sides
        assert [name for name, _ in lookup.others] == ["mobilenetv2_100"]


def test_a_changed_padding_is_not_the_net(shared: Path) -> None:
    """lite0 and tf_lite0 have the same layers, and differ in padding alone."""
    (file,) = (shared / "deployed").glob("birds*.onnx")
    net = open_onnx(file)
    keys = traced(net, torch.zeros(1, 3, *net.size))
    near = nearest(keys.uses[number].key for number in keys.layers)
    assert {"tf_efficientnet_lite0", "efficientnet_lite0"} <= {
        name for match in near if not match.differences for name in match.entry.names
    }
    assert isinstance(net, OnnxNet)
    assert table.TABLE.stat().st_size < 1_000_000
