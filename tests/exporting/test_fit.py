"""The choice of exporter, norms and operator set under which an export is a deployed file's graph."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn

from fgvc.config.exporting import Export
from fgvc.errors import FgvcError, ProofError
from fgvc.exporting.fit import fit
from fgvc.exporting.onnx import export_onnx, serialised
from fgvc.exporting.prove import PlainBackbone
from fgvc.exporting.reference import randomise
from fgvc.exporting.verify import verify_files
from fgvc.models.backbone import deployed, plain_model
from fgvc.runtime.engine import OnnxSession

SIZE = (32, 32)
SHARED = os.environ.get("FGVC_SHARED")


def net(seed: int) -> nn.Module:
    plain = plain_model("test_efficientnet", 5)
    randomise(plain, seed)
    return deployed(plain)


def deployed_file(path: Path, **options: Any) -> Path:
    path.write_bytes(serialised(export_onnx(net(11), size=SIZE, **options)))
    return path


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_norms_are_kept_with_the_same_answers(exporter: Any) -> None:
    """As many as the net has, by ONNX's own operator."""
    images = np.random.default_rng(0).normal(size=(2, 3, *SIZE)).astype(np.float32)
    plain = net(1)
    model = export_onnx(plain, size=SIZE, exporter=exporter, opset=20, batch_norm="keep")
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    assert len(norms) == sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert {entry.domain for entry in model.opset_import} == {""} == {node.domain for node in norms}
    with torch.no_grad():
        expected = plain(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(OnnxSession(serialised(model)).logits(images), expected, rtol=1e-4, atol=1e-4)


def test_norms_of_the_file_are_kept_whatever_the_recipe_says(tmp_path: Path) -> None:
    options = {"exporter": "torchscript", "opset": 13, "batch_norm": "keep", "input_name": "pixels"}
    file = deployed_file(tmp_path / "kept.onnx", **options)
    chosen = fit(net(3), file, size=SIZE, num_classes=5)
    assert (chosen.exporter, chosen.interface.opset, chosen.interface.batch_norm) == ("torchscript", 13, "keep")
    assert chosen.verdict == "identical"


def test_a_file_of_another_spelling_fits_and_the_contract_says_so(tmp_path: Path) -> None:
    model = export_onnx(net(11), size=SIZE, exporter="torchscript", opset=17)
    for node in model.graph.node:
        if node.op_type == "Conv" and not any(a.name == "auto_pad" for a in node.attribute):
            node.attribute.append(helper.make_attribute("auto_pad", "NOTSET"))
    file = tmp_path / "spelled.onnx"
    onnx.save(model, file)
    contract = PlainBackbone(
        backbone="test_efficientnet", num_classes=5, kwargs={}, size=SIZE, export=Export(), against=file
    ).prove(net(3), [np.zeros((2, 3, *SIZE), np.float32)])
    facts = json.loads(json.dumps(contract.contract))
    assert (facts["canonical"], facts["verdict"]) == (2, "equal but for spelling")
    assert list(facts["spelling"]) == ["default attributes"]
    candidate = tmp_path / "candidate.onnx"
    candidate.write_bytes(contract.model)
    assert verify_files(candidate, file).verdict == "equal but for spelling"


def test_where_nothing_fits_few_lines_and_the_other_way_are_given(tmp_path: Path) -> None:
    model = export_onnx(net(11), size=SIZE, exporter="torchscript", opset=17)
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    next(a for a in first.attribute if a.name == "pads").ints[:] = [2, 2, 0, 0]
    file = tmp_path / "other.onnx"
    onnx.save(model, file)
    with pytest.raises(ProofError, match="pads") as refused:
        fit(net(3), file, size=SIZE, num_classes=5)
    assert refused.value.exit_code == 1
    lines = str(refused.value).splitlines()
    assert len(lines) <= 1 + 5 + 1
    assert f"--into {file}" in lines[-1]


def test_channels_last_name_the_other_way(tmp_path: Path) -> None:
    image = helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["n", 8, 8, 3])
    scores = helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["n", 5])
    nodes = [helper.make_node("ReduceMean", ["image"], ["scores"], axes=[1, 2], keepdims=0)]
    file = tmp_path / "last.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [image], [scores])), file)
    with pytest.raises(FgvcError, match="is not float32 of shape") as refused:
        fit(net(3), file, size=SIZE, num_classes=5)
    assert f"--into {file}" in str(refused.value)


@pytest.mark.skipif(SHARED is None, reason="needs FGVC_SHARED")
@pytest.mark.parametrize(
    ("name", "norm", "verdict"),
    [
        ("timm-mobilenetv2_100-torch2.4-opset17-bn-kept", "keep", "identical"),
        ("torchvision-mobilenet_v2-torch1.13-opset13", "fold", "equal but for spelling"),
        ("timm-mobilenetv2_100-opset13-onnxsim", "fold", "equal but for spelling"),
        ("timm-mobilenetv2_100-torch2.9-opset18-dynamo", "fold", "equal but for spelling"),
    ],
)
def test_files_of_other_programs_fit(name: str, norm: str, verdict: str) -> None:
    plain = plain_model("mobilenetv2_100", 50)
    randomise(plain, 1)
    chosen = fit(deployed(plain), Path(str(SHARED), "deployed", f"{name}.onnx"), size=(224, 224), num_classes=50)
    assert (chosen.interface.batch_norm, chosen.verdict) == (norm, verdict)
