import copy
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from fgvc.config.exporting import Export
from fgvc.config.images import Preprocess
from fgvc.errors import FgvcError
from fgvc.exporting.onnx import Interface, export_onnx, serialised
from fgvc.exporting.proofs import compare_behaviour, compare_numbers, compare_structure
from fgvc.exporting.prove import PlainBackbone, ProvedExport
from fgvc.exporting.reference import independent_plain, randomise
from fgvc.exporting.ties import degenerate, nudged
from fgvc.exporting.verify import verify_bundle, verify_files
from fgvc.models.backbone import deployed, plain_model
from fgvc.reparam.block import refusal
from fgvc.reparam.kinds import acb
from fgvc.reparam.plain import strip
from fgvc.reparam.replace import find_sites, replace_conv
from fgvc.runtime.bundle import load_bundle, write_bundle

SIZE = (32, 32)
RECIPE: dict[str, Any] = {"backbone": "test_efficientnet", "num_classes": 5, "kwargs": {}}
BATCHES = [np.random.default_rng(k).normal(size=(9, 3, *SIZE)).astype(np.float32) for k in range(2)]
BOTH = pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])


def trained(branches: int = 0) -> nn.Module:
    net = plain_model("test_efficientnet", 5)
    randomise(net, 3)
    net.eval()
    sites = [s for s in find_sites(net, SIZE)[0] if refusal(net.get_submodule(s.name)) is None]
    for site in sites[:branches]:
        block = acb(net.get_submodule(site.name))
        randomise(block, 4)
        replace_conv(net, site, block)
    return net.eval()


@pytest.fixture(scope="module")
def by_dynamo() -> ProvedExport:
    return PlainBackbone(**RECIPE, size=SIZE, export=Export()).prove(trained(branches=2), iter(BATCHES))


@pytest.fixture(scope="module")
def by_script() -> ProvedExport:
    return PlainBackbone(**RECIPE, size=SIZE, export=Export(exporter="torchscript")).prove(trained(branches=2), iter(BATCHES))


@pytest.fixture(params=["by_dynamo", "by_script"])
def proven(request: pytest.FixtureRequest) -> ProvedExport:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def references() -> dict[str, tuple[onnx.ModelProto, frozenset[int]]]:
    interface = Interface(size=SIZE)
    return {e: independent_plain(**RECIPE, interface=interface, exporter=e) for e in ("dynamo", "torchscript")}


def test_a_trained_net_with_branches_passes_all_three(proven: ProvedExport) -> None:
    assert 0 < proven.numeric.folded_float64 <= 1e-9
    assert 0 < proven.numeric.shipped_float32 <= 1e-4
    assert proven.structural.passed
    assert proven.behavioural.images == 18
    assert 0 < proven.behavioural.worst <= 1e-4
    assert proven.behavioural.worst_batch is not None
    assert proven.warnings == ()
    contract = json.loads(json.dumps(proven.contract))
    assert contract["ties_broken"] == []
    assert contract["sha256"] == proven.structural.sha256
    assert {"torch", "timm", "onnx", "onnxruntime", "onnxscript"} <= contract["versions"].keys()
    assert proven.explain is not None
    assert b"acb" not in proven.model.lower()


def test_what_ships_computes_what_was_trained(proven: ProvedExport) -> None:
    session = onnxruntime.InferenceSession(proven.model)
    with torch.no_grad():
        z = trained(branches=2).double()(torch.from_numpy(BATCHES[0]).double()).numpy()
    (logits,) = session.run(["logits"], {"input": BATCHES[0]})
    np.testing.assert_allclose(logits, z, rtol=0, atol=1e-4 * np.abs(z).max())


def bundle_files(proven: ProvedExport, **contract: object) -> dict[str, Any]:
    return {
        "model.onnx": proven.model,
        "labels.json": list("abcde"),
        "preprocess.json": Preprocess(size=SIZE),
        "contract.json": dict(proven.contract) | contract,
        "metrics.json": {},
    }


