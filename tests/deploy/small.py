"""A bundle that is worked out by hand: its logits are the mean red, green and blue of the image, times ten."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fgvc.config.calibration import Calibration
from fgvc.config.images import Preprocess
from fgvc.runtime.bundle import Bundle, load_bundle, write_bundle

ROOT = Path(__file__).parents[2]
SIZE = 8
CALIBRATION = Calibration(
    temperature=2.0, threshold=0.5, keep=0.95, fitted_on="val", images=80, nll_before=1, nll_after=1, ece_before=0.2,
    ece_after=0.1, kept=0.95, coverage=0.9, accuracy=0.8,
)  # fmt: skip


def network(batch: int | str = "batch", names: tuple[str, str] = ("input", "logits")) -> bytes:
    source, target = names
    nodes = [
        helper.make_node("GlobalAveragePool", [source], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], [target]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(source, TensorProto.FLOAT, [batch, 3, SIZE, SIZE])],
        [helper.make_tensor_value_info(target, TensorProto.FLOAT, [batch, 3])],
        [numpy_helper.from_array((10 * np.eye(3)).astype(np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def bundle(
    folder: Path,
    model: bytes | None = None,
    *,
    labels: tuple[str, ...] = ("red", "green", "蓝"),
    calibration: Calibration | None = CALIBRATION,
) -> Bundle:
    plain = Preprocess(size=(SIZE, SIZE), resize="squash", crop_pct=1.0, mean=(0, 0, 0), std=(1, 1, 1))
    files = {
        "model.onnx": network() if model is None else model,
        "labels.json": list(labels),
        "preprocess.json": plain,
        "contract.json": {"num_classes": 3},
        "metrics.json": {},
    }
    write_bundle(folder, files=files | ({"calibration.json": calibration} if calibration else {}))
    return load_bundle(folder)


def script(path: str) -> ModuleType:
    """A file of deploy/ as a module: the folder is no package."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(f"deploy_{name}", ROOT / "deploy" / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
