"""The process: `fgvc serve` as clients, operators and enemies meet it."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from fgvc.cli.app import main
from tests.serving.corpus import corpus
from tests.serving.small import LABELS, SIZE, Server, bomb, picture, save_bundle, serving

pytestmark = pytest.mark.allow_hosts(["127.0.0.1", "localhost", "::1"])
X = np.random.default_rng(0).random((2, 3, SIZE, SIZE), dtype=np.float32)
SLOW = 40  # products of matrices: a tenth of a second or so


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, f"colours={save_bundle(folder / 'a')}", save_bundle(folder / "other", 5)) as running:
        yield running


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_tritonclient_unmodified(server: Server) -> None:
    import tritonclient.http as triton
    from tritonclient.utils import InferenceServerException

    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("colours")
    assert client.is_model_ready("other", "1")
    assert not client.is_model_ready("nope")
    assert client.get_server_metadata()["name"] == "fgvc"
    assert client.get_model_metadata("other", "1")["outputs"][0]["shape"] == [-1, 3]
    assert [row["name"] for row in client.get_model_repository_index()] == ["colours", "other"]
    for sent in (True, False):
        for packing in (None, "gzip", "deflate"):
            tensor = triton.InferInput("input", list(X.shape), "FP32")
            tensor.set_data_from_numpy(X, binary_data=sent)
            for outputs in (None, *([triton.InferRequestedOutput("logits", binary_data=b)] for b in (True, False))):
                result = client.infer(
                    "other", [tensor], outputs=outputs, request_id="7", request_compression_algorithm=packing
                )
                np.testing.assert_allclose(result.as_numpy("logits"), 5 * X.mean((2, 3)), rtol=1e-5)
                assert result.get_response()["id"] == "7"
    with pytest.raises(InferenceServerException, match="no model 'nope'"):
        client.infer("nope", [tensor])
    wrong = triton.InferInput("input", [2, 3, SIZE, SIZE + 1], "FP32")
    wrong.set_data_from_numpy(np.zeros((2, 3, SIZE, SIZE + 1), np.float32))
    with pytest.raises(InferenceServerException, match="expected the shape") as caught:
        client.infer("other", [wrong])
    assert caught.value.status() == "400"
    client.close()


def test_mistakes_are_named_before_anything_is_served(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = save_bundle(tmp_path / "b")
    for arguments, message in (
        ([tmp_path / "none"], "no such bundle"),
        ([bundle, bundle], "a second model named 'b'"),
        ([bundle, "--port", server.port], "can't listen there"),
        ([bundle, "--host", "256.256.256.256"], "can't listen there"),
        ([bundle, "--api-key-file", tmp_path / "none"], "can't read the API key"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["serve", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert (ended.value.code, out) == (2, "")
        assert err.startswith("error: ")
        assert message in err


def send(server: Server, *parts: bytes, finish: bool = False, pause: float = 0) -> bytes:
    """Send bytes as they are; what comes back. `finish`: until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        answer = connection.recv(1 << 16)
        while finish and (more := connection.recv(1 << 16)):
            answer += more
        return answer


