"""The HTTP protocol: uvicorn's on httptools, with the bounds that it lacks.

On h11, uvicorn's other parser, a tensor of 300 kB took 1.6 ms more of the CPU, a tenth of what a small network takes.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

_HEAD_BYTES = 64 << 10  # of a request's line and headers
_UNREAD_BYTES = 512 << 10  # of a body that the application has not taken yet: beyond it reading pauses


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with bounds on the time and the size of headers, for which it would wait and collect without end."""

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], *, seconds: float, **others: Any
    ) -> None:
        """Bounds: `seconds` for a request's headers, and for the rest of one that has its answer already."""
        super().__init__(config, server_state, app_state, **others)
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self._data = b""  # what just arrived
        self._in_head = False  # the headers are not whole yet
        self._fresh = False  # what just arrived began or ended a head
        self._ended = False  # what just arrived ended a request
        self._head = self._pieces = 0  # bytes: of names and values so far; of what arrived for a head that is not whole

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(self._seconds, transport.abort)

    def data_received(self, data: bytes) -> None:
        self._data, self._fresh, self._ended = data, False, False
        super().data_received(data)
        if self._in_head and not self._fresh:
            self._pieces += len(data)
            if self._pieces > _HEAD_BYTES:  # httptools keeps the pieces of one name or value to itself
                return self.send_400_response("The headers are too long.")
        # uvicorn stops its own clock whatever arrives: empty lines, or the rest of a body that was refused.
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            seconds = self.timeout_keep_alive if self._ended else self._seconds
            self._timer = self.loop.call_later(seconds, self.transport.abort)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._cancel_timer()
        self._in_head, self._fresh, self._ended = True, True, False
        self._head = self._pieces = 0

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.get_method() == b"CONNECT":
            raise ValueError("no proxy")
        if self.parser.should_upgrade():
            return  # see below
        if self.parser.get_http_version() == "1.1" and all(name != b"host" for name, _ in self.headers):
            raise ValueError("no host")
        self._in_head, self._fresh = False, True
        self._cancel_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Collect the body without uvicorn's two copies, and with more room: at its 64 KiB a tensor cost more system calls."""
        cycle = self.cycle
        if cycle.response_complete:
            return
        if not cycle.body:
            cycle.body = body  # type: ignore[assignment]  # is only read from, as long as nothing is added
        else:
            cycle.body = bytearray(cycle.body) if isinstance(cycle.body, bytes) else cycle.body
            cycle.body += body
        if len(cycle.body) > _UNREAD_BYTES:
            self.flow.pause_reading()
        cycle.message_event.set()

    def _unsupported_upgrade_warning(self) -> None:
        """Ignore an offer to speak another protocol, such as h2c, which Java's own client makes with every request.

        httptools would take what follows the headers, the body too, for that protocol's: it reads all again without the offer.
        """
        error = sys.exception()
        assert isinstance(error, httptools.HttpParserUpgrade)
        if not self._data:  # pipelined behind another: not for any number of times
            return self.send_400_response("One offer at a time.")
        rest, self._data = self._data[error.args[0] :], b""
        line = self.parser.get_method() + b" " + self.url + b" HTTP/1.1\r\n"
        headers = [name + b": " + value + b"\r\n" for name, value in self.headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        super().data_received(b"".join([line, *headers, b"\r\n", rest]))

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._ended = True
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        super().connection_lost(exc)

    def _count(self, size: int) -> None:
        """Count bytes of the headers. Raises ValueError, upon which uvicorn answers 400, and closes."""
        self._head += size
        if self._head > _HEAD_BYTES:
            raise ValueError("the headers are too long")

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
