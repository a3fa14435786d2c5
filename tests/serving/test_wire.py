"""uvicorn's protocol with our bounds, fed by hand: what it says to bytes, and when it hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.server import ServerState

from fgvc.serving.wire import BoundedHttpProtocol

GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
LIMIT = 64 << 10


class Transport(asyncio.Transport):
    """A client that only listens."""

    def __init__(self) -> None:
        super().__init__()
        self.output, self.ended, self.cut = b"", asyncio.Event(), False

    def write(self, data: Any) -> None:
        self.output += bytes(data)

    def close(self) -> None:
        self.ended.set()

    abort = close

    def is_closing(self) -> bool:
        return self.ended.is_set()

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers at once, whatever is still to come of the body."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


def play(
    *parts: bytes, seconds: float = 30, keep_alive: int = 30, wait: bool = False, pause: float = 0, app: ASGIApp = hello
) -> Transport:
    """The connection after `parts`, each handed over as it is; `wait`: until the server hangs up."""

    async def scene() -> Transport:
        config = Config(app, log_config=None, access_log=False, ws="none", timeout_keep_alive=keep_alive)
        protocol, transport = BoundedHttpProtocol(config, ServerState(), {}, seconds=seconds), Transport()
        protocol.connection_made(transport)
        for part in parts:
            if not transport.is_closing():
                protocol.data_received(part)
            await asyncio.sleep(pause)
        for _ in range(10):  # what came at once is answered in turn
            await asyncio.sleep(0)
        if wait:
            async with asyncio.timeout(20):
                await transport.ended.wait()
        transport.cut = transport.is_closing()
        protocol.connection_lost(None)
        return transport

    return asyncio.run(scene())


def test_requests_in_any_pieces() -> None:
    post = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc"
    for step in (1, 7, 1000):
        content = GET + post + GET
        connection = play(*(content[at : at + step] for at in range(0, len(content), step)))
        assert (connection.output.count(b"200 OK"), connection.cut) == (3, False)


@pytest.mark.parametrize(
    "endless",
    [
        lambda number: b"GET /" + b"x" * 1000 if not number else b"x" * 1000,
        lambda number: GET[:-2] + b"a: " if not number else b"x" * 1000,
        lambda number: GET[:-2] if not number else b"x" * 1000,
        lambda number: GET[:-2] if not number else b"a: b\r\n" * 150,
    ],
    ids=["address", "value", "name", "headers"],
)
def test_headers_without_end_are_cut_off(endless: Callable[[int], bytes]) -> None:
    connection = play(*map(endless, range(3 * LIMIT // 900)))
    assert connection.cut
    assert connection.output.startswith(b"HTTP/1.1 400 ")


def test_headers_below_the_limit_are_taken_in_any_pieces() -> None:
    long = GET[:-2] + b"a: " + b"x" * (LIMIT - 1000) + b"\r\n\r\n"
    for step in (100, 10_000, len(long)):
        content = (long + GET) * 2
        connection = play(*(content[at : at + step] for at in range(0, len(content), step)))
        assert (connection.output.count(b"200 OK"), connection.cut) == (4, False)


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [GET[:10]],
        [GET, GET[:10]],
        [GET, b"\r\n"],  # no request, but uvicorn stops waiting for one to end the connection
        [b"\r\n"] * 5,
        [b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n", b"abc"],  # has its answer, and dawdles
    ],
)
def test_connections_without_a_whole_request_are_closed_in_time(parts: list[bytes]) -> None:
    connection = play(*parts, seconds=0.3, wait=True)
    assert connection.output.count(b"HTTP/1.1") == any(part.endswith(b"\r\n\r\n") for part in parts)


def test_after_an_early_answer_and_the_rest_of_its_body_a_connection_may_rest_for_as_long_as_others() -> None:
    early = [b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 6\r\n\r\n", b"abcdef"]
    connection = play(*early, GET, seconds=0.3, pause=0.5)
    assert (connection.output.count(b"200 OK"), connection.cut) == (2, False)
    play(*early, keep_alive=1, wait=True)  # not for ever


def test_a_request_of_http_1_1_without_host_is_refused() -> None:
    assert play(b"GET / HTTP/1.1\r\n\r\n").output.startswith(b"HTTP/1.1 400 ")
    assert play(b"GET / HTTP/1.0\r\n\r\n").output.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("step", [1, 50, 10_000])  # bytes of one request
def test_an_upgrade_to_another_protocol_is_ignored(step: int) -> None:
    offer = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAAB\r\n"
    sized = b"POST / HTTP/1.1\r\nhost: x\r\n" + offer + b"content-length: 6\r\n\r\nbody-1"
    chunked = b"POST / HTTP/1.1\r\nhost: x\r\n" + offer + b"transfer-encoding: chunked\r\n\r\n6\r\nbody-2\r\n0\r\n\r\n"
    requests = [sized, chunked, GET[:-2] + offer + b"\r\n", sized]
    connection = play(*(one[at : at + step] for one in requests for at in range(0, len(one), step)), app=echo)
    assert (connection.output.count(b"200 OK"), connection.cut) == (4, False)
    assert (connection.output.count(b"body-1"), connection.output.count(b"body-2")) == (2, 1)

    assert play(sized * 1000, app=echo).cut  # and not by the end of Python's stack


def test_connect_is_refused() -> None:
    connection = play(b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n\r\nhello")
    assert (connection.output[:13], connection.cut) == (b"HTTP/1.1 400 ", True)
