"""A page in headless Chromium, from disk: what a reader would trip over."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@contextmanager
def browser() -> Iterator[Chrome]:
    """A browser with a profile of its own. Skips where there is none; nothing is downloaded. The test needs
    `pytest.mark.allow_hosts(["127.0.0.1", "localhost"])`, by which selenium speaks to the driver."""
    program, driver = next(filter(None, map(which, BROWSERS)), None), which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no chromium and chromedriver here (Debian: chromium, chromium-driver)")
    options = ChromeOptions()
    options.binary_location = program
    # Not pytest's folder: the path of a socket may have 108 characters, and Chromium ends silently where it has more.
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for flag in (*FLAGS, f"--user-data-dir={folder}/profile"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = ChromeService(driver, env={"PATH": "/usr/bin:/bin", "TMPDIR": folder, "HOME": folder})
        chrome = Chrome(options, service)
        try:
            yield chrome
        finally:
            chrome.quit()


def problems(chrome: Chrome, page: Path, *, width: int) -> list[str]:
    """What is wrong with a page on a screen of `width` pixels, all that folds unfolded: it is wider than the screen, pictures
    are missing, the console complains, something is fetched."""
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    chrome.get("about:blank")
    for log in ("browser", "performance"):
        chrome.get_log(log)  # of the pages before, a new tab's own among them
    chrome.get(page.as_uri())
    chrome.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true })")
    faults = []
    wide = chrome.execute_script("return document.documentElement.scrollWidth")
    if wide > width:
        faults.append(f"{wide} pixels wide on a screen of {width}")
    missing = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.alt)"
    faults += [f"a picture is missing: {alt}" for alt in chrome.execute_script(missing)]
    faults += [entry["message"] for entry in chrome.get_log("browser")]
    for entry in chrome.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if not url.startswith("data:") and url != page.as_uri():
                faults.append(f"asked for {url}")
        if message["method"] == "Network.loadingFailed":
            faults.append(f"did not load: {message['params']['errorText']}")
    return faults


def pdf(chrome: Chrome) -> tuple[bytes, int]:
    """The page as it prints, and on how many sheets."""
    content = base64.b64decode(chrome.print_page())
    return content, max(int(count) for count in re.findall(rb"/Count (\d+)", content))