def test_a_bundle_can_be_proved_again(by_script: ProvedExport, tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", files=bundle_files(by_script))
    verified = verify_bundle(tmp_path / "b")
    assert verified.passed
    assert {check.name: check.passed for check in verified.checks}["independent plain"] is True


def test_a_bundle_whose_graph_is_not_its_contracts_fails(by_script: ProvedExport, tmp_path: Path) -> None:
    versions = dict(by_script.contract["versions"]) | {"torch": "1.0"}
    stale = bundle_files(by_script, versions=versions, sha256="0" * 64)
    write_bundle(tmp_path / "b", files=stale)
    checks = {check.name: check for check in verify_bundle(tmp_path / "b").checks}
    assert checks["contract"].passed is False
    assert checks["independent plain"].passed is None
    assert "was 1.0" in checks["independent plain"].detail
    write_bundle(tmp_path / "c", files=bundle_files(by_script, weights="all"))
    with pytest.raises(FgvcError, match=r"contract\.json: not a contract"):
        verify_bundle(tmp_path / "c")
    assert load_bundle(tmp_path / "c").labels == tuple("abcde")
    write_bundle(tmp_path / "d", files=bundle_files(by_script, canonical=3))
    with pytest.raises(FgvcError, match=r"canonical: 3, of a later version"):
        verify_bundle(tmp_path / "d")


def test_a_bundle_of_a_version_without_verdicts_is_verified(tmp_path: Path) -> None:
    """Written at commit b5c523d from test_efficientnet (torchscript, opset 17, 32 px), its weights set to zero afterwards."""
    with tarfile.open(Path(__file__).with_name("bundle-canonical-1.tar.xz")) as stored:
        stored.extractall(tmp_path / "b", filter="data")
    assert "canonical" not in load_bundle(tmp_path / "b").contract
    verified = verify_bundle(tmp_path / "b")
    assert verified.passed
    assert next(check for check in verified.checks if check.name == "contract").passed is True


def test_the_verdict_of_the_contract_is_checked(by_script: ProvedExport, tmp_path: Path) -> None:
    assert (by_script.contract["canonical"], by_script.contract["verdict"]) == (2, "identical")
    old = {"torch": "1.0"}  # no plain model is made anew
    checks = {}
    for verdict in ("identical", "equal but for spelling", "different"):
        facts = {"against": "0" * 64, "verdict": verdict, "versions": dict(by_script.contract["versions"]) | old}
        write_bundle(tmp_path / verdict, files=bundle_files(by_script, **facts))
        checks[verdict] = {check.name: check.passed for check in verify_bundle(tmp_path / verdict).checks}["deployed file"]
    assert checks == {"identical": True, "equal but for spelling": True, "different": False}


def test_a_fold_that_is_off_in_the_seventh_digit_fails() -> None:
    net = trained(branches=2)
    exact, shipped = (strip(net, **RECIPE, dtype=dtype) for dtype in (torch.float64, torch.float32))
    wide = net.double()
    assert compare_numbers(wide, exact, shipped, BATCHES[0]).passed
    with torch.no_grad():
        exact.state_dict()["conv_stem.weight"].mul_(1 + 1e-7)
    off = compare_numbers(wide, exact, shipped, BATCHES[0])
    assert not off.passed
    assert 1e-9 < off.folded_float64 < 1e-5
    with torch.no_grad():
        shipped.state_dict()["conv_stem.weight"].fill_(float("nan"))
    assert not compare_numbers(wide, strip(net, **RECIPE, dtype=torch.float64), shipped, BATCHES[0]).passed


class Head(nn.Module):
    """Logits (B,2): the means of the first two channels, plus a bias."""

    def __init__(self, *bias: float) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))[:, :2] + self.bias


def behaviour_of(torch_bias: tuple[float, float], onnx_bias: tuple[float, float], images: np.ndarray) -> Any:
    proto = export_onnx(Head(*onnx_bias).eval(), size=SIZE, exporter="torchscript", opset=20)
    return compare_behaviour(serialised(proto), Head(*torch_bias).eval(), [images])


