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
_SMALL = 512 << 10  # an unread rest that is cheaper to read than a new connection
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
    """Refusal of a request; `reason` is short, for the metrics."""

    def __init__(self, status: int, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.reason = status, message, reason

    def response(self) -> JSONResponse:
        """Error response in Triton's form; of a server that is only busy, with Retry-After."""
        headers = {"Retry-After": "1"} if self.status == 503 else None
        return JSONResponse({"error": self.message}, self.status, headers)


class ClientGone(Exception):
    """The client disconnected."""


class BodyBudget:
    """Budget of the bytes of bodies in memory, of all requests together. For the event loop's thread alone."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self.bytes = limits, 0

    @asynccontextmanager
    async def body(self, request: Request, *, limit: int, deadline: float) -> AsyncIterator[bytes]:
        """Read a request's body, of at most `limit` bytes; `deadline`: when all must be there, on the event loop's clock.

        Raises Refusal (413, 408, 503) and ClientGone, as soon as there is a reason.
        """
        if (length_of(request.headers.get("content-length")) or 0) > limit:
            raise _too_large(limit)
        chunks: list[bytes] = []
        try:
            await self._read(request, chunks, limit, deadline)
            chunks[:] = [b"".join(chunks)]  # which returns a single one as it is
            yield chunks[0]
        finally:
            self.bytes -= sum(map(len, chunks))

    async def _read(self, request: Request, chunks: list[bytes], limit: int, deadline: float) -> None:
        """Read to the body's end, into `chunks`, whose bytes are counted."""
        now, stall = asyncio.get_running_loop().time, self._limits.stall_seconds
        size, more = 0, True
        try:
            async with asyncio.timeout_at(deadline) as bound:
                while more:
                    bound.reschedule(min(now() + stall, deadline))
                    message = await request.receive()
                    if message["type"] != "http.request":
                        raise ClientGone
                    chunk, more = message.get("body", b""), bool(message.get("more_body", False))
                    size += len(chunk)
                    if size > limit:
                        raise _too_large(limit)
                    if self.bytes + len(chunk) > self._limits.held_bytes:
                        raise Refusal(503, "too many requests are sending data; try again", reason="memory")
                    self.bytes += len(chunk)
                    chunks.append(chunk)
        except TimeoutError:
            raise Refusal(408, "the body did not arrive in time", reason="slow") from None


def length_of(text: str | None) -> int | None:
    """Number of bytes that a header gives; None where it is no number. Of any number of digits, which int() would refuse."""
    return int(text) if text and len(text) < 19 and text.isascii() and text.isdecimal() else None


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"the body has more than {limit} bytes")


class DrainMiddleware:
    """Middleware that reads the rest of a refused request's body, within bounds, before the connection closes: closing at once
    would reset it while the client still sends, and the answer might be lost."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        rest, chunked, closing = length_of(headers.get("content-length")) or 0, "transfer-encoding" in headers, False
        unread = rest > 0 or chunked

        async def receive_counted() -> Message:
            nonlocal rest, unread
            message = await receive()
            rest -= len(message.get("body", b""))
            unread = unread and message["type"] == "http.request" and bool(message.get("more_body", False))
            return message

        async def send_and_drain(message: Message) -> None:
            nonlocal closing
            if message["type"] == "http.response.start":
                closing = unread and (chunked or rest > _SMALL or message["status"] == 408)
                if closing:
                    message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            elif closing and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await drain()
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        async def drain() -> None:
            size = 0
            try:
                async with asyncio.timeout(_LINGER_SECONDS):
                    while unread and size < _LINGER_BYTES:
                        size += len((await receive_counted()).get("body", b""))
            except TimeoutError:
                pass

        await self._app(scope, receive_counted, send_and_drain)


class ApiKeyMiddleware:
    """Middleware that answers 401 where a request does not have the key: `Authorization: Bearer KEY` or `X-API-Key: KEY`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        key = headers.get("x-api-key", "")
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            key = token.strip()
        # In constant time, which does not depend on how much of the key was right.
        if hmac.compare_digest(key.encode("latin-1"), self._key):
            return await self._app(scope, receive, send)
        refused = JSONResponse({"error": "no valid API key"}, 401, {"WWW-Authenticate": "Bearer"})
        await refused(scope, receive, send)


def read_key(path: Path | None) -> str | None:
    """Read the key that requests need: a file's content, else FGVC_API_KEY; None: no key is needed.

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
