"""Limits on what a request may cost (size, time, memory), each checked before it is spent, and the API key.

Bodies are cut off while they are read: Starlette reads a form to its end before a handler could refuse it.
"""

from __future__ import annotations

import asyncio
import hmac
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fgvc.config.images import MAX_PIXELS
from fgvc.errors import FgvcError

MIB = 1 << 20
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
OPEN_PATHS = frozenset({"/", "/v2/health/live", "/v2/health/ready"})  # what probes and a browser's first visit need
_SMALL = 512 << 10  # an unread rest that is cheaper to swallow than a new connection
_LINGER_SECONDS, _LINGER_BYTES = 2.0, 64 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on one request, and on the bodies of all that are there at once."""

    image_bytes: int = 10 * MIB
    tensor_bytes: int = 32 * MIB
    pixels: int = MAX_PIXELS  # known from the header, before any is decoded
    batch: int = 16  # images in a tensor request
    held_bytes: int = 256 * MIB  # bodies of all requests together
    seconds: float = 30.0  # from a request's arrival to its answer
    stall_seconds: float = 5.0  # without a byte of a body, or until a request's headers are whole


class Refusal(Exception):
    """A request that gets no answer; `reason` is short, for the metrics."""

    def __init__(self, status: int, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.reason = status, message, reason

    def response(self) -> JSONResponse:
        """As Triton words errors; a server that is only busy says when to come again."""
        headers = {"Retry-After": "1"} if self.status == 503 else None
        return JSONResponse({"error": self.message}, self.status, headers)


class ClientGone(Exception):
    """The client went away."""


class BodyBudget:
    """Bytes of bodies in memory, of all requests together. For the event loop's thread alone."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self.bytes = limits, 0

    @asynccontextmanager
    async def body(self, request: Request, *, limit: int, deadline: float) -> AsyncIterator[bytes]:
        """A request's body, of at most `limit` bytes; `deadline`: when all must be there, on the event loop's clock.

        Raises Refusal (413, 408, 503) and Gone, as soon as there is a reason.
        """
        if (length_of(request.headers.get("content-length")) or 0) > limit:
            raise _too_large(limit)
        parts: list[bytes] = []
        try:
            await self._read(request, parts, limit, deadline)
            parts[:] = [b"".join(parts)]  # which returns a single one as it is
            yield parts[0]
        finally:
            self.bytes -= sum(map(len, parts))

    async def _read(self, request: Request, parts: list[bytes], limit: int, deadline: float) -> None:
        """Until the body's end, into `parts`, whose bytes are counted as held."""
        now, stall = asyncio.get_running_loop().time, self._limits.stall_seconds
        size, more = 0, True
        try:
            async with asyncio.timeout_at(deadline) as bound:
                while more:
                    bound.reschedule(min(now() + stall, deadline))
                    message = await request.receive()
                    if message["type"] != "http.request":
                        raise ClientGone
                    part, more = message.get("body", b""), bool(message.get("more_body", False))
                    size += len(part)
                    if size > limit:
                        raise _too_large(limit)
                    if self.bytes + len(part) > self._limits.held_bytes:
                        raise Refusal(503, "too many requests are sending data; try again", reason="memory")
                    self.bytes += len(part)
                    parts.append(part)
        except TimeoutError:
            raise Refusal(408, "the body did not arrive in time", reason="slow") from None


def length_of(text: str | None) -> int | None:
    """A header's number of bytes; None for what is none. Of any number of digits, which Python's int would refuse."""
    return int(text) if text and len(text) < 19 and text.isascii() and text.isdecimal() else None


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"the body has more than {limit} bytes")


class DrainMiddleware:
    """Lets a client that is still sending read why it is refused: an unread rest of its body is swallowed, within bounds, before
    the connection closes. Closing at once would reset it, and the answer might be lost."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        rest, chunked, closing = length_of(headers.get("content-length")) or 0, "transfer-encoding" in headers, False
        unread = rest > 0 or chunked

        async def watched() -> Message:
            nonlocal rest, unread
            message = await receive()
            rest -= len(message.get("body", b""))
            unread = unread and message["type"] == "http.request" and bool(message.get("more_body", False))
            return message

        async def polite(message: Message) -> None:
            nonlocal closing
            if message["type"] == "http.response.start":
                closing = unread and (chunked or rest > _SMALL or message["status"] == 408)
                if closing:
                    message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            elif closing and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await swallow()
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        async def swallow() -> None:
            seen = 0
            try:
                async with asyncio.timeout(_LINGER_SECONDS):
                    while unread and seen < _LINGER_BYTES:
                        seen += len((await watched()).get("body", b""))
            except TimeoutError:
                pass

        await self._app(scope, watched, polite)


class ApiKeyMiddleware:
    """Answers 401 where a request does not bring the key: `Authorization: Bearer KEY` or `X-API-Key: KEY`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        given = headers.get("x-api-key", "")
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given = token.strip()
        # In constant time: how long it takes tells nothing of how much was right.
        if hmac.compare_digest(given.encode("latin-1"), self._key):
            return await self._app(scope, receive, send)
        refused = JSONResponse({"error": "no valid API key"}, 401, {"WWW-Authenticate": "Bearer"})
        await refused(scope, receive, send)


def read_key(path: Path | None) -> str | None:
    """The key that clients must bring: a file's content, else FGVC_API_KEY; None: anybody may ask.

    Raises FgvcError for one that is empty, or that no header can hold: a mistake must not open the server.
    """
    if path is None and "FGVC_API_KEY" not in os.environ:
        return None
    where = "FGVC_API_KEY" if path is None else str(path)
    try:
        key = (os.environ["FGVC_API_KEY"] if path is None else path.read_text(encoding="utf-8")).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise FgvcError(f"{where}: can't read the API key: {error}") from error
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise FgvcError(f"{where}: an API key is some printable ASCII characters without a space")
    return key
