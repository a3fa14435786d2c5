"""The page at / in headless Chromium, before a server that answers as told."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.support.wait import WebDriverWait

from fgvc.serving.page import CSP, PAGE
from tests.conftest import paint
from tests.report.browser import browser
from tests.serving.stub import NAMES, P, Stub, answer, png, serving

pytestmark = pytest.mark.allow_hosts(
    ["127.0.0.1", "localhost", "::1"]
)  # the server's, and where selenium's driver listens


@pytest.fixture
def server() -> Iterator[Stub]:
    with serving() as stub:
        yield stub


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chrome]:
    with browser() as chrome:
        yield chrome


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    paint(tmp_path / "leaf.png", (70, 170, 80), seed=1, size=(320, 200))
    return tmp_path / "leaf.png"


def visit(chrome: Chrome, server: Stub, *, width: int = 1280) -> None:
    """Open the page on a fresh screen and wait for its list of models."""
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    chrome.get("about:blank")
    for log in ("browser", "performance"):
        chrome.get_log(log)
    chrome.get(server.url)
    until(chrome, lambda: text(chrome, "#only") != "…" or is_shown(chrome, "#ask") or is_shown(chrome, "#trouble"))


def until(chrome: Chrome, condition: Callable[[], Any]) -> None:
    WebDriverWait(chrome, 20, poll_frequency=0.02).until(lambda _: condition())


def text(chrome: Chrome, selector: str) -> str:
    return chrome.execute_script("return document.querySelector(arguments[0]).textContent", selector)


def texts(chrome: Chrome, selector: str) -> list[str]:
    return chrome.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
    )


def is_shown(chrome: Chrome, selector: str) -> bool:
    return chrome.execute_script("return document.querySelector(arguments[0]).checkVisibility()", selector)


def click(chrome: Chrome, selector: str) -> None:
    chrome.find_element("css selector", selector).click()


def choose(chrome: Chrome, file: Path) -> None:
    """Give the page a file and wait for what comes of it."""
    chrome.find_element("css selector", "#file").send_keys(str(file))
    until(chrome, lambda: not is_shown(chrome, "#ghost"))


def troubles(chrome: Chrome, server: Stub, *, width: int, refused: int = 0) -> list[str]:
    """Requests to other hosts, complaints in the console (less those of `refused` requests), a page wider than the screen."""
    problems = []
    wide = chrome.execute_script("return document.documentElement.scrollWidth")
    if wide > width:
        problems.append(f"{wide} pixels wide on a screen of {width}")
    messages = [entry["message"] for entry in chrome.get_log("browser")]
    answers = [message for message in messages if "Failed to load resource" in message]
    problems += [message for message in messages if message not in answers] + answers[refused:]
    for entry in chrome.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if not url.startswith((server.url, f"blob:{server.url}", "data:")):
                problems.append(f"asked for {url}")
    return problems


@pytest.mark.parametrize("width", [390, 1280])
def test_the_servers_examples_are_offered_and_answered(chrome: Chrome, server: Stub, width: int) -> None:
    server.examples = 8
    visit(chrome, server, width=width)
    until(chrome, lambda: len(chrome.find_elements("css selector", "#strip img")) == 8)
    assert is_shown(chrome, "#examples")
    assert troubles(chrome, server, width=width) == []
    click(chrome, "#strip button")
    until(chrome, lambda: not is_shown(chrome, "#ghost"))
    assert texts(chrome, "#classes .name") == list(NAMES)
    assert "leaf 0.jpg" in text(chrome, "#facts")
    server.examples = 0
    visit(chrome, server, width=width)
    assert not is_shown(chrome, "#examples")


@pytest.mark.parametrize("width", [390, 1280])
def test_picture_to_bars_and_heat_map(chrome: Chrome, server: Stub, picture: Path, width: int) -> None:
    visit(chrome, server, width=width)
    assert troubles(chrome, server, width=width) == []
    choose(chrome, picture)
    assert texts(chrome, "#classes .name") == list(NAMES)  # the hostile one, too, as text
    assert texts(chrome, "#classes .share") == ["61.2 %", "30.0 %", "7.0 %", "1.7 %", "< 0.1 %"]
    share = (
        "return [...document.querySelectorAll('.bar i')].slice(-5).map(i => i.offsetWidth / i.parentNode.offsetWidth)"
    )
    # Not once no animation runs: before the first frame none does.
    until(chrome, lambda: chrome.execute_script(share) == pytest.approx(P, abs=0.01))
    assert not is_shown(chrome, "#none")
    assert text(chrome, "#server") == "31 ms"
    assert text(chrome, "#parts") == "wait 3.1 ms · decode 2.0 ms · classify 25 ms"
    assert re.fullmatch(r"[\d.]+ ms", text(chrome, "#trip"))
    assert text(chrome, "#status").startswith("Rust, 61.2 %; <img")
    assert text(chrome, "#calibrated") == "Probabilities are calibrated."
    assert text(chrome, "#facts").startswith("leaf.png · 320 × 200 · ")
    path, query, kind, body = server.requests[-1]
    assert (path, query, kind) == ("/v1/classify", {"model": ["leaves"], "top_k": ["5"]}, "image/png")
    assert body == picture.read_bytes()  # untouched
    click(chrome, "#warm")
    until(chrome, lambda: is_shown(chrome, "#heat"))
    assert chrome.execute_script("return document.querySelector('#heat').naturalWidth") == 64
    assert not is_shown(chrome, "#picture")
    click(chrome, "#plain")
    assert is_shown(chrome, "#picture")
    assert chrome.execute_script("return document.querySelector('#picture').naturalWidth") == 320
    assert not chrome.execute_script("return document.querySelectorAll('#classes img').length")
    assert troubles(chrome, server, width=width) == []


def test_none_of_these(chrome: Chrome, server: Stub, picture: Path) -> None:
    server.classify = answer(rejected=True, calibrated=False)
    visit(chrome, server)
    choose(chrome, picture)
    assert is_shown(chrome, "#none")
    assert text(chrome, "#none h2") == "None of these"
    assert text(chrome, "#calibrated") == "Probabilities are not calibrated."
    assert text(chrome, "#status").startswith("None of these. The nearest: Rust")
    assert texts(chrome, "#classes.rejected .name") == list(NAMES)


def test_busy_server_and_try_again(chrome: Chrome, server: Stub, picture: Path) -> None:
    server.refusals = [(503, {"Retry-After": "1"}, {"error": "all slots are taken"})]
    visit(chrome, server)
    choose(chrome, picture)
    assert (text(chrome, "#wrong"), text(chrome, "#why")) == ("The server is busy", "all slots are taken")
    assert not is_shown(chrome, "#classes")
    again = chrome.find_element("css selector", "#again")
    until(chrome, again.is_enabled)
    assert again.text == "Try again"
    again.click()
    until(chrome, lambda: is_shown(chrome, "#classes"))
    assert not is_shown(chrome, "#trouble")
    assert troubles(chrome, server, width=1280, refused=1) == []


@pytest.mark.parametrize(
    ("status", "body", "title", "why"),
    [
        (400, {"detail": "truncated"}, "The server cannot read this picture", "truncated"),
        (422, {"detail": [{"msg": "top_k: too large"}]}, "The server cannot read this picture", "top_k: too large"),
        (500, None, "The server answered 500", ""),
    ],
)
def test_errors_of_the_server_are_shown(
    chrome: Chrome, server: Stub, picture: Path, status: int, body: Any, title: str, why: str
) -> None:
    server.refusals = [(status, {}, body)]
    visit(chrome, server)
    choose(chrome, picture)
    assert (text(chrome, "#wrong"), text(chrome, "#why")) == (title, why)
    assert is_shown(chrome, "#again") is (status == 500)
    assert troubles(chrome, server, width=1280, refused=1) == []


def test_what_is_no_picture_is_not_sent(chrome: Chrome, server: Stub, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    visit(chrome, server)
    choose(chrome, tmp_path / "notes.txt")
    assert text(chrome, "#wrong") == "This is no picture"
    assert {path for path, *_ in server.requests} == {"/", "/v2/models", "/v1/examples"}


def test_one_of_several_models(chrome: Chrome, server: Stub, picture: Path) -> None:
    server.models = ["leaves", {"name": "bird & bee"}]  # bare names and objects
    visit(chrome, server)
    assert texts(chrome, "#model option") == ["leaves", "bird & bee"]
    assert is_shown(chrome, "#model")
    assert not is_shown(chrome, "#only")
    choose(chrome, picture)
    chrome.find_element("css selector", "#model").send_keys("bird")
    until(chrome, lambda: server.requests[-1][1].get("model") == ["bird & bee"] and is_shown(chrome, "#classes"))
    click(chrome, "#warm")
    until(chrome, lambda: is_shown(chrome, "#heat"))
    assert server.requests[-1][:2] == ("/v1/explain", {"model": ["bird & bee"]})


def test_another_model_while_busy(chrome: Chrome, server: Stub, picture: Path) -> None:
    server.models, server.classify = ["leaves", "birds"], answer(rejected=True)
    visit(chrome, server)
    server.gate.clear()
    chrome.find_element("css selector", "#file").send_keys(str(picture))
    until(chrome, lambda: server.requests[-1][1].get("model") == ["leaves"])
    assert is_shown(chrome, "#ghost")
    assert chrome.execute_script("return document.querySelector('#right').ariaBusy") == "true"
    chrome.find_element("css selector", "#model").send_keys("birds")
    until(chrome, lambda: server.requests[-1][1].get("model") == ["birds"])
    assert is_shown(chrome, "#ghost")  # what was given up is no error
    server.gate.set()
    until(chrome, lambda: is_shown(chrome, "#none"))
    assert not is_shown(chrome, "#trouble")
    assert troubles(chrome, server, width=1280) == []


def test_dropped_and_pasted_with_heat_map_on(chrome: Chrome, server: Stub) -> None:
    visit(chrome, server)
    give = """
        const [type, colour, key] = arguments, canvas = document.createElement("canvas");
        canvas.getContext("2d").fillStyle = colour;
        canvas.getContext("2d").fillRect(0, 0, 99, 99);
        canvas.toBlob((blob) => {
          const data = new DataTransfer();
          data.items.add(new File([blob], `${colour}.png`, { type: "image/png" }));
          const told = { bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data };
          document.body.dispatchEvent(new window[key](type, told));
        });"""
    chrome.execute_script(give, "drop", "red", "DragEvent")
    until(chrome, lambda: text(chrome, "#facts").startswith("red.png · 300 × 150") and is_shown(chrome, "#classes"))
    click(chrome, "#warm")
    until(chrome, lambda: is_shown(chrome, "#heat"))
    chrome.execute_script(give, "paste", "blue", "ClipboardEvent")
    until(chrome, lambda: server.requests[-1][0] == "/v1/explain" and len(server.requests) == 7)
    until(chrome, lambda: is_shown(chrome, "#heat"))  # as before, of the new picture
    red, _, blue, heated = [body for path, _, _, body in server.requests if path in ("/v1/classify", "/v1/explain")]
    assert blue == heated != red


def test_keyboard_alone(chrome: Chrome, server: Stub, picture: Path) -> None:
    server.models = ["leaves", "birds"]
    visit(chrome, server)
    choose(chrome, picture)
    reached = []
    for _ in range(4):
        ActionChains(chrome).send_keys(Keys.TAB).perform()
        reached.append(chrome.switch_to.active_element.get_attribute("id"))
    assert reached == ["model", "plain", "warm", "file"]
    ring = "return getComputedStyle(document.activeElement.closest('label')).outlineStyle"
    assert chrome.execute_script(ring) == "solid"
    ActionChains(chrome).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).send_keys(Keys.SPACE).perform()
    until(chrome, lambda: is_shown(chrome, "#heat"))


@pytest.mark.parametrize("known", [True, False])
def test_bundle_without_a_heat_map(chrome: Chrome, server: Stub, picture: Path, known: bool) -> None:
    """`known`: the list of models says so."""
    server.explain = None
    if known:
        server.models = {"models": [{"name": "leaves", "explain": False}]}
    visit(chrome, server)
    choose(chrome, picture)
    if not known:
        click(chrome, "#warm")
    until(chrome, lambda: text(chrome, "#facts").endswith("This model has no heat map."))
    assert is_shown(chrome, "#picture")
    assert not chrome.find_element("css selector", "#warm").is_enabled()


def test_key_is_asked_for_and_kept_in_memory(chrome: Chrome, server: Stub, picture: Path) -> None:
    server.key = "open-sesame"
    visit(chrome, server)
    for key, title in (("wrong", "The server does not take this key"), ("open-sesame", "")):
        chrome.find_element("css selector", "#secret").clear()
        chrome.find_element("css selector", "#secret").send_keys(key)
        click(chrome, "#key button")
        until(chrome, lambda title=title: text(chrome, "#asks") == title if title else not is_shown(chrome, "#ask"))
    choose(chrome, picture)
    assert texts(chrome, "#classes .name") == list(NAMES)
    storage = "return [localStorage.length, sessionStorage.length, document.cookie, location.href]"
    assert chrome.execute_script(storage) == [0, 0, "", server.url]


def test_large_photo_is_made_smaller(chrome: Chrome, server: Stub, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(png((3000, 2000), "teal") + bytes(10 * 2**20))  # over the limit by what follows the picture's end
    visit(chrome, server)
    choose(chrome, photo)
    _, _, kind, body = server.requests[-1]
    sent = Image.open(io.BytesIO(body))
    assert (kind, sent.format, sent.size) == ("image/jpeg", "JPEG", (2048, 1365))
    assert sum(abs(a - b) for a, b in zip(sent.getpixel((9, 9)), (0, 128, 128), strict=True)) < 12
    assert "Sent as a JPEG of 2048 × 1365" in text(chrome, "#facts")


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (413, "the body has more than 9000 bytes"),
        (415, "the picture is none of JPEG, PNG, WEBP, BMP"),
        (422, "the picture can't be used: too many pixels"),
    ],
)
def test_picture_that_this_server_does_not_take(
    chrome: Chrome, server: Stub, picture: Path, status: int, message: str
) -> None:
    server.refusals = [(status, {}, {"error": message})]
    visit(chrome, server)
    choose(chrome, picture)
    assert texts(chrome, "#classes .name") == list(NAMES)
    assert [kind for path, _, kind, _ in server.requests if path == "/v1/classify"] == ["image/png", "image/jpeg"]
    assert "Sent as a JPEG of 320 × 200" in text(chrome, "#facts")


def test_no_picture_at_all_behind_a_picture_s_name(chrome: Chrome, server: Stub, tmp_path: Path) -> None:
    (tmp_path / "leaf.jpg").write_bytes(b"no picture")
    server.refusals = [(415, {}, {"error": "the picture is none of JPEG, PNG, WEBP, BMP"})]
    visit(chrome, server)
    choose(chrome, tmp_path / "leaf.jpg")
    assert text(chrome, "#wrong") == "The server does not take this format"
    assert text(chrome, "#why") == "the picture is none of JPEG, PNG, WEBP, BMP"
    assert is_shown(chrome, "#blind")
    assert not is_shown(chrome, "#again")


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
    problems = "\n".join(troubles(chrome, server, width=1280))
    assert "TrustedScript" in problems
    assert "other.png" in problems
