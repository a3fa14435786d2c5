"""`fgvc triton`: a bundle as a model of a Triton repository, which KServe's Triton runtime reads, too. No torch, no onnx.

NAME/config.pbtxt      inputs and outputs as the ONNX file has them, instances, a bounded queue
NAME/labels.txt        a class a line, for Triton's classification extension
NAME/preprocess.json   what a client does before (`network`: what the file does by itself), and labels.json and calibration.json
                       what it does after: Triton gets and gives tensors
NAME/1/model.onnx      the bundle's, byte for byte
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import onnxruntime

from fgvc.errors import FgvcError
from fgvc.io.files import making
from fgvc.runtime.bundle import NAME, Bundle
from fgvc.runtime.engine import Engine, file_of, load_session

Device = Literal["auto", "cpu", "gpu"]
TYPES = {
    "tensor(float)": "TYPE_FP32", "tensor(float16)": "TYPE_FP16", "tensor(double)": "TYPE_FP64", "tensor(uint8)": "TYPE_UINT8",
    "tensor(int64)": "TYPE_INT64", "tensor(int32)": "TYPE_INT32",
}  # fmt: skip
LABELS = "labels.txt"
CLIENT = ("preprocess.json", "labels.json", "calibration.json")  # the last one where the bundle has it
MAX_BATCH = 16
QUEUE = 64  # requests that wait; the next is refused
DEADLINE = 2_000_000  # microseconds in the queue; then refused uncomputed

_CONFIG = """\
# Written by fgvc from {source}.
name: {name}
platform: "onnxruntime_onnx"
max_batch_size: {max_batch}
{tensors}
version_policy {{ latest {{ num_versions: 1 }} }}
instance_group [ {{ kind: KIND_{device}, count: {instances} }} ]
# onnxruntime would take all of the host's cores, whatever the container's limit is. On CPUs give one instance a core.
parameters {{ key: "intra_op_thread_count", value: {{ string_value: "1" }} }}
"""
_QUEUE = """\
# Waiting is bounded: more requests than these are refused at once, those that waited too long uncomputed.
dynamic_batching {{
  default_queue_policy {{
    max_queue_size: {queue}
    timeout_action: REJECT
    default_timeout_microseconds: {deadline}
  }}
}}
"""


def write_model(
    bundle: Bundle, repository: Path, *, name: str | None = None, device: Device = "auto", instances: int = 1
) -> Path:
    """Write a model into `repository`, whole or not at all, and return its folder. `name`: the bundle's folder's by default.

    Raises FgvcError for a name that Triton or a URL can't carry, one that is there already, and a model that does not fit its
    bundle.
    """
    name = bundle.folder.resolve().name if name is None else name
    if not NAME.fullmatch(name):
        raise FgvcError(f"{name!r}: not a model's name (letters, digits, `.`, `_`, `-`); give one with --name")
    Engine(bundle, threads=1)
    text = config(bundle, name=name, device=device, instances=instances)
    with making(repository / name) as folder:
        (folder / "config.pbtxt").write_text(text, encoding="utf-8")
        (folder / LABELS).write_text("".join(f"{label}\n" for label in bundle.labels), encoding="utf-8")
        (folder / "1").mkdir()
        shutil.copyfile(bundle.model, folder / "1" / "model.onnx")
        for data in bundle.data:  # weights that the model keeps in other files
            shutil.copyfile(bundle.folder / data, folder / "1" / data)
        for file in CLIENT:
            if file in bundle.files:
                shutil.copyfile(bundle.folder / file, folder / file)
    return repository / name


def config(bundle: Bundle, *, name: str, device: Device, instances: int) -> str:
    """Text of config.pbtxt. Where the graph fixes its batch, Triton can't batch: the queue's bounds, which are the batcher's,
    fall away, and the sizes begin with the batch."""
    session = load_session(bundle.model)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    batched, classes = not isinstance(inputs[0].shape[0], int), file_of(bundle).output
    text = _CONFIG.format(
        source=f"the bundle whose model.onnx has the SHA-256 {bundle.files['model.onnx']}",
        name=_quoted(name),
        max_batch=MAX_BATCH if batched else 0,
        tensors="\n".join(
            [_tensor("input", port, batched=batched) for port in inputs]
            + [_tensor("output", port, batched=batched, labels=port.name == classes) for port in outputs]
        ),
        device=device.upper(),
        instances=instances,
    )
    return text + (_QUEUE.format(queue=QUEUE, deadline=DEADLINE) if batched else "")


def _tensor(kind: str, port: onnxruntime.NodeArg, *, batched: bool, labels: bool = False) -> str:
    if port.type not in TYPES:
        raise FgvcError(f"{port.name}: {port.type}; expected one of {', '.join(TYPES)}")
    dims = [size if isinstance(size, int) else -1 for size in (port.shape[1:] if batched else port.shape)]
    named = f", label_filename: {_quoted(LABELS)}" if labels else ""
    return f"{kind} [ {{ name: {_quoted(port.name)}, data_type: {TYPES[port.type]}, dims: {dims}{named} }} ]"


def _quoted(text: str) -> str:
    """Quote a string in protobuf's text format: an ONNX file may call its tensors anything."""
    return '"' + "".join(chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\{b:03o}" for b in text.encode()) + '"'
