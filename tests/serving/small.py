"""Bundles that are made in no time, whose answers are known by hand, and a server around them in a process of its own."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from fgvc.config.calibration import Calibration
from fgvc.config.images import Preprocess
from fgvc.runtime.bundle import write_bundle
from fgvc.serving.admission import Admission
from fgvc.serving.app import Service, make_app
from fgvc.serving.limits import Limits
from fgvc.serving.models import ModelRegistry

ROOT = Path(__file__).resolve().parents[2]
SIZE = 8
LABELS = ["red", "green", "蓝"]


def network(scale: float = 10, *, maps: bool = False, delay: int = 0) -> bytes:
    """Logits: the mean red, green and blue times `scale`. `maps`: the colours themselves, too, as class maps. `delay`: so many
    products of matrices 512 x 512 before the answer."""
    kernel = (scale * np.eye(3)).astype(np.float32).reshape(3, 3, 1, 1)
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["maps"]),
        helper.make_node("GlobalAveragePool", ["maps"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["sums" if delay else "logits"]),
    ]
    constants = [numpy_helper.from_array(kernel, "w")]
    if delay:
        nodes += _delay(delay)
        constants += [numpy_helper.from_array(np.zeros((512, 512), np.float32), "zeros")]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])]
    if maps:
        outputs.append(helper.make_tensor_value_info("maps", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE]))
    x = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])
    graph = helper.make_graph(nodes, "g", [x], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _delay(times: int) -> list[onnx.NodeProto]:
    """A chain of products that depends on the input, so that nothing of it can be worked out beforehand."""
    nodes = [
        helper.make_node("ReduceMean", ["input"], ["mean"], keepdims=0),
        helper.make_node("Add", ["zeros", "mean"], ["m0"]),
    ]
    nodes += [helper.make_node("MatMul", [f"m{n}", "zeros"], [f"m{n + 1}"]) for n in range(times)]
    nodes += [
        helper.make_node("ReduceMean", [f"m{times}"], ["nothing"], keepdims=0),
        helper.make_node("Add", ["sums", "nothing"], ["logits"]),
    ]
    return nodes


def save_bundle(
    folder: Path,
    scale: float = 10,
    *,
    explain: bool = True,
    delay: int = 0,
    calibration: Calibration | None = None,
    labels: Sequence[str] = LABELS,
    preprocess: Mapping[str, Any] | None = None,
) -> Path:
    """A bundle of `network`, in the place of an older one. `preprocess`: what it does otherwise."""
    own = {"size": (SIZE, SIZE), "resize": "squash", "crop_pct": 1.0, "mean": (0, 0, 0), "std": (1, 1, 1)}
    files: dict[str, Any] = {
        "model.onnx": network(scale, delay=delay),
        "labels.json": list(labels),
        "preprocess.json": Preprocess.model_validate(own | dict(preprocess or {})),
        "contract.json": {"num_classes": 3},
        "metrics.json": {},
    }
    files |= {"explain.onnx": network(scale, maps=True)} if explain else {}
    files |= {"calibration.json": calibration} if calibration else {}
    write_bundle(folder, files=files, overwrite=True)
    return folder


def service(places: dict[str, Path], limits: Limits | None = None) -> Service:
    return Service(ModelRegistry(places, threads=1), Admission(concurrency=1, queue=4), limits or Limits())


def ask(shared: Service, method: str, path: str, *, key: str | None = None, **options: Any) -> httpx.Response:
    transport = httpx.ASGITransport(make_app(shared, key=key), raise_app_exceptions=False)

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def picture(colour: tuple[int, int, int] = (255, 0, 0), kind: str = "PNG", size: tuple[int, int] = (20, 10)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, kind)
    return content.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of one bit a pixel: small on the wire."""
    content = io.BytesIO()
    Image.new("1", (width, height)).save(content, "PNG")
    return content.getvalue()


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[str]
    errors: Path  # stderr

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False, **options)

    def rss(self) -> int:
        """Resident memory in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.split("VmRSS:")[1].split()[0])

    def metric(self, line: str) -> float:
        """The value of one line of /metrics, its labels included; 0 where it is not there."""
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines()
        values = dict(each.rsplit(" ", 1) for each in lines)
        return float(values.get(line, 0))


@contextmanager
def serving(folder: Path, *arguments: object, code: str = "") -> Iterator[Server]:
    """`fgvc serve ...` on a free port, ended by SIGTERM. `folder`: for its stderr. `code`: another program, that prints the
    address as `fgvc serve` does."""
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "fgvc", "serve", "--port", "0"]
    errors = folder / "stderr.txt"
    with errors.open("w") as file:
        process = subprocess.Popen(
            [*command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=file, text=True, cwd=ROOT
        )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, errors.read_text()
        yield Server(url, process, errors)
        process.terminate()
        process.wait(30)
    finally:
        process.kill()
        process.communicate()