def head(path: str, *headers: str, method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: x", *headers, "", ""]).encode()


def test_a_client_reads_why_its_body_is_refused_while_it_still_sends(server: Server) -> None:
    before = server.rss()
    body = b"x" * (50 << 20)
    answer = send(server, head("/v1/classify", f"content-length: {len(body)}"), body, finish=True)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer.lower()
    chunked = b"".join(b"100000\r\n" + b"x" * (1 << 20) + b"\r\n" for _ in range(30)) + b"0\r\n\r\n"
    answer = send(server, head("/v1/classify", "transfer-encoding: chunked"), chunked, finish=True)
    assert answer.startswith(b"HTTP/1.1 413 ")
    answer = send(server, head("/nowhere", f"content-length: {len(body)}"), body, finish=True)
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert server.rss() - before < 64 << 20


def test_a_refused_request_with_a_small_body_keeps_its_connection(server: Server) -> None:
    first = head("/nowhere", "content-length: 1000") + b"x" * 1000
    second = head("/v2/health/live", "connection: close", method="GET")
    answer = send(server, first + second, finish=True)
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"HTTP/1.1 200 OK" in answer


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03", b"400"),  # TLS
        (b"\0" * 100, b"400"),
        (b"GET /v2 HTTP/1.1\r\n\r\n", b"400"),  # no host
        (b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", b"400"),
        (b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", b"400"),
        (b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-length: " + b"9" * 5000 + b"\r\n\r\n", b"4"),
        (b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-length: " + b"9" * 18 + b"\r\n\r\n", b"413"),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", b"4"),
        (b"GET /v2 HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 20_000 + b"\r\n", b""),
        (b"GET /v2/models/\xff%ff%00 HTTP/1.1\r\nhost: x\r\n\r\n", b"4"),
        (b"GET /v2/models/../../etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n", b"404"),
        (b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n", b"200"),
        (b"POST /v2/models/other/infer HTTP/1.1\r\nhost: x\r\ninference-header-content-length: "
         + b"9" * 5000 + b"\r\ncontent-length: 2\r\n\r\n{}", b"400"),
    ],
)  # fmt: skip
def test_bytes_that_are_no_request(server: Server, sent: bytes, status: bytes) -> None:
    assert send(server, sent).startswith(b"HTTP/1.1 " + status)


def test_slow_clients_are_let_go(tmp_path: Path) -> None:
    bundle = save_bundle(tmp_path / "a")
    code = (
        "from pathlib import Path; from fgvc.serving.limits import Limits; from fgvc.serving.server import Settings, serve;"
        f"serve({{'a': Path({str(bundle)!r})}}, Settings(port=0, limits=Limits(stall_seconds=1)))"
    )
    with serving(tmp_path, code=code) as server:
        answer = send(server, head("/v1/classify", "content-length: 100"), b"x", finish=True)
        assert answer.startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(("127.0.0.1", server.port), 30) as silent:
            assert _until_closed(silent) == b""
        with socket.create_connection(("127.0.0.1", server.port), 30) as connection, pytest.raises(ConnectionError):
            drip(connection, b"GET /v2/health/live HTTP/1.1\r\n" + b"a: b\r\n" * 100)
        # Between two requests a connection may rest for longer.
        with server.client() as client:
            assert client.get("/v2/health/live").status_code == 200
            time.sleep(1.5)
            assert client.get("/v2/health/live").status_code == 200
        assert server.metric('fgvc_rejected_total{reason="slow"}') == 1
        with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
            connection.sendall(head("/v1/classify", "content-length: 100") + b"x")
            until(lambda: server.metric("fgvc_in_flight") == 1)
            server.process.terminate()
            assert server.process.wait(30) == 0  # half a body is told so, and holds up nothing
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        assert "Traceback" not in server.errors.read_text()


def drip(connection: socket.socket, content: bytes) -> None:
    for letter in content:
        connection.sendall(bytes([letter]))
        time.sleep(0.05)


def _until_closed(connection: socket.socket) -> bytes:
    try:
        return connection.recv(100)
    except ConnectionResetError:
        return b""


def test_no_broken_request_breaks_the_server(server: Server) -> None:
    """No answer of 500 and more, no growth: 64 MiB over these after the first ones have warmed all paths."""
    codes = set()
    with server.client() as client:
        for number, (path, body, headers) in enumerate(corpus(500)):
            if number == 100:
                before = server.rss()
            response = client.post(path, content=body, headers=headers)
            codes.add(response.status_code)
            assert response.status_code < 500, (path, headers, response.text)
            if response.status_code >= 400:
                assert list(response.json()) == ["error"]
        assert {200, 400, 404, 415, 422} <= codes
        assert server.rss() - before < 64 << 20
        assert client.post("/v1/classify", content=picture()).json()["predictions"][0]["label"] == "red"
    assert server.errors.read_text().count("Traceback") == 0


def test_the_memory_of_a_large_picture_is_given_back(server: Server) -> None:
    before = server.rss()
    with server.client() as client:
        for _ in range(2):
            assert client.post("/v1/classify", content=bomb(6300, 6300)).status_code == 200  # 40 of 50 megapixels
    assert server.rss() - before < 64 << 20  # 120 MB as RGB, several times over


def classify(server: Server) -> httpx.Response:
    with server.client() as client:
        return client.post("/v1/classify", content=picture())


def test_overload_is_refused_at_once_and_bounds_hold(tmp_path: Path) -> None:
    bundle = save_bundle(tmp_path / "a", delay=SLOW // 2)
    with serving(tmp_path, bundle, "--concurrency", 1, "--queue", 2) as server, ThreadPoolExecutor(40) as clients:
        pending = [clients.submit(classify, server) for _ in range(30)]
        depths, running = set(), set()
        while not all(one.done() for one in pending):
            depths.add(server.metric("fgvc_queue_depth"))
            running.add(server.metric("fgvc_running"))
        responses = [one.result() for one in pending]
        answered = [one for one in responses if one.status_code == 200]
        refused = [one for one in responses if one.status_code == 503]
        assert len(answered) + len(refused) == 30
        assert len(answered) >= 3
        assert refused
        assert all(one.headers["retry-after"] == "1" for one in refused)
        assert all(one.json()["predictions"][0]["label"] == "red" for one in answered)
        assert max(depths) <= 2
        assert max(running) <= 1
        assert server.metric('fgvc_rejected_total{reason="queue_full"}') == len(refused)


def test_deadlines_and_clients_that_leave(tmp_path: Path) -> None:
    bundle = save_bundle(tmp_path / "a", delay=4 * SLOW)
    request = head("/v1/classify", f"content-length: {len(picture())}") + picture()
    arguments = ("--concurrency", 1, "--queue", 2, "--timeout", 20)
    with serving(tmp_path, bundle, *arguments) as server, ThreadPoolExecutor(4) as clients:
        first = clients.submit(classify, server)
        until(lambda: server.metric("fgvc_running") == 1)
        with socket.create_connection(("127.0.0.1", server.port), 30) as leaving:
            leaving.sendall(request)
            until(lambda: server.metric("fgvc_queue_depth") == 1)
        until(
            lambda: server.metric("fgvc_queue_depth") == 0 and server.metric('fgvc_rejected_total{reason="gone"}') == 1
        )
        assert first.result().status_code == 200
    arguments = ("--concurrency", 1, "--queue", 2, "--timeout", 0.1)
    with serving(tmp_path, bundle, *arguments) as server, ThreadPoolExecutor(4) as clients:
        responses = list(clients.map(classify, [server] * 3))
        assert [one.status_code for one in responses] == [504] * 3
        assert server.metric("fgvc_queue_depth") == 0
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0  # whether or not a thread still computes for nobody


def test_sigterm_drains(tmp_path: Path) -> None:
    bundle = save_bundle(tmp_path / "a", delay=2 * SLOW)
    with serving(tmp_path, bundle, "--concurrency", 1) as server, ThreadPoolExecutor(8) as clients:
        pending = [clients.submit(classify, server) for _ in range(6)]
        until(lambda: server.metric("fgvc_in_flight") == 6)
        with server.client() as client:
            server.process.send_signal(signal.SIGTERM)
            until(lambda: client.get("/v2/health/ready").status_code == 503)
            assert client.get("/v2/health/live").status_code == 200
            assert client.get("/v2/models/a/ready").status_code == 503
            response = client.post("/v1/classify", content=picture())
            assert (response.status_code, "retry-after" in response.headers) == (503, True)
            assert not all(one.done() for one in pending)  # all of this was while requests were answered
        assert [one.result().status_code for one in pending] == [200] * 6
        assert server.process.wait(30) == 0


def test_what_outlasts_the_grace_is_cut_off_and_said(tmp_path: Path) -> None:
    bundle = save_bundle(tmp_path / "a", delay=8 * SLOW)
    with serving(tmp_path, bundle, "--concurrency", 1, "--grace", 0.2) as server, ThreadPoolExecutor(2) as clients:
        pending = [clients.submit(classify, server) for _ in range(2)]
        until(lambda: server.metric("fgvc_in_flight") == 2)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 1
        assert "2 request(s) were cut off after 0.2 s" in server.errors.read_text()
        assert [one.result().status_code for one in pending] == [503] * 2


def test_reloads_under_load_cost_no_request(tmp_path: Path) -> None:
    folder = save_bundle(tmp_path / "a", 1)
    answers: set[tuple[int, float]] = set()
    stop = threading.Event()

    def ask() -> None:
        with server.client() as client:
            while not stop.is_set():
                response = client.post("/v1/classify", content=picture())
                answers.add((response.status_code, round(response.json()["predictions"][0]["probability"], 4)))

    def p(scale: float) -> float:
        return round(np.exp(scale) / (np.exp(scale) + 2), 4)

    with serving(tmp_path, folder) as server, ThreadPoolExecutor(2) as clients:
        asking = [clients.submit(ask) for _ in range(2)]
        for number in range(1, 21):
            save_bundle(folder, 1 + number % 2)
            server.process.send_signal(signal.SIGHUP)
            until(lambda number=number: server.metric('fgvc_reloads_total{model="a"}') == number)
        content = (folder / "model.onnx").read_bytes()
        (folder / "model.onnx").write_bytes(content[:-1])
        server.process.send_signal(signal.SIGHUP)
        until(lambda: server.metric('fgvc_reload_failures_total{model="a"}') == 1)
        time.sleep(0.1)
        stop.set()
        for one in asking:
            one.result()
        assert answers == {(200, p(1)), (200, p(2))}
        assert classify(server).json()["predictions"][0]["probability"] == pytest.approx(p(1), abs=1e-4)
        assert "a: not reloaded, the old one goes on" in server.errors.read_text()


def test_a_link_that_is_turned_is_followed(tmp_path: Path) -> None:
    for scale in (1, 2):
        save_bundle(tmp_path / str(scale), scale)
    current, scratch = tmp_path / "current", tmp_path / "scratch"
    current.symlink_to(tmp_path / "1")
    with serving(tmp_path, current, "--poll", 0.05) as server:
        first = classify(server).json()
        assert first["model"] == "current"
        scratch.symlink_to(tmp_path / "2")
        scratch.replace(current)
        until(lambda: classify(server).json()["predictions"] != first["predictions"])
        assert server.metric('fgvc_reloads_total{model="current"}') == 1


@pytest.mark.parametrize("flags", [[], ["--any-bundle"]])
def test_a_bundle_of_another_label_order_is_taken_only_where_it_is_said(tmp_path: Path, flags: list[str]) -> None:
    folder = save_bundle(tmp_path / "a", 1)
    with serving(tmp_path, folder, "--poll", 0.05, *flags) as server:
        before = classify(server).json()["predictions"]
        save_bundle(folder, 1, labels=LABELS[::-1])
        counted = "fgvc_reloads_total" if flags else "fgvc_reload_failures_total"
        until(lambda: server.metric(f'{counted}{{model="a"}}') == 1)
        after = classify(server).json()["predictions"]
        assert (after == before) is (not flags)
        assert ("not a drop-in" in server.errors.read_text()) is (not flags)


def test_the_key_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FGVC_API_KEY", "sesame")
    with serving(tmp_path, save_bundle(tmp_path / "a")) as server:
        assert classify(server).status_code == 401
        with server.client(headers={"authorization": "Bearer sesame"}) as client:
            assert client.post("/v1/classify", content=picture()).status_code == 200
