"""int8 and fp16 graphs against what their definitions say, and against the float graph that they are made of."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from fgvc.errors import FgvcError
from fgvc.exporting import quantize
from fgvc.exporting.onnx import export_onnx, serialised
from fgvc.exporting.quantize import halve, needs_reduced_range, quantise
from fgvc.exporting.reference import randomise
from fgvc.models.backbone import plain_model
from fgvc.runtime.engine import OnnxSession, probabilities
from tests.models.onnxnet import small

SIZE = (32, 32)
IMAGES = np.random.default_rng(0).normal(size=(24, 3, *SIZE)).astype(np.float32)


def exported(batch: int | None = None, backbone: str = "test_efficientnet") -> onnx.ModelProto:
    net = plain_model(backbone, 5)
    randomise(net, 3)
    axes = {0: "batch"} if batch is None else {}
    return export_onnx(net.eval(), size=SIZE, exporter="torchscript", opset=20, axes=axes, batch=batch or 2)


def logits(proto: onnx.ModelProto, x: np.ndarray, *, literally: bool = False) -> np.ndarray:
    """`literally`: node by node, in float around the rounding, whatever integer instructions this CPU has."""
    options = onnxruntime.SessionOptions()
    if literally:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(serialised(proto), options)
    assert [(port.name, port.type) for port in session.get_inputs()] == [("input", "tensor(float)")]
    assert [(port.name, port.type) for port in session.get_outputs()] == [("logits", "tensor(float)")]
    return session.run(None, {"input": x})[0]


@pytest.fixture(scope="module")
def plain() -> onnx.ModelProto:
    return exported()


@pytest.fixture(scope="module")
def int8(plain: onnx.ModelProto) -> onnx.ModelProto:
    return quantise(plain, [IMAGES], first=2)


def stored(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def integer_layers(proto: onnx.ModelProto) -> list[str]:
    """Of the nodes with weights, in order, those whose weights come from an int8 tensor."""
    ready = {node.output[0]: node.input[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    values = stored(proto)
    layers = [node for node in proto.graph.node if node.op_type in ("Conv", "Gemm")]
    return [n.name for n in layers if n.input[1] in ready and values[ready[n.input[1]]].dtype == np.int8]


def rms(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).mean()))


def test_the_range_that_this_cpu_needs_keeps_its_integers_from_overflowing(plain: onnx.ModelProto) -> None:
    """Weights of 8 bits on an x86 CPU without VNNI are 0.28 apart here, of 7 bits 0.02."""
    fit = quantise(plain, [IMAGES], first=2, reduce_range=needs_reduced_range())
    z, z_int8 = logits(fit, IMAGES, literally=True), logits(fit, IMAGES)
    assert rms(z_int8 - z) < 0.1 * z.std()


def test_int8_says_nearly_what_float_says_and_keeps_the_ends_in_float(
    plain: onnx.ModelProto, int8: onnx.ModelProto
) -> None:
    z, z_int8 = logits(plain, IMAGES), logits(int8, IMAGES, literally=True)
    assert 0 < rms(z_int8 - z) < 0.1 * z.std()
    layers = [node.name for node in plain.graph.node if node.op_type in ("Conv", "Gemm")]
    assert set(integer_layers(int8)) == set(layers[2:-1])
    assert len(serialised(int8)) < 0.6 * len(serialised(plain))


def test_every_weight_is_the_nearest_of_its_channels_steps(plain: onnx.ModelProto, int8: onnx.ModelProto) -> None:
    floats, integers = stored(plain), stored(int8)
    names = [
        name.removesuffix("_quantized") for name, value in integers.items() if value.dtype == np.int8 and value.ndim == 4
    ]
    assert len(names) > 5
    for name in names:
        whole, scale = integers[f"{name}_quantized"].astype(np.float64), integers[f"{name}_scale"].astype(np.float64)
        assert scale.shape == (len(whole),)
        assert not integers[f"{name}_zero_point"].any()
        step = scale[:, None, None, None]
        nearest = np.clip(np.round(floats[name] / step), -127, 127)
        assert np.abs(whole - nearest).max() <= 1  # 1: a tie, in float32
        assert (whole == nearest).mean() > 0.99


def test_the_scale_beats_that_of_the_largest_weight_by_the_cost_it_is_chosen_for() -> None:
    weights = np.random.default_rng(1).normal(size=(50, 9))
    weights[7] = 0
    chosen = quantize._best_scales(weights, 127).astype(np.float64)
    naive = np.where(np.abs(weights).max(1) > 0, np.abs(weights).max(1) / 127, 1)

    def cost(scales: np.ndarray) -> np.ndarray:
        errors = [
            [min(max(round(w / s), -127), 127) * s - w for w in row] for row, s in zip(weights, scales, strict=True)
        ]
        return np.array([sum(e * e for e in row) + sum(row) ** 2 for row in errors])

    assert chosen[7] == 1
    assert (cost(chosen) <= 1.001 * cost(naive)).all()  # scales are float32
    assert cost(chosen).sum() < 0.75 * cost(naive).sum()


def test_a_reduced_range_has_seven_bits(plain: onnx.ModelProto) -> None:
    values = stored(quantise(plain, [IMAGES[:4]], first=2, reduce_range=True))
    largest = [np.abs(value.astype(int)).max() for value in values.values() if value.dtype == np.int8 and value.ndim == 4]
    assert max(largest) == 64


def test_an_activations_range_is_the_mean_of_its_batches(
    plain: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "BATCH", 8)
    quantised = quantise(plain, [IMAGES[:10], IMAGES[10:24]], first=2)  # batches of 8, 2, 8 and 6
    first = next(node for node in quantised.graph.node if node.op_type == "QuantizeLinear")
    probe = onnx.ModelProto()
    probe.CopyFrom(plain)
    probe.graph.output.append(onnx.helper.make_tensor_value_info(first.input[0], onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(serialised(probe))
    parts = [IMAGES[a:b] for a, b in ((0, 8), (8, 10), (10, 18), (18, 24))]
    activations = [session.run([first.input[0]], {"input": part})[0] for part in parts]
    low, high = (float(np.mean([pick(value) for value in activations])) for pick in (np.min, np.max))
    assert stored(quantised)[first.input[1]] == pytest.approx((max(high, 0) - min(low, 0)) / 255, rel=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_graph_of_fixed_batch_is_calibrated_in_such_batches(batch: int) -> None:
    fixed = exported(batch)
    quantised = quantise(fixed, [IMAGES[:7]], first=2)
    assert logits(quantised, IMAGES[:batch]).shape == (batch, 5)


def test_what_cannot_be_done_is_named(plain: onnx.ModelProto) -> None:
    with pytest.raises(FgvcError, match=r"int8: the network has \d+ layers, and the first 99"):
        quantise(plain, [IMAGES], first=99)
    with pytest.raises(FgvcError, match="onnxruntime can't quantise the graph"):
        quantise(plain, [])


def test_fp16_keeps_its_ports_and_nearly_its_logits(plain: onnx.ModelProto) -> None:
    halved = halve(plain)
    z, z_fp16 = logits(plain, IMAGES), logits(halved, IMAGES)
    np.testing.assert_allclose(z_fp16, z, rtol=0, atol=5e-3 * np.abs(z).max())
    assert (z_fp16 != z).any()
    assert {value.dtype for value in stored(halved).values() if value.ndim == 4} == {np.dtype(np.float16)}
    assert plain.graph.node[0].op_type != "Cast"  # the float graph stays as it is


def test_equal_graphs_and_images_give_equal_bytes_in_any_process(tmp_path: Path, plain: onnx.ModelProto) -> None:
    (tmp_path / "plain.onnx").write_bytes(serialised(plain))
    np.save(tmp_path / "images.npy", IMAGES[:4])
    code = (
        "import sys, numpy, onnx\nfrom fgvc.exporting.onnx import serialised\n"
        "from fgvc.exporting.quantize import halve, quantise\n"
        "plain = onnx.load(sys.argv[1] + '/plain.onnx')\nimages = numpy.load(sys.argv[1] + '/images.npy')\n"
        "for name, made in (('int8', quantise(plain, [images], first=2)), ('fp16', halve(plain))):\n"
        "    open(f'{sys.argv[1]}/{name}.onnx', 'wb').write(serialised(made))\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    assert (tmp_path / "int8.onnx").read_bytes() == serialised(quantise(plain, [IMAGES[:4]], first=2))
    assert (tmp_path / "fp16.onnx").read_bytes() == serialised(halve(plain))


def test_which_cpus_need_a_reduced_range(tmp_path: Path) -> None:
    def reads(text: str, machine: str = "x86_64") -> bool:
        (tmp_path / "cpuinfo").write_text(text)
        return needs_reduced_range(cpuinfo=tmp_path / "cpuinfo", machine=machine)

    assert reads("model name\t: old\nflags\t\t: fpu avx avx2 avx512f\n")
    assert not reads("flags\t\t: fpu avx2 avx_vnni\n")
    assert not reads("flags\t\t: fpu avx512_vnni avx512f\n")
    assert not reads("Features\t: asimd asimddp\n", machine="aarch64")
    assert needs_reduced_range(cpuinfo=tmp_path / "none", machine="AMD64")


@pytest.mark.parametrize("make", [small.bytes_in, small.plain, small.fixed_batch], ids=lambda make: make.__name__)
def test_a_file_of_another_program_is_calibrated_as_it_is_fed(make: Callable[[], onnx.ModelProto]) -> None:
    """Bytes, channels last; batches of one."""
    model = make()
    for node in model.graph.node:  # float layers are told by their names
        node.name = node.name or node.output[0]
    x = np.random.default_rng(1).integers(0, 256, (6, 3, small.SIZE, small.SIZE)).astype(np.float32)
    x = x if make is small.bytes_in else x / 255
    proto = quantise(model, [x], first=0)
    assert integer_layers(proto)
    float_, int8_ = (probabilities(OnnxSession(serialised(each)).logits(x), None) for each in (model, proto))
    assert OnnxSession(serialised(proto)).file.dtype == ("uint8" if make is small.bytes_in else "float32")
    np.testing.assert_allclose(int8_, float_, atol=0.05)
