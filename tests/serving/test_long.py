"""The server after ten thousand requests: no error, no growth of memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serving.corpus import corpus
from tests.serving.small import picture, save_bundle, serving

pytestmark = [pytest.mark.slow, pytest.mark.allow_hosts(["127.0.0.1"]), pytest.mark.timeout(900)]
COUNT, WARM = 10_000, 500


def test_memory_stays_where_it_was(tmp_path: Path) -> None:
    good = [picture((9, 99, 199), kind, (300, 200)) for kind in ("JPEG", "PNG", "WEBP", "BMP")]
    with serving(tmp_path, save_bundle(tmp_path / "other")) as server, server.client() as client:
        for number in range(COUNT):
            assert client.post("/v1/classify", content=good[number % 4]).status_code == 200
            if number == WARM:
                before = server.rss()
        assert server.rss() <= 1.1 * before


def test_malformed_requests_cost_no_memory(tmp_path: Path) -> None:
    with serving(tmp_path, save_bundle(tmp_path / "other")) as server, server.client() as client:
        for number, (path, body, headers) in enumerate(corpus(COUNT)):
            assert client.post(path, content=body, headers=headers).status_code < 500
            if number == WARM:
                before = server.rss()
        assert server.rss() - before < 64 << 20
    assert "Traceback" not in server.errors.read_text()
