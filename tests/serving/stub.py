"""A server of a few lines that answers the page as told, with the routes of `fgvc.serving.app`."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from fgvc.serving.page import CSP, PAGE

HOSTILE = "<img src=x onerror=alert(1)>"
LONG = "a_name_without_a_single_place_to_break_it_" * 3 + "x" * 90
NAMES = ("Rust", HOSTILE, "灰斑病与褐斑病混合感染的咖啡叶片", LONG, "phoma/miner.late-stage")
P = (0.61234, 0.3, 0.07, 0.0173, 0.00036)


def png(size: tuple[int, int], colour: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, "PNG")
    return content.getvalue()


def answer(*, rejected: bool = False, calibrated: bool = True) -> dict[str, Any]:
    predictions = [
        {"label": name, "index": i, "probability": p} for i, (name, p) in enumerate(zip(NAMES, P, strict=True))
    ]
    milliseconds = {"wait": 3.14, "decode": 2.0, "classify": 24.5, "total": 31.2}
    facts = {"rejected": rejected, "calibrated": calibrated, "milliseconds": milliseconds}
    return {"model": "leaves", "predictions": predictions, **facts}


@dataclass
class Stub:
    """What the stub server answers, and the requests that it got. `refusals` go before answers, once each."""

    url: str = ""
    models: Any = field(default_factory=lambda: {"models": [{"name": "leaves"}]})
    classify: dict[str, Any] = field(default_factory=answer)
    explain: bytes | None = field(default_factory=lambda: png((64, 64), "orange"))
    examples: int = 0
    refusals: list[tuple[int, dict[str, str], Any]] = field(default_factory=list)
    key: str = ""
    gate: Event = field(default_factory=Event)  # whoever asks /v1 waits for it
    # Path, query, content type and body of each.
    requests: list[tuple[str, dict[str, list[str]], str, bytes]] = field(default_factory=list)

    def reply(self, path: str, key: str) -> tuple[int, str, bytes, dict[str, str]]:
        """Status, type, body and headers of an answer."""
        if path == "/":
            return 200, "text/html; charset=utf-8", PAGE.encode(), {"Content-Security-Policy": CSP}
        if self.key and key != f"Bearer {self.key}":
            return 401, "application/json", b'{"error": "wrong key"}', {}
        if path == "/v2/models":
            return 200, "application/json", json.dumps(self.models).encode(), {}
        if path == "/v1/examples":
            return 200, "application/json", json.dumps({"examples": [f"leaf {n}.jpg" for n in range(self.examples)]}).encode(), {}
        if path.startswith("/v1/examples/"):
            return 200, "image/jpeg", png((320, 200), "green"), {}
        self.gate.wait(20)
        if self.refusals:
            status, headers, body = self.refusals.pop(0)
            return status, "application/json", json.dumps(body).encode(), headers
        if path == "/v1/classify":
            return 200, "application/json", json.dumps(self.classify).encode(), {}
        if path == "/v1/explain" and self.explain is not None:
            return 200, "image/png", self.explain, {}
        return 409, "application/json", b'{"error": "no explain.onnx in this bundle"}', {}


@contextmanager
def serving() -> Iterator[Stub]:
    """A stub that listens on loopback."""
    stub = Stub()
    stub.gate.set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            address = urlsplit(self.path)
            stub.requests.append((address.path, parse_qs(address.query), self.headers.get("Content-Type", ""), body))
            status, kind, content, headers = stub.reply(address.path, self.headers.get("Authorization", ""))
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        stub.url = f"http://127.0.0.1:{listening.server_port}/"
        thread = Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield stub
        listening.shutdown()
        thread.join()