def test_an_arg_max_may_differ_only_where_the_margin_is_small() -> None:
    flat = np.zeros((3, 3, *SIZE), np.float32)
    flat[2, 0] = 1.0  # the third image has a clear winner
    close = behaviour_of((0.5, 0.50005), (0.50005, 0.5), flat)
    assert close.passed
    rows = [(d.image, d.torch_class, d.onnx_class, d.excused) for d in close.disagreements]
    assert rows == [(0, 1, 0, True), (1, 1, 0, True)]
    assert close.worst == pytest.approx(5e-5, rel=1e-2)
    far = behaviour_of((0.5, 0.6), (0.6, 0.5), flat)
    assert not far.passed
    assert not far.disagreements[0].excused
    assert far.disagreements[0].margin == pytest.approx(0.1, rel=1e-3)
    assert not behaviour_of((0.0, 1.0), (0.0, 1.0002), flat).passed
    assert behaviour_of((0.0, 100.0), (0.0, 100.005), flat).passed  # relative to max(1, |logit|)
    assert not behaviour_of((0.0, 1.0), (0.0, float("nan")), flat).passed


def test_at_most_256_images_are_used() -> None:
    images = np.zeros((100, 3, *SIZE), np.float32)
    proto = export_onnx(Head(0.0, 1.0).eval(), size=SIZE, exporter="torchscript", opset=20)
    assert compare_behaviour(serialised(proto), Head(0.0, 1.0).eval(), iter([images] * 4)).images == 256


def deaden(net: Any) -> None:
    """Two equal dead batch norms, and a head whose bias is zero."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    twins = next([a, b] for a in norms for b in norms if a is not b and a.num_features == b.num_features)
    with torch.no_grad():
        for norm in twins:  # dead: whatever comes in, 0.25 comes out
            norm.weight.zero_()
            norm.bias.fill_(0.25)
        net.classifier.bias.zero_()


@BOTH
def test_dead_channels_change_the_graph_and_are_told_apart(exporter: Any, references: dict) -> None:
    net = strip(trained(), **RECIPE)
    reference, positions = references[exporter]
    assert compare_structure(export_onnx(net, size=SIZE, exporter=exporter, opset=20), reference, positions).passed
    deaden(net)
    before = copy.deepcopy(net.state_dict())
    dead = compare_structure(export_onnx(net, size=SIZE, exporter=exporter, opset=20), reference, positions)
    assert not dead.passed
    assert dead.differences
    assert dead.merged

    apart, moved = nudged(net)
    assert "classifier.bias" in moved
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert compare_structure(export_onnx(apart, size=SIZE, exporter=exporter, opset=20), reference, positions).passed
    x = torch.from_numpy(BATCHES[0])
    with torch.no_grad():
        assert (apart(x) - net(x)).abs().max() <= 1e-6 * net(x).abs().max()


def test_a_net_with_dead_channels_is_exported_and_its_contract_says_so() -> None:
    net = trained()
    deaden(net)
    proven = PlainBackbone(**RECIPE, size=SIZE, export=Export(exporter="torchscript")).prove(net, BATCHES)
    assert "classifier.bias" in proven.contract["ties_broken"]
    assert len(proven.contract["ties_broken"]) < 8
    assert "dead channels" in proven.warnings[0]


def test_a_healthy_net_is_not_touched() -> None:
    assert degenerate(trained()) == {}
    assert nudged(trained())[1] == ()
    fresh = plain_model("test_efficientnet", 5).eval()  # every scale 1, every shift 0
    assert len(degenerate(fresh)) > 20
    assert degenerate(nudged(fresh)[0]) == {}


class Leaky(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * 1.5


def leaky() -> nn.Module:
    return Leaky(trained()).eval()


@BOTH
def test_one_node_too_many_is_found(exporter: Any, references: dict) -> None:
    reference, positions = references[exporter]
    leaked = compare_structure(export_onnx(leaky(), size=SIZE, exporter=exporter, opset=20), reference, positions)
    assert not leaked.passed
    assert any("Mul" in str(difference) for difference in leaked.differences)


@BOTH
def test_the_independent_model_knows_its_weights(exporter: Any, references: dict) -> None:
    reference, positions = references[exporter]
    floats = [t for t in reference.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and t.dims]
    assert len(positions) == len(floats) > 30
    assert all(numpy_helper.to_array(tensor).any() for tensor in floats)


def test_an_independent_model_that_timm_refuses_is_an_error() -> None:
    with pytest.raises(FgvcError, match=r"(?s)can't be exported.*timm can't build"):
        independent_plain(**RECIPE | {"kwargs": {"nonsense": 1}}, interface=Interface(size=SIZE), exporter="dynamo")


def test_a_net_that_computes_something_else_is_refused() -> None:
    class Scaled(type(trained())):  # type: ignore[misc]  # attention at test time, say: same keys, other function
        def forward(self, x: Tensor) -> Tensor:
            return 1.01 * super().forward(x)

    net = trained()
    net.__class__ = Scaled
    with pytest.raises(FgvcError, match="does not compute what the trained one does"):
        PlainBackbone(**RECIPE, size=SIZE, export=Export(exporter="torchscript")).prove(net, BATCHES)


def test_without_images_there_is_no_proof() -> None:
    with pytest.raises(FgvcError, match="no images"):
        PlainBackbone(**RECIPE, size=SIZE, export=Export()).prove(trained(), [])


@pytest.fixture(scope="module")
def deployed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a team serves: other weights, its own names, a fixed batch, an older opset, the older exporter."""
    net = plain_model("test_efficientnet", 5)
    randomise(net, 11)
    proto = export_onnx(
        deployed(net), size=SIZE, exporter="torchscript", opset=17, input_name="pixels", output_names=("score",),
        axes={}, batch=4, ir_version=8,
    )  # fmt: skip
    proto.producer_version = "1.13"
    path = tmp_path_factory.mktemp("deployed") / "deployed.onnx"
    path.write_bytes(serialised(proto))
    return path


