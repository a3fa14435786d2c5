"""The page at / in headless Chromium, before a server that answers as told."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.support.wait import WebDriverWait

from fgvc.serve.page import CSP, PAGE
from tests.conftest import paint
from tests.page.browser import browser

pytestmark = pytest.mark.allow_hosts(
    ["127.0.0.1", "localhost", "::1"]
)  # the server's, and where selenium's driver listens

HOSTILE = "<img src=x onerror=alert(1)>"
LONG = "a_name_without_a_single_place_to_break_it_" * 3 + "x" * 90
NAMES = ("Rust", HOSTILE, "灰斑病与褐斑病混合感染的咖啡叶片", LONG, "phoma/miner.late-stage")
P = (0.61234, 0.3, 0.07, 0.0173, 0.00036)


def png(size: tuple[int, int], colour: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, "PNG")
    return content.getvalue()


def answer(*, rejected: bool = False) -> dict[str, Any]:
    predictions = [
        {"label": name, "index": i, "probability": p} for i, (name, p) in enumerate(zip(NAMES, P, strict=True))
    ]
    milliseconds = {"decode": 3.14, "preprocess": 2.0, "infer": 24.5, "total": 31.2}
    return {"model": "leaves", "predictions": predictions, "rejected": rejected, "milliseconds": milliseconds}


@dataclass
class Stub:
    """What the server says, and what it was asked. `refusals` go before answers, once each."""

    url: str = ""
    models: Any = field(default_factory=lambda: {"models": [{"name": "leaves"}]})
    classify: dict[str, Any] = field(default_factory=answer)
    explain: bytes | None = field(default_factory=lambda: png((64, 64), "orange"))
    refusals: list[tuple[int, dict[str, str], Any]] = field(default_factory=list)
    key: str = ""
    asked: list[tuple[str, dict[str, list[str]], str, bytes]] = field(default_factory=list)  # path, query, type, body

    def reply(self, path: str, key: str) -> tuple[int, str, bytes, dict[str, str]]:
        """Status, type, body and headers of an answer."""
        if path == "/":
            return 200, "text/html; charset=utf-8", PAGE.encode(), {"Content-Security-Policy": CSP}
        if self.key and key != f"Bearer {self.key}":
            return 401, "application/json", b'{"error": "wrong key"}', {}
        if path == "/v2/models":
            return 200, "application/json", json.dumps(self.models).encode(), {}
        if self.refusals:
            status, headers, said = self.refusals.pop(0)
            return status, "application/json", json.dumps(said).encode(), headers
        if path == "/v1/classify":
            return 200, "application/json", json.dumps(self.classify).encode(), {}
        if path == "/v1/explain" and self.explain is not None:
            return 200, "image/png", self.explain, {}
        return 404, "application/json", b'{"error": "no explain.onnx in this bundle"}', {}


@pytest.fixture
def server() -> Iterator[Stub]:
    stub = Stub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            address = urlsplit(self.path)
            stub.asked.append((address.path, parse_qs(address.query), self.headers.get("Content-Type", ""), body))
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


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chrome]:
    with browser() as chrome:
        yield chrome


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    paint(tmp_path / "leaf.png", (70, 170, 80), seed=1, size=(320, 200))
    return tmp_path / "leaf.png"


def visit(chrome: Chrome, server: Stub, *, width: int = 1280) -> None:
    """The page on a fresh screen, its list of models there."""
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    chrome.get("about:blank")
    for log in ("browser", "performance"):
        chrome.get_log(log)
    chrome.get(server.url)
    until(chrome, lambda: text(chrome, "#only") != "…" or shown(chrome, "#ask") or shown(chrome, "#trouble"))


def until(chrome: Chrome, condition: Callable[[], Any]) -> None:
    WebDriverWait(chrome, 20, poll_frequency=0.02).until(lambda _: condition())


def text(chrome: Chrome, selector: str) -> str:
    return chrome.execute_script("return document.querySelector(arguments[0]).textContent", selector)


def texts(chrome: Chrome, selector: str) -> list[str]:
    return chrome.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
    )


def shown(chrome: Chrome, selector: str) -> bool:
    return chrome.execute_script("return document.querySelector(arguments[0]).checkVisibility()", selector)


def click(chrome: Chrome, selector: str) -> None:
    chrome.find_element("css selector", selector).click()


def choose(chrome: Chrome, file: Path) -> None:
    """Give a file and wait for what comes of it."""
    chrome.find_element("css selector", "#file").send_keys(str(file))
    until(chrome, lambda: not shown(chrome, "#ghost"))


def troubles(chrome: Chrome, server: Stub, *, width: int, refused: int = 0) -> list[str]:
    """Requests to other hosts, complaints in the console (less those of `refused` requests), a page wider than the screen."""
    found = []
    wide = chrome.execute_script("return document.documentElement.scrollWidth")
    if wide > width:
        found.append(f"{wide} pixels wide on a screen of {width}")
    said = [entry["message"] for entry in chrome.get_log("browser")]
    answers = [message for message in said if "Failed to load resource" in message]
    found += [message for message in said if message not in answers] + answers[refused:]
    for entry in chrome.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if not url.startswith((server.url, f"blob:{server.url}", "data:")):
                found.append(f"asked for {url}")
    return found


@pytest.mark.parametrize("width", [390, 1280])
def test_picture_to_bars_and_heat_map(chrome: Chrome, server: Stub, picture: Path, width: int) -> None:
    visit(chrome, server, width=width)
    assert troubles(chrome, server, width=width) == []
    choose(chrome, picture)
    assert texts(chrome, "#classes .name") == list(NAMES)  # the hostile one, too, as text
    assert texts(chrome, "#classes .share") == ["61.2 %", "30.0 %", "7.0 %", "1.7 %", "< 0.1 %"]
    until(chrome, lambda: chrome.execute_script("return document.getAnimations().length") == 0)
    share = (
        "return [...document.querySelectorAll('.bar i')].slice(-5).map(i => i.offsetWidth / i.parentNode.offsetWidth)"
    )
    assert chrome.execute_script(share) == pytest.approx(P, abs=0.01)
    assert not shown(chrome, "#none")
    assert text(chrome, "#server") == "31 ms"
    assert text(chrome, "#parts") == "decode 3.1 ms · preprocess 2.0 ms · infer 25 ms"
    assert re.fullmatch(r"[\d.]+ ms", text(chrome, "#trip"))
    assert text(chrome, "#status").startswith("Rust, 61.2 %; <img")
    assert text(chrome, "#facts").startswith("leaf.png · 320 × 200 · ")
    path, query, kind, body = server.asked[-1]
    assert (path, query, kind) == ("/v1/classify", {"model": ["leaves"], "top_k": ["5"]}, "image/png")
    assert body == picture.read_bytes()  # untouched
    click(chrome, "#warm")
    until(chrome, lambda: shown(chrome, "#heat"))
    assert chrome.execute_script("return document.querySelector('#heat').naturalWidth") == 64
    assert not shown(chrome, "#picture")
    click(chrome, "#plain")
    assert shown(chrome, "#picture")
    assert chrome.execute_script("return document.querySelector('#picture').naturalWidth") == 320
    assert not chrome.execute_script("return document.querySelectorAll('#classes img').length")
    assert troubles(chrome, server, width=width) == []


def test_none_of_these(chrome: Chrome, server: Stub, picture: Path) -> None:
    server.classify = answer(rejected=True)
    visit(chrome, server)
    choose(chrome, picture)
    assert shown(chrome, "#none")
    assert text(chrome, "#none h2") == "None of these"
    assert text(chrome, "#status").startswith("None of these. The nearest: Rust")
    assert texts(chrome, "#classes.rejected .name") == list(NAMES)


def test_busy_server_and_try_again(chrome: Chrome, server: Stub, picture: Path) -> None:
    server.refusals = [(503, {"Retry-After": "1"}, {"error": "all slots are taken"})]
    visit(chrome, server)
    choose(chrome, picture)
    assert (text(chrome, "#wrong"), text(chrome, "#why")) == ("The server is busy", "all slots are taken")
    assert not shown(chrome, "#classes")
    again = chrome.find_element("css selector", "#again")
    until(chrome, again.is_enabled)
    assert again.text == "Try again"
    again.click()
    until(chrome, lambda: shown(chrome, "#classes"))
    assert not shown(chrome, "#trouble")
    assert troubles(chrome, server, width=1280, refused=1) == []


@pytest.mark.parametrize(
    ("status", "said", "title", "why"),
    [
        (400, {"detail": "truncated"}, "The server cannot read this picture", "truncated"),
        (422, {"detail": [{"msg": "top_k: too large"}]}, "The server cannot read this picture", "top_k: too large"),
        (500, None, "The server answered 500", ""),
    ],
)
def test_errors_are_told(
    chrome: Chrome, server: Stub, picture: Path, status: int, said: Any, title: str, why: str
) -> None:
    server.refusals = [(status, {}, said)]
    visit(chrome, server)
    choose(chrome, picture)
    assert (text(chrome, "#wrong"), text(chrome, "#why")) == (title, why)
    assert shown(chrome, "#again") is (status == 500)
    assert troubles(chrome, server, width=1280, refused=1) == []


def test_what_is_no_picture_is_not_sent(chrome: Chrome, server: Stub, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    visit(chrome, server)
    choose(chrome, tmp_path / "notes.txt")
    assert text(chrome, "#wrong") == "This is no picture"
    assert {path for path, *_ in server.asked} == {"/", "/v2/models"}


def test_one_of_several_models(chrome: Chrome, server: Stub, picture: Path) -> None:
    server.models = ["leaves", {"name": "bird & bee"}]  # bare names and objects
    visit(chrome, server)
    assert texts(chrome, "#model option") == ["leaves", "bird & bee"]
    assert shown(chrome, "#model")
    assert not shown(chrome, "#only")
    choose(chrome, picture)
    chrome.find_element("css selector", "#model").send_keys("bird")
    until(chrome, lambda: server.asked[-1][1].get("model") == ["bird & bee"] and shown(chrome, "#classes"))
    click(chrome, "#warm")
    until(chrome, lambda: shown(chrome, "#heat"))
    assert server.asked[-1][:2] == ("/v1/explain", {"model": ["bird & bee"]})


def test_bundle_without_a_heat_map(chrome: Chrome, server: Stub, picture: Path) -> None:
    server.explain = None
    visit(chrome, server)
    choose(chrome, picture)
    click(chrome, "#warm")
    until(chrome, lambda: "no explain.onnx" in text(chrome, "#facts"))
    assert text(chrome, "#facts").startswith("This model has no heat map.")
    assert shown(chrome, "#picture")
    assert not chrome.find_element("css selector", "#warm").is_enabled()


def test_key_is_asked_for_and_kept_in_memory(chrome: Chrome, server: Stub, picture: Path) -> None:
    server.key = "open-sesame"
    visit(chrome, server)
    for key, title in (("wrong", "The server does not take this key"), ("open-sesame", "")):
        chrome.find_element("css selector", "#secret").clear()
        chrome.find_element("css selector", "#secret").send_keys(key)
        click(chrome, "#key button")
        until(chrome, lambda title=title: text(chrome, "#asks") == title if title else not shown(chrome, "#ask"))
    choose(chrome, picture)
    assert texts(chrome, "#classes .name") == list(NAMES)
    kept = "return [localStorage.length, sessionStorage.length, document.cookie, location.href]"
    assert chrome.execute_script(kept) == [0, 0, "", server.url]


def test_large_photo_is_made_smaller(chrome: Chrome, server: Stub, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(png((3000, 2000), "teal") + bytes(10 * 2**20))  # over the limit by what follows the picture's end
    visit(chrome, server)
    choose(chrome, photo)
    _, _, kind, body = server.asked[-1]
    sent = Image.open(io.BytesIO(body))
    assert (kind, sent.format, sent.size) == ("image/jpeg", "JPEG", (2048, 1365))
    assert sum(abs(a - b) for a, b in zip(sent.getpixel((9, 9)), (0, 128, 128), strict=True)) < 12
    assert "Sent as a JPEG of 2048 × 1365" in text(chrome, "#facts")


def test_server_with_a_smaller_limit(chrome: Chrome, server: Stub, picture: Path) -> None:
    server.refusals = [(413, {}, {"error": "at most 9 kB"})]
    visit(chrome, server)
    choose(chrome, picture)
    assert texts(chrome, "#classes .name") == list(NAMES)
    assert [kind for path, _, kind, _ in server.asked if path == "/v1/classify"] == ["image/png", "image/jpeg"]


def test_policy_names_what_the_page_has() -> None:
    """Nothing inline but one style and one script; the policy allows these, and no other host."""
    for tag in ("script", "style"):
        [content] = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", PAGE, re.DOTALL)
        digest = base64.b64encode(sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in CSP
    assert "unsafe" not in CSP
    assert "http" not in re.sub(r"http://www\.w3\.org/2000/svg", "", PAGE)
    assert not re.search(r"""\son\w+=["']|\sstyle=["']|innerHTML|<link(?! rel="icon" href="data:)""", PAGE)


def test_policy_stops_what_is_put_into_the_page(chrome: Chrome, server: Stub) -> None:
    """The checks of the browser can fail."""
    visit(chrome, server)
    chrome.execute_script(
        "const s = document.createElement('script'); try { s.text = 'alert(1)'; } catch (e) { console.error(e) }"
    )
    chrome.execute_script("new Image().src = 'http://127.0.0.1:1/other.png'")
    found = "\n".join(troubles(chrome, server, width=1280))
    assert "TrustedScript" in found
    assert "other.png" in found
