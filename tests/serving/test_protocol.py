"""The tensor protocol, byte by byte: what is understood, and that nothing else gets through."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fgvc.serving.limits import Refusal
from fgvc.serving.models import LoadedModel, ModelRegistry
from fgvc.serving.protocol import HEADER_LENGTH, answer, infer, parse, unpack
from tests.serving.small import SIZE, save_bundle

SHAPE = [2, 3, SIZE, SIZE]
X = np.random.default_rng(0).random(SHAPE, dtype=np.float32)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = save_bundle(tmp_path_factory.mktemp("bundle") / "a")
    return ModelRegistry({"a": folder}, threads=1).get("a")


def request(**changed: Any) -> dict[str, Any]:
    tensor = {"name": "input", "datatype": "FP32", "shape": SHAPE, "data": X.ravel().tolist()}
    return {"inputs": [tensor | changed]}


def as_bytes(x: np.ndarray, **changed: Any) -> tuple[bytes, str]:
    content = x.astype("<f4").tobytes()
    tensor = {"name": "input", "datatype": "FP32", "shape": list(x.shape)}
    tensor["parameters"] = {"binary_data_size": len(content)}
    head = json.dumps({"inputs": [tensor | changed]}).encode()
    return head + content, str(len(head))


def refusal(served: LoadedModel, body: bytes, length: str | None = None) -> str:
    with pytest.raises(Refusal) as caught:
        parse(served, body, length, batch=4)
    assert caught.value.status in (400, 413)
    return caught.value.message


@pytest.mark.parametrize("data", [X.ravel().tolist(), X.tolist(), X.reshape(2, -1).tolist()])
def test_numbers_nested_or_not(served: LoadedModel, data: list) -> None:
    query = parse(served, json.dumps(request(data=data) | {"id": "7"}).encode(), None, batch=4)
    np.testing.assert_array_equal(query.x, X)
    assert (query.id, query.binary) == ("7", False)
    body, length = answer(served, query, served.engine.logits(query.x))
    assert length is None
    tree = json.loads(body)
    assert (tree["model_name"], tree["model_version"], tree["id"]) == ("a", "1", "7")
    (output,) = tree["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [2, 3])
    np.testing.assert_allclose(np.reshape(output["data"], (2, 3)), 10 * X.mean((2, 3)), rtol=1e-5)


@pytest.mark.parametrize("encoding", [None, "gzip", "deflate"])
def test_bytes_in_and_bytes_out(served: LoadedModel, encoding: str | None) -> None:
    body, length = as_bytes(X, name="input")
    tree = json.loads(body[: int(length)]) | {"parameters": {"binary_data_output": True}}
    head = json.dumps(tree).encode()
    body = head + body[int(length) :]
    packed = {None: lambda b: b, "gzip": gzip.compress, "deflate": zlib.compress}[encoding](body)
    headers = {HEADER_LENGTH: str(len(head))} | ({"content-encoding": encoding} if encoding else {})
    content, json_length = infer(served, packed, headers, batch=4, limit=1 << 20)
    assert json_length is not None
    (output,) = json.loads(content[:json_length])["outputs"]
    assert output["parameters"] == {"binary_data_size": 24}
    logits = np.frombuffer(content[json_length:], "<f4").reshape(output["shape"])
    np.testing.assert_allclose(logits, 10 * X.mean((2, 3)), rtol=1e-5)


@pytest.mark.parametrize(
    ("outputs", "binary"),
    [
        ([{"name": "logits"}], False),
        ([{"name": "logits", "parameters": {"binary_data": True}}], True),
        ([{"name": "logits", "parameters": {"binary_data": False}}], False),
    ],
)
def test_the_output_is_as_asked(served: LoadedModel, outputs: list, binary: bool) -> None:
    assert parse(served, json.dumps(request() | {"outputs": outputs}).encode(), None, batch=4).binary is binary


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "x"}, "unexpected input 'x', the model has 'input'"),
        ({"datatype": "FP64"}, "FP32 is expected"),
        ({"datatype": None}, "FP32 is expected"),
        ({"shape": [2, 3, SIZE]}, "expected the shape"),
        ({"shape": [0, 3, SIZE, SIZE]}, "B from 1 to 4"),
        ({"shape": [5, 3, SIZE, SIZE]}, "B from 1 to 4"),
        ({"shape": [-1, 3, SIZE, SIZE]}, "expected the shape"),
        ({"shape": [True, 3, SIZE, SIZE]}, "expected the shape"),
        ({"shape": [2.0, 3, SIZE, SIZE]}, "expected the shape"),
        ({"shape": [10**30, 3, SIZE, SIZE]}, "expected the shape"),
        ({"shape": "2388"}, "expected the shape"),
        ({"data": None}, "expected a list"),
        ({"data": []}, "0 values"),
        ({"data": [1.0] * 383}, "383 values"),
        ({"data": [1.0] * 383 + ["1"]}, "numbers alone"),
        ({"data": [1.0] * 383 + [True]}, "numbers alone"),
        ({"data": [1.0] * 383 + [None]}, "numbers alone"),
        ({"data": [1.0] * 383 + [[1.0]]}, "all nested as deep"),
        ({"data": [1.0] * 383 + [1e39]}, "not finite"),
        ({"data": [1.0] * 383 + [10**400]}, "too large"),
        ({"parameters": {"binary_data_size": 4}}, "binary_data_size"),
        ({"parameters": {"binary_data_size": "x"}}, "binary_data_size"),
        ({"parameters": [1]}, "expected a JSON object"),
    ],
)
def test_inputs_that_do_not_fit(served: LoadedModel, changed: dict, message: str) -> None:
    assert message in refusal(served, json.dumps(request(**changed)).encode())


@pytest.mark.parametrize(
    "tree",
    [
        [], "x", 1, None, {}, {"inputs": {}}, {"inputs": []}, {"inputs": [1]}, {"inputs": request()["inputs"] * 2},
        request() | {"id": 1}, request() | {"outputs": []}, request() | {"outputs": [{"name": "x"}]},
        request() | {"outputs": [{"name": "logits", "parameters": {"classification": 3}}]}, request() | {"parameters": 1},
    ],
)  # fmt: skip
def test_json_that_is_no_request_is_refused(served: LoadedModel, tree: Any) -> None:
    refusal(served, json.dumps(tree).encode())


def test_wrong_lengths_of_binary_data_are_refused(served: LoadedModel) -> None:
    body, length = as_bytes(X)
    assert parse(served, body, length, batch=4).x.shape == X.shape
    for wrong in ("-1", "x", "", "1e3", "٣", str(len(body) + 1), "9" * 5000, str(int(length) + 4), "0"):
        refusal(served, body, wrong)
    refusal(served, body[:-4], length)
    refusal(served, body + b"\0\0\0\0", length)
    refusal(served, body, None)
    plain = json.dumps(request()).encode()
    assert "bytes follow the JSON" in refusal(served, plain + b"x", str(len(plain)))
    refusal(served, *as_bytes(np.full_like(X, np.nan)))
    refusal(served, *as_bytes(np.full_like(X, np.inf)))


def test_json_that_would_grow(served: LoadedModel) -> None:
    assert "too many elements" in refusal(served, b"[" + b"[]," * 300_000 + b"[]]")
    assert "too many elements" in refusal(served, b"[" + b'"ab",' * 300_000 + b"1]")
    assert "not valid JSON" in refusal(served, b"[" * 100_000)
    assert "send large tensors as bytes" in refusal(served, b"1" * (17 << 20))
    message = refusal(served, json.dumps(request(name="x" * 1_000_000)).encode())
    assert len(message) < 200  # a client's own megabytes don't come back


def test_logits_that_json_can_not_hold(served: LoadedModel) -> None:
    query = parse(served, json.dumps(request()).encode(), None, batch=4)
    with pytest.raises(Refusal, match="not finite"):
        answer(served, query, np.full((2, 3), np.inf, np.float32))


def test_a_packed_bomb_is_not_unpacked() -> None:
    bomb = gzip.compress(bytes(50 << 20))
    with pytest.raises(Refusal) as caught:
        unpack(bomb, "gzip", 1 << 20)
    assert caught.value.status == 413
    assert unpack(gzip.compress(b"x" * 100), "gzip", 100) == b"x" * 100
    for body, encoding, status in (
        (b"junk", "gzip", 400), (b"junk", "deflate", 400), (gzip.compress(b"x")[:-9], "gzip", 400),
        (gzip.compress(b"x") * 2, "gzip", 400), (b"", "gzip", 400), (b"x", "br", 415),
    ):  # fmt: skip
        with pytest.raises(Refusal) as caught:
            unpack(body, encoding, 100)
        assert caught.value.status == status


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
KEYS = st.sampled_from(["name", "datatype", "shape", "data", "parameters"])


@settings(max_examples=300, deadline=None)
@given(
    changed=st.dictionaries(KEYS, JSON, max_size=2),
    added=st.dictionaries(st.sampled_from(["id", "outputs", "parameters"]), JSON),
)
@example(changed={}, added={"id": "\ud800"})
def test_any_json_is_answered_or_refused(served: LoadedModel, changed: dict, added: dict) -> None:
    body = json.dumps(request(**changed) | added).encode()
    assert answered_or_refused(served, body, {})


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_is_answered_or_refused(served: LoadedModel, data: st.DataObject) -> None:
    body, length = as_bytes(X[:1])
    changed = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, int(length) + 8))] = data.draw(st.integers(0, 255))
    assert answered_or_refused(served, bytes(changed), {HEADER_LENGTH: length})


def answered_or_refused(served: LoadedModel, body: bytes, headers: dict[str, str]) -> bool:
    try:
        content, length = infer(served, body, headers, batch=4, limit=1 << 20)
    except Refusal as error:
        return error.response().status_code in (400, 413)
    return json.loads(content[:length])["model_name"] == "a"