def test_an_export_follows_the_deployed_file(deployed_file: Path, tmp_path: Path) -> None:
    proven = PlainBackbone(**RECIPE, size=SIZE, export=Export(), against=deployed_file).prove(trained(branches=1), BATCHES)
    interface = proven.contract["interface"]
    assert (proven.contract["exporter"], interface["opset"], interface["batch"]) == ("torchscript", 17, 4)
    assert proven.behavioural.images == 18
    assert proven.behavioural.worst_batch is None  # the batch is fixed
    assert any("1.13" in warning for warning in proven.warnings)
    candidate = tmp_path / "candidate.onnx"
    candidate.write_bytes(proven.model)
    compared = verify_files(candidate, deployed_file)
    assert compared.passed
    assert compared.notes
    write_bundle(tmp_path / "b", files=bundle_files(proven))
    assert verify_bundle(tmp_path / "b").passed


def test_another_size_class_count_or_net_is_refused(deployed_file: Path, tmp_path: Path) -> None:
    def against(net: nn.Module, size: tuple[int, int] = SIZE, **changed: Any) -> None:
        images = [np.zeros((2, 3, *size), np.float32)]
        PlainBackbone(**RECIPE | changed, size=size, export=Export(), against=deployed_file).prove(net, images)

    with pytest.raises(FgvcError, match=r"takes images of 32x32, the recipe's are 32x64"):
        against(trained(), size=(32, 64))
    with pytest.raises(FgvcError, match=r"has 5 classes, the recipe's data has 7"):
        against(plain_model("test_efficientnet", 7).eval(), num_classes=7)
    with pytest.raises(FgvcError, match="no drop-in replacement"):
        against(plain_model("test_resnet", 5).eval(), backbone="test_resnet")


def test_files_that_differ_say_where(deployed_file: Path, tmp_path: Path) -> None:
    model = onnx.load(deployed_file)
    model.graph.output[0].name = model.graph.node[-1].output[0] = "logits"
    other = tmp_path / "other.onnx"
    other.write_bytes(serialised(model))
    compared = verify_files(other, deployed_file)
    assert not compared.passed
    assert any("logits" in str(difference) for difference in compared.differences)
