"""Files and peers of benchmarks/onnx_files.py that need other environments: this script imports nothing of fgvc.

    PYTHON onnx_makers.py torch OUT KIND NAME...       # timm nets, as this environment's torch exports them; KIND: see TORCH
    PYTHON onnx_makers.py optimise OUT FILE.onnx...    # by onnxsim, onnxslim and onnxruntime (basic, extended), where installed
    PYTHON onnx_makers.py half OUT FILE.onnx...        # weights and arithmetic in half precision (onnxruntime's converter)
    PYTHON onnx_makers.py keras OUT NAME...            # keras.applications by tf2onnx
    PYTHON onnx_makers.py paddle OUT NAME...           # paddle.vision by paddle2onnx
    PYTHON onnx_makers.py onnx2torch|ort-training FILE.onnx...      # peers: a line of JSON a file

Weights are random and far from their first values; 10 classes.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path

PIXELS = 96
TORCH = {
    "ts9": {"opset_version": 9}, "ts11": {"opset_version": 11}, "ts13": {"opset_version": 13}, "ts17": {"opset_version": 17},
    "ts13-norms": {"opset_version": 13, "do_constant_folding": False, "norms": True},
    "ts13-fixed": {"opset_version": 13, "fixed": True},
    "dynamo18": {"opset_version": 18, "dynamo": True}, "dynamo21": {"opset_version": 21, "dynamo": True},
}  # fmt: skip


def torch_files(out, kind, names):
    import timm
    import torch

    for name in names:
        path = out / f"{name}-torch{torch.__version__.split('+')[0]}-{kind}.onnx"
        if path.exists():
            continue
        torch.manual_seed(0)
        if not timm.is_model(name):
            print(f"{path.name}: not exported: timm {timm.__version__} has no {name}", flush=True)
            continue
        try:
            net, size = timm.create_model(name, num_classes=10, img_size=PIXELS), PIXELS
        except TypeError:
            net = timm.create_model(name, num_classes=10)
            size = net.default_cfg["input_size"][1] if net.default_cfg.get("fixed_input_size") else PIXELS
        if any(hasattr(m, "reparameterize") for m in net.modules()) or name.startswith("repvgg"):
            try:
                from timm.utils.model import reparameterize_model

                net = reparameterize_model(net.eval())
            except ImportError:
                pass
        net.eval()
        with torch.no_grad():
            for weight in net.parameters():
                if weight.dim() == 1:
                    weight.add_(0.1 * torch.randn_like(weight))
            for norm in net.modules():
                if isinstance(norm, torch.nn.BatchNorm2d):
                    norm.running_mean.normal_(0, 0.1)
                    norm.running_var.uniform_(0.5, 1.5)
        options = dict(TORCH[kind])
        x = torch.randn(1, 3, size, size)
        try:
            if options.pop("dynamo", False):
                version = tuple(map(int, torch.__version__.split(".")[:2]))
                if version < (2, 5):
                    torch.onnx.dynamo_export(net, x).save(str(path))
                else:
                    torch.onnx.export(net, (x,), str(path), dynamo=True, external_data=False, **options)
            else:
                if options.pop("norms", False):
                    options["training"] = torch.onnx.TrainingMode.PRESERVE
                if not options.pop("fixed", False):
                    options.update(input_names=["input"], dynamic_axes={"input": {0: "n"}})
                if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 5):
                    options["dynamo"] = False
                torch.onnx.export(net, (x,), str(path), **options)
            print(path.name, flush=True)
        except Exception as error:
            path.unlink(missing_ok=True)
            print(f"{path.name}: not exported: {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True)


def optimise(out, files):
    import onnx

    for file in map(Path, files):
        for kind in ("onnxsim", "onnxslim", "ort-basic", "ort-extended"):
            path = out / f"{file.stem}-{kind}.onnx"
            try:
                if kind == "onnxsim":
                    import onnxsim

                    onnx.save(onnxsim.simplify(onnx.load(str(file)))[0], str(path))
                elif kind == "onnxslim":
                    import onnxslim

                    onnx.save(onnxslim.slim(onnx.load(str(file))), str(path))
                else:
                    import onnxruntime as ort

                    options = ort.SessionOptions()
                    levels = ort.GraphOptimizationLevel
                    basic = kind == "ort-basic"
                    options.graph_optimization_level = levels.ORT_ENABLE_BASIC if basic else levels.ORT_ENABLE_EXTENDED
                    options.optimized_model_filepath = str(path)
                    ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
                print(path.name, flush=True)
            except Exception as error:
                print(f"{path.name}: not made: {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True)


def half(out, files):
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    for file in map(Path, files):
        onnx.save(convert_float_to_float16(onnx.load(str(file))), str(out / f"{file.stem}-fp16.onnx"))
        print(f"{file.stem}-fp16.onnx", flush=True)


def keras(out, names):
    import numpy as np
    import tensorflow as tf
    import tf2onnx

    tf.random.set_seed(0)
    for name in names:
        size = 299 if "Inception" in name or name == "Xception" else 96
        net = getattr(tf.keras.applications, name)(weights=None, classes=10, input_shape=(size, size, 3))
        rng = np.random.default_rng(0)
        for weight in net.weights:
            if "moving_mean" in weight.name or "beta" in weight.name:
                weight.assign(rng.normal(0, 0.1, weight.shape))
            elif "moving_variance" in weight.name or "gamma" in weight.name:
                weight.assign(rng.uniform(0.5, 1.5, weight.shape))
        path = out / f"keras-{name}-tf2onnx.onnx"
        try:
            tf2onnx.convert.from_keras(net, opset=13, output_path=str(path))
            print(path.name, flush=True)
        except Exception as error:
            print(f"{path.name}: not exported: {type(error).__name__}: {str(error)[:120]}", flush=True)


def paddle(out, names):
    import paddle

    paddle.seed(0)
    for name in names:
        net = getattr(paddle.vision.models, name)(num_classes=10)
        net.eval()
        spec = [paddle.static.InputSpec([None, 3, PIXELS, PIXELS], "float32", "x")]
        try:
            paddle.onnx.export(net, str(out / f"paddle-{name}"), input_spec=spec, opset_version=13)
            print(f"paddle-{name}.onnx", flush=True)
        except Exception as error:
            print(f"paddle-{name}: not exported: {type(error).__name__}: {str(error)[:120]}", flush=True)


def weights_of(file):
    """Names of the float tensors of more than one value that a Conv, Gemm, MatMul or norm reads, or an Add or Mul."""
    import onnx

    model = onnx.load(str(file))
    running = {name for node in model.graph.node if node.op_type == "BatchNormalization" for name in node.input[3:]}
    return [
        t.name for t in model.graph.initializer if t.data_type == 1 and max(t.dims, default=0) > 1 and t.name not in running
    ]


def images(session):
    import numpy as np

    node = session.get_inputs()[0]
    shape = [side if isinstance(side, int) else 2 for side in node.shape]
    x = np.random.default_rng(0).normal(0, 1, shape)
    return node.name, x.astype({"tensor(float16)": np.float16}.get(node.type, np.float32))


def by_onnx2torch(file):
    import numpy as np
    import onnxruntime as ort
    import torch
    from onnx2torch import convert

    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    name, x = images(session)
    net = convert(str(file)).eval()
    wanted = session.run(None, {name: x})[0]
    with torch.no_grad():
        answers = net(torch.from_numpy(x)).numpy()
    agrees = float(np.abs(answers - wanted).max() / max(np.abs(wanted).max(), 1e-30))
    net(torch.from_numpy(x)).flatten(1).log_softmax(1)[:, 0].sum().backward()
    got = sum(value.numel() for value in net.parameters() if value.grad is not None and value.grad.abs().sum() > 0)
    import onnx

    want = set(weights_of(file))
    need = sum(int(np.prod(t.dims)) for t in onnx.load(str(file)).graph.initializer if t.name in want)
    return {"loads": "yes", "agrees": f"{agrees:.0e}", "trains": f"{min(1.0, got / max(need, 1)):.0%}"}


def by_ort_training(file):
    import numpy as np
    import onnx
    from onnxruntime.training import artifacts
    from onnxruntime.training.api import CheckpointState, Module, Optimizer

    want = weights_of(file)
    with tempfile.TemporaryDirectory() as scratch:
        artifacts.generate_artifacts(
            onnx.load(str(file)), requires_grad=want, frozen_params=[], loss=artifacts.LossType.CrossEntropyLoss,
            optimizer=artifacts.OptimType.AdamW, artifact_directory=scratch,
        )  # fmt: skip
        state = CheckpointState.load_checkpoint(f"{scratch}/checkpoint")
        module = Module(f"{scratch}/training_model.onnx", state, f"{scratch}/eval_model.onnx")
        optimizer = Optimizer(f"{scratch}/optimizer_model.onnx", module)
        shape = [d.dim_value or 2 for d in next(i for i in onnx.load(str(file)).graph.input).type.tensor_type.shape.dim]
        x = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
        before = {name: p.data.copy() for name, p in state.parameters}
        module.train()
        module(x, np.arange(shape[0]).astype(np.int64) % 10)
        optimizer.step()
        moved = sum(p.data.size for name, p in state.parameters if not np.array_equal(p.data, before[name]))
    need = sum(int(np.prod(t.dims)) for t in onnx.load(str(file)).graph.initializer if t.name in set(want))
    return {"loads": "yes", "trains": f"{moved / max(need, 1):.0%}"}


def peers(which, files):
    for file in files:
        try:
            found = (by_onnx2torch if which == "onnx2torch" else by_ort_training)(Path(file))
        except BaseException as error:
            lines = str(error).strip().splitlines() or [""]
            found = {"loads": "no", "detail": f"{type(error).__name__}: {lines[-1][:100]}"}
        print(json.dumps({"file": Path(file).name, **found}), flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    what, *rest = sys.argv[1:]
    if what in ("onnx2torch", "ort-training"):
        peers(what, rest)
    else:
        folder = Path(rest[0])
        folder.mkdir(parents=True, exist_ok=True)
        if what == "torch":
            torch_files(folder, rest[1], rest[2:])
        else:
            {"optimise": optimise, "half": half, "keras": keras, "paddle": paddle}[what](folder, rest[1:])
