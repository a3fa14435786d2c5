"""The routes, without a socket."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fgvc.config.calibration import Calibration
from fgvc.errors import FgvcError
from fgvc.runtime.engine import Engine
from fgvc.serving.api_key import read_key
from fgvc.serving.app import FastPathMiddleware, Service, make_app
from fgvc.serving.limits import Limits
from fgvc.serving.page import CSP, PAGE
from tests.serving.small import LABELS, ROOT, SIZE, ask, bomb, picture, save_bundle, service

CALIBRATION = Calibration(
    temperature=2.0, threshold=0.5, keep=0.95, fitted_on="val", images=80, nll_before=1, nll_after=1, ece_before=0.2,
    ece_after=0.1, kept=0.95, coverage=0.9, accuracy=0.8,
)  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder = tmp_path_factory.mktemp("bundles")
    places = {
        "colours": save_bundle(folder / "a"),
        "calibrated": save_bundle(folder / "b", explain=False, calibration=CALIBRATION),
    }
    return service(places)


def test_the_page_is_open_and_may_run_its_own_script_alone(shared: Service) -> None:
    for key in (None, "secret"):
        answer = ask(shared, "GET", "/", key=key)
        assert answer.status_code == 200
        assert answer.text == PAGE
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert answer.headers["content-security-policy"] == CSP
    assert "/" not in ask(shared, "GET", "/openapi.json").json()["paths"]


def test_health_models_and_metadata_are_answered(shared: Service) -> None:
    for method in ("GET", "HEAD"):
        assert ask(shared, method, "/v2/health/live").status_code == 200
        assert ask(shared, method, "/v2/health/ready").status_code == 200
    assert ask(shared, "GET", "/v2").json()["name"] == "fgvc"
    assert ask(shared, "GET", "/v2/models").json() == {
        "models": [
            {"name": "colours", "versions": ["1"], "classes": 3, "explain": True},
            {"name": "calibrated", "versions": ["1"], "classes": 3, "explain": False},
        ]
    }
    expected = {
        "name": "colours",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 3, SIZE, SIZE]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 3]}],
    }
    assert ask(shared, "GET", "/v2/models/colours").json() == expected
    assert ask(shared, "GET", "/v2/models/colours/versions/1").json() == expected
    assert ask(shared, "GET", "/v2/models/colours/versions/1/ready").status_code == 200
    assert ask(shared, "GET", "/v2/models/colours/versions/2").status_code == 404
    paths = ask(shared, "GET", "/openapi.json").json()["paths"]
    assert {"/v1/classify", "/v1/explain", "/v2/models/{model}/infer"} <= set(paths)
    assert ask(shared, "GET", "/docs").status_code == 404  # FastAPI's would load its scripts from elsewhere


def test_classes_by_hand(shared: Service) -> None:
    response = ask(shared, "POST", "/v1/classify?top_k=2", content=picture((255, 0, 0)))
    assert response.status_code == 200
    body = response.json()
    assert set(body) == {"model", "predictions", "rejected", "calibrated", "milliseconds"}
    assert (body["model"], body["rejected"]) == ("colours", False)
    assert [(row["label"], row["index"]) for row in body["predictions"]] == [("red", 0), ("green", 1)]
    assert body["predictions"][0]["probability"] == pytest.approx(np.e**10 / (np.e**10 + 2))
    spent = body["milliseconds"]
    assert spent["total"] == pytest.approx(spent["wait"] + spent["decode"] + spent["classify"], abs=0.01)

    body = ask(shared, "POST", "/v1/classify?model=calibrated&top_k=99", content=picture((0, 0, 0), "BMP")).json()
    assert [row["label"] for row in body["predictions"]] == LABELS
    assert body["rejected"] is True  # 1/3 each, and the threshold is 1/2
    body = ask(shared, "POST", "/v1/classify?model=calibrated", content=picture((51, 0, 0), "PNG")).json()
    assert body["predictions"][0]["probability"] == pytest.approx(np.e / (np.e + 2), rel=1e-5)  # 51/255 * 10 / 2


@pytest.mark.parametrize("name", ["image", "whatever"])
def test_a_form_with_one_file_is_the_same(shared: Service, name: str) -> None:
    form = {name: ("x.webp", picture((0, 0, 255), "WEBP"), "image/webp")}
    body = ask(shared, "POST", "/v1/classify", files=form, data={"note": "x"}).json()
    assert body["predictions"][0]["label"] == "蓝"
    two = [("a", ("a.png", picture())), ("b", ("b.png", picture()))]
    for files in (two, [("a", (None, "text"))]):
        assert ask(shared, "POST", "/v1/classify", files=files).status_code == 400


def test_the_heat_map_lies_where_the_class_is(shared: Service) -> None:
    two_colours = np.zeros((40, 40, 3), np.uint8)
    two_colours[:, :20, 0] = two_colours[:, 20:, 2] = 255  # red on the left, blue on the right
    content = io.BytesIO()
    Image.fromarray(two_colours).save(content, "PNG")
    plain = np.asarray(Image.fromarray(two_colours).resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=float)
    for target, bright, label in (("red", 0, "red"), ("蓝", -1, "%E8%93%9D"), ("predicted", 0, "red")):
        response = ask(shared, "POST", "/v1/explain", params={"target": target}, content=content.getvalue())
        assert response.headers["content-type"] == "image/png"
        assert response.headers["x-target-label"] == label
        heat_map = Image.open(io.BytesIO(response.content))
        assert heat_map.size == (SIZE, SIZE)
        green = (np.asarray(heat_map, dtype=float) - 0.45 * plain)[:, :, 1].mean(axis=0)  # only the heat has any
        assert green[bright] > green[-1 - bright] + 50


def test_refusals_have_a_status_and_a_reason(shared: Service) -> None:
    for path, status, message in (
        ("/v1/classify?model=nope", 404, "no model 'nope'"),
        ("/v1/classify?top_k=0", 400, "top_k"),
        ("/v1/classify?top_k=x", 400, "top_k"),
        ("/v1/explain?model=calibrated", 409, "no explain.onnx"),
        ("/v1/explain?target=purple", 400, "no class 'purple'"),
        ("/v2/models/nope/infer", 404, "no model 'nope'"),
        ("/v2/models/colours/versions/7/infer", 404, "version 1 only"),
        ("/nowhere", 404, "Not Found"),
        ("/v2/models/..%2f..%2fetc%2fpasswd/infer", 404, ""),
        ("/v2/models/%2e%2e/infer", 404, ""),
        ("/v1/classify?model=../../etc/passwd", 404, ""),
        ("/v1/classify?model=%00", 404, ""),
        ("/v2/health/live", 405, "Method Not Allowed"),
    ):
        response = ask(shared, "POST", path, content=picture())
        assert response.status_code == status, path
        assert message in response.json()["error"]
        assert list(response.json()) == ["error"]


def test_the_fast_path_answers_as_the_router(shared: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, 3, SIZE, SIZE], "data": [0.5] * 3 * SIZE**2}
    good = json.dumps({"inputs": [tensor]}).encode()
    requests = [
        *((f"/v1/classify{query}", picture()) for query in (
            "", "?", "?top_k=2", "?top_k=02", "?top_k=0", "?top_k=-1", "?top_k=", "?top_k=x", "?top_k=%32", "?top_k=1&top_k=2",
            "?top_k=" + "9" * 30, "?top_k=²", "?model=calibrated", "?model=", "?model=nope", "?model=%ff",
            "?model=a&model=calibrated", "?target=x", "?model=calibrated&x=1&top_k=1", "?%00",
        )),
        *((f"/v2/models/{name}", good) for name in (
            "colours/infer", "colours/versions/1/infer", "colours/versions/2/infer", "colours/versions//infer", "/infer",
            "nope/infer", "colours/infer/", "col%6furs/infer", "%2e%2e/infer", "a/b/infer", "colours/infer?x=1",
            "colours%0a/infer",
        )),
        ("/v2/models/colours/infer", b"{"), ("/v1/classify", b""), ("/v1/classify/", picture()), ("/v1/explain", picture()),
    ]  # fmt: skip
    both = []
    for direct in (True, False):
        if not direct:
            monkeypatch.setattr(FastPathMiddleware, "_match", lambda self, scope: None)
        answers = []
        for path, body in requests:
            response = ask(shared, "POST", path, content=body)
            content: Any = response.content if response.headers["content-type"] == "image/png" else response.json()
            if isinstance(content, dict) and "milliseconds" in content:
                del content["milliseconds"]
            answers.append((path, response.status_code, response.headers["content-type"], content))
        both.append(answers)
    for one, other in zip(*both, strict=True):
        assert one == other
    assert {row[1] for row in both[0]} == {200, 400, 404, 422}


def test_bytes_that_are_no_usable_picture_are_refused(shared: Service) -> None:
    good = picture((1, 2, 3), "JPEG", (200, 100))
    gif = io.BytesIO()
    Image.new("RGB", (4, 4)).save(gif, "GIF")
    for content, status, message in (
        (b"", 422, "empty"),
        (b"hello", 415, "none of JPEG, PNG, WEBP, BMP"),
        (gif.getvalue(), 415, "none of"),
        (good[: len(good) // 2], 422, "can't be used"),
        (good[:20], 415, "none of"),
        (bomb(7100, 7100), 422, "too many pixels"),
        (bomb(20000, 20000), 422, "too many pixels: 400 megapixels, the limit is 50"),
        (b"x" * (11 << 20), 413, "more than"),
    ):
        for route in ("/v1/classify", "/v1/explain"):
            response = ask(shared, "POST", route, content=content)
            assert response.status_code == status, (content[:20], response.text)
            assert message in response.json()["error"], (content[:20], response.text)
            assert "data." not in response.json()["error"], "a recipe's key is none of the client's"


def test_bytes_without_a_declared_length_are_cut_off_while_they_come(tmp_path: Path) -> None:
    small = service({"a": save_bundle(tmp_path / "a")}, Limits(image_bytes=1000))
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        for _ in range(100_000):
            sent += 100
            yield b"x" * 100

    response = ask(small, "POST", "/v1/classify", content=endless())
    assert (response.status_code, response.headers.get("connection")) == (413, "close")
    assert small.bodies.bytes == 0
    # What is not read is swallowed, so that the client reads its answer; see middleware.LingerMiddleware.
    assert sent < 65 << 20


def test_an_overloaded_server_refuses_before_it_reads_the_body(tmp_path: Path) -> None:
    full = service({"a": save_bundle(tmp_path / "a")})
    full.admission.running, full.admission.queue = full.admission.concurrency, 0
    messages: list[Any] = []

    async def never() -> Any:
        raise AssertionError("nothing is read")

    async def note(message: Any) -> None:
        messages.append(message)

    for length in (b"1000", b"400000"):
        headers = [(b"host", b"x"), (b"content-length", length)]
        scope = {"type": "http", "method": "POST", "path": "/v1/classify", "query_string": b"", "headers": headers}
        asyncio.run(make_app(full)(scope, never, note))
    for start, body in zip(messages[::2], messages[1::2], strict=True):
        assert start["status"] == 503
        assert (b"retry-after", b"1") in start["headers"]
        assert (b"connection", b"close") not in start["headers"]
        assert json.loads(body["body"]) == {"error": "the queue is full; try again"}
    text = ask(full, "GET", "/metrics").text
    assert 'fgvc_rejected_total{reason="queue_full"} 2.0' in text
    assert 'fgvc_requests_total{code="503",route="other"} 2.0' in text
    full.admission.draining = True
    assert ask(full, "POST", "/v1/classify", content=picture()).json() == {"error": "the server is shutting down"}


def test_all_bodies_together_are_bounded(tmp_path: Path) -> None:
    small = service({"a": save_bundle(tmp_path / "a")}, Limits(held_bytes=500))
    response = ask(small, "POST", "/v1/classify", content=b"x" * 501)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert small.bodies.bytes == 0
    assert ask(small, "POST", "/v1/classify", content=picture()).status_code == 200
    assert b'fgvc_rejected_total{reason="memory"} 1.0' in small.metrics.text()


def test_out_of_memory_costs_one_request(shared: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError(), _onnxruntimes("Failed to allocate memory for requested buffer of size 99")):
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "classify", _raising(error))
            response = ask(shared, "POST", "/v1/classify", content=picture())
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert ask(shared, "POST", "/v1/classify", content=picture()).status_code == 200


def test_an_unexpected_error_is_a_500_without_details(shared: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "classify", _raising(KeyError("secret")))
    response = ask(shared, "POST", "/v1/classify", content=picture())
    assert (response.status_code, response.json()) == (500, {"error": "internal error"})


def _raising(error: Exception) -> Any:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


def _onnxruntimes(message: str) -> Exception:
    from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

    return RuntimeException(message)


def test_requests_need_the_key(shared: Service) -> None:
    for path in ("/v2/health/live", "/v2/health/ready"):
        assert ask(shared, "GET", path, key="sesame").status_code == 200
    for path in ("/v2", "/v2/models", "/metrics", "/openapi.json", "/v2/models/colours", "/nowhere"):
        for headers in ({}, {"x-api-key": "sesam"}, {"authorization": "Basic sesame"}, {"x-api-key": "sésame"}):
            raw = {name: value.encode() for name, value in headers.items()}
            response = ask(shared, "GET", path, key="sesame", headers=raw)
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        for headers in ({"x-api-key": "sesame"}, {"authorization": "Bearer sesame"}):
            assert ask(shared, "GET", path, key="sesame", headers=headers).status_code != 401
    assert ask(shared, "POST", "/v1/classify", key="sesame", content=picture()).status_code == 401


def test_the_key_is_read_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FGVC_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("FGVC_API_KEY", "from-environment")
    assert read_key(None) == "from-environment"
    path = tmp_path / "key"
    path.write_text("from-file\n")
    assert read_key(path) == "from-file"
    for text in ("", " \n", "two words", "schlüssel", "two\nlines"):
        path.write_text(text)
        with pytest.raises(FgvcError, match="an API key is"):
            read_key(path)
    with pytest.raises(FgvcError, match="can't read the API key"):
        read_key(tmp_path / "none")
    monkeypatch.setenv("FGVC_API_KEY", "")
    with pytest.raises(FgvcError, match="FGVC_API_KEY: an API key is"):
        read_key(None)


def test_metrics_know_routes_and_codes_and_nothing_of_clients(shared: Service) -> None:
    for path in ("/v1/classify", "/v1/classify?model=secret", "/secret"):
        ask(shared, "POST", path, content=picture())
    text = ask(shared, "GET", "/metrics").text
    for line in (
        'fgvc_requests_total{code="200",route="/v1/classify"}',
        'fgvc_requests_total{code="404",route="/v1/classify"}',
        'fgvc_requests_total{code="404",route="other"}',
        'fgvc_request_seconds_count{route="/v1/classify"}',
        'fgvc_reload_failures_total{model="colours"} 0.0',
        "fgvc_queue_depth 0.0",
        "fgvc_in_flight 0.0",
        "process_resident_memory_bytes",
    ):
        assert f"\n{line}" in text
    assert "secret" not in text


@pytest.mark.skipif("FGVC_SHARED" not in os.environ, reason="needs real images")
def test_the_same_answers_as_the_engine_on_real_images(shared: Service) -> None:
    root = Path(os.environ["FGVC_SHARED"]) / "data/cub50"
    files = sorted(root.rglob("*.jpg"))[::100][:20]
    assert files
    engine = shared.models.get("calibrated").engine
    for file in files:
        with Image.open(file) as image:
            (answer,) = engine.classify([image.convert("RGB")], top_k=3)
        body = ask(shared, "POST", "/v1/classify?model=calibrated", content=file.read_bytes()).json()
        assert [row["index"] for row in body["predictions"]] == [p.index for p in answer.predictions]
        probabilities = [row["probability"] for row in body["predictions"]]
        np.testing.assert_allclose(probabilities, [p.probability for p in answer.predictions], atol=1e-4)
        assert body["rejected"] == answer.rejected


def test_it_imports_nothing_of_training_and_help_nothing_of_serving() -> None:
    heavy = {"torch", "torchvision", "timm", "albumentations", "cv2", "matplotlib", "onnx"}
    for module, unwanted in (("fgvc.serving.server", heavy), ("fgvc.cli.app", heavy | {"fastapi", "uvicorn", "onnxruntime"})):
        code = f"import sys, {module}; print({unwanted} & set(sys.modules))"
        process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (process.stdout.strip(), process.stderr) == ("set()", "")
