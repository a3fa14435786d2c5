"""The Open Inference Protocol v2 with the binary tensor extension, as in Triton: one input as the file takes
it, the numbers of the classes as the file gives them.

The specification's text has slips; what counts is that tritonclient works unmodified.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from reprlib import repr  # bounded: a client's own megabytes don't come back
from typing import Any

import numpy as np

from fgvc.serving.bodies import length_of
from fgvc.serving.limits import Refusal
from fgvc.serving.models import VERSION, LoadedModel

HEADER_LENGTH = "Inference-Header-Content-Length"
# More than any sensible request has. Parsing holds Python's lock, and its result takes up to 20 times the bytes.
_JSON_BYTES, _CONTAINERS, _QUOTES = 16 << 20, 200_000, 10_000


TYPES = {"float32": "FP32", "float16": "FP16", "float64": "FP64", "uint8": "UINT8"}  # of tensors, by numpy's names


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """A valid inference request."""

    x: np.ndarray  # (B, ...) in the layout and type of the file
    id: str | None
    binary: bool  # whether the answer goes back as bytes


def server_metadata() -> dict[str, Any]:
    """Metadata of the server, as the protocol's `/v2` gives them."""
    return {"name": "fgvc", "version": version("fgvc"), "extensions": ["binary_tensor_data", "model_repository"]}


def model_metadata(served: LoadedModel) -> dict[str, Any]:
    """Metadata of a model, as the protocol's `/v2/models/NAME` gives them: its inputs and outputs, -1 for the batch."""
    session = served.engine.session
    datatype = TYPES[session.file.dtype]
    return {
        "name": served.name,
        "versions": [VERSION],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": session.input, "datatype": datatype, "shape": [-1, *served.input_shape]}],
        "outputs": [{"name": session.outputs[0], "datatype": TYPES[session.file.gives], "shape": [-1, len(served.labels)]}],
    }


def infer(
    served: LoadedModel, body: bytes, headers: Mapping[str, str], *, batch: int, limit: int
) -> tuple[bytes, int | None]:
    """Answer a request: the response's body, and the length of its JSON where bytes follow. `limit`: of an unpacked body.

    Raises Refusal: 400, 413, 415.
    """
    request = parse(served, unpack(body, headers.get("content-encoding"), limit), headers.get(HEADER_LENGTH), batch=batch)
    return answer(served, request, served.engine.session.infer(request.x)[0])


def unpack(body: bytes, encoding: str | None, limit: int) -> bytes:
    """Undo gzip or deflate, into `limit` bytes at most. Raises Refusal: 400, 413, 415."""
    if encoding in (None, "", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise Refusal(415, f"Content-Encoding {repr(encoding)}: gzip, deflate or none is understood")
    stream = zlib.decompressobj(wbits=47 if encoding == "gzip" else 15)
    try:
        content = stream.decompress(body, limit)
    except zlib.error:
        raise Refusal(400, f"the body is not {encoding}") from None
    if stream.unconsumed_tail:
        raise Refusal(413, f"the unpacked body has more than {limit} bytes")
    if not stream.eof or stream.unused_data:
        raise Refusal(400, f"the body is not all of one {encoding} stream")
    return content


def parse(served: LoadedModel, body: bytes, header_length: str | None, *, batch: int) -> InferenceRequest:
    """Parse a request's body. Raises Refusal (400) for whatever this model does not take."""
    length = len(body)
    if header_length is not None:
        declared = length_of(header_length)
        if declared is None or declared > length:
            raise Refusal(400, f"{HEADER_LENGTH} is not a length within the body")
        length = declared
    tree = _json(body[:length])
    session = served.engine.session
    inputs = tree.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise Refusal(400, f"expected one input, {session.input!r}")
    tensor = inputs[0]
    if tensor.get("name") != session.input:
        raise Refusal(400, f"unexpected input {repr(tensor.get('name'))}, the model has {session.input!r}")
    datatype = TYPES[session.file.dtype]
    if tensor.get("datatype") != datatype:
        raise Refusal(400, f"input {session.input!r}: datatype {datatype} is expected, not {repr(tensor.get('datatype'))}")
    shape = _shape(tensor.get("shape"), served, batch)
    size = _parameters(tensor).get("binary_data_size")
    if size is None:
        if header_length is not None and length != len(body):
            raise Refusal(400, "bytes follow the JSON, but no input has a binary_data_size")
        values = _numbers(tensor.get("data"), np.dtype(session.file.dtype))
    else:
        values = _bytes(memoryview(body)[length:], size, np.dtype(session.file.dtype).newbyteorder("<"))
    if values.size != math.prod(shape):
        raise Refusal(400, f"input {session.input!r}: {values.size} values for shape {list(shape)}")
    if not np.isfinite(values).all():
        raise Refusal(400, f"input {session.input!r}: has values that are not finite")
    name = tree.get("id")
    if name is not None and not isinstance(name, str):
        raise Refusal(400, "id: expected a string")
    return InferenceRequest(values.reshape(shape), name, _wants_bytes(tree, session.outputs[0]))


def answer(served: LoadedModel, request: InferenceRequest, scores: np.ndarray) -> tuple[bytes, int | None]:
    """Return the response's body for the file's answers (B,K), or with axes of one, and its JSON's length where bytes follow.
    Raises Refusal 400 for answers that are not finite, where JSON is to hold them."""
    scores = scores.reshape(len(scores), -1)
    output: dict[str, Any] = {
        "name": served.engine.session.outputs[0], "datatype": TYPES[scores.dtype.name], "shape": list(scores.shape)
    }  # fmt: skip
    content = b""
    if request.binary:
        content = np.ascontiguousarray(scores, dtype=scores.dtype.newbyteorder("<")).tobytes()
        output["parameters"] = {"binary_data_size": len(content)}
    elif np.isfinite(scores).all():
        output["data"] = scores.ravel().tolist()
    else:
        raise Refusal(400, "the logits are not finite, which JSON can't hold; the input is far out of range")
    tree = {"model_name": served.name, "model_version": VERSION, "outputs": [output]}
    if request.id is not None:
        tree["id"] = request.id
    head = json.dumps(tree).encode()
    return head + content, len(head) if request.binary else None


def _json(text: bytes) -> dict[str, Any]:
    if len(text) > _JSON_BYTES:
        raise Refusal(413, f"the JSON has more than {_JSON_BYTES} bytes; send large tensors as bytes")
    if text.count(b"[") + text.count(b"{") > _CONTAINERS or text.count(b'"') > _QUOTES:
        raise Refusal(400, "the JSON has too many elements; send large tensors as bytes")
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        raise Refusal(400, "the request is not valid JSON") from None
    if not isinstance(tree, dict):
        raise Refusal(400, "expected a JSON object")
    return tree


def _shape(shape: Any, served: LoadedModel, batch: int) -> tuple[int, ...]:
    expected = served.input_shape
    if (
        not isinstance(shape, list)
        or [type(n) for n in shape] != [int] * 4
        or tuple(shape[1:]) != expected
        or not 1 <= shape[0] <= batch
    ):
        sizes = ",".join(map(str, expected))
        raise Refusal(400, f"expected the shape [B,{sizes}] with B from 1 to {batch}")
    return tuple(shape)


def _numbers(data: Any, dtype: np.dtype[Any]) -> np.ndarray:
    """Values of nested or flat lists, row by row."""
    if not isinstance(data, list):
        raise Refusal(400, "the input's data: expected a list of numbers")
    while (kinds := set(map(type, data))) == {list}:
        data = list(chain.from_iterable(data))
    if not kinds <= {int, float}:
        raise Refusal(400, "the input's data: expected numbers alone, all nested as deep")
    if dtype.kind == "u" and not all(type(number) is int and 0 <= number <= 255 for number in data):
        raise Refusal(400, "the input's data: expected whole numbers from 0 to 255 alone")
    try:
        with np.errstate(over="ignore"):  # what is too large for the type is then not finite
            return np.array(data, dtype=dtype)
    except OverflowError:
        raise Refusal(400, "the input's data: a number is too large") from None


def _bytes(content: memoryview, size: Any, dtype: np.dtype[Any]) -> np.ndarray:
    if type(size) is not int or size != len(content) or size % dtype.itemsize:
        each = "one makes" if dtype.itemsize == 1 else f"{dtype.itemsize} make"
        raise Refusal(400, f"binary_data_size is {repr(size)}, {len(content)} bytes follow the JSON; {each} a value")
    values = np.frombuffer(content, dtype=dtype)
    return values if values.flags.aligned else values.copy()  # behind JSON of any length floats may lie across words


def _wants_bytes(tree: Mapping[str, Any], name: str) -> bool:
    requested = tree.get("outputs")
    if requested is None:
        return bool(_parameters(tree).get("binary_data_output", False))
    if not isinstance(requested, list) or len(requested) != 1 or not isinstance(requested[0], dict):
        raise Refusal(400, f"outputs: the model has one, {name!r}")
    if requested[0].get("name") != name:
        raise Refusal(400, f"unexpected output {repr(requested[0].get('name'))}, the model has {name!r}")
    parameters = _parameters(requested[0])
    if parameters.get("classification"):
        raise Refusal(400, "outputs: the classification extension is not offered; see /v1/classify")
    return bool(parameters.get("binary_data", _parameters(tree).get("binary_data_output", False)))


def _parameters(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = tree.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise Refusal(400, "parameters: expected a JSON object")
    return parameters
