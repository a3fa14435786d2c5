"""Load shedding (503 for POSTs where the server is full or stopping), and reading on after an early answer so that the client
sees it."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fgvc.serving.admission import Admission
from fgvc.serving.bodies import length_of
from fgvc.serving.limits import MIB, Refusal
from fgvc.serving.metrics import OTHER, Metrics

_SMALL = 512 << 10  # an unread rest that is cheaper to read than a new connection
_LINGER_SECONDS, _LINGER_BYTES = 2.0, 64 * MIB


class LoadSheddingMiddleware:
    """Middleware that refuses every POST while `Admission.refusal()` has a reason. It costs little: at five times its capacity, a
    server refuses four requests for each that it answers."""

    def __init__(self, app: ASGIApp, admission: Admission, metrics: Metrics) -> None:
        self._app, self._admission, self._metrics = app, admission, metrics
        self._responses: dict[str, tuple[Message, Message]] = {}  # by reason

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._admission.refusal() if scope.get("method") == "POST" else None
        if refusal is None:
            return await self._app(scope, receive, send)
        self._metrics.rejected.labels(refusal.reason).inc()
        self._metrics.requests.labels(OTHER, "503").inc()
        start, body = self._responses.get(refusal.reason) or self._build(refusal)
        await send(start)
        await send(body)

    def _build(self, refusal: Refusal) -> tuple[Message, Message]:
        response = refusal.response()
        start = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        self._responses[refusal.reason] = start, {"type": "http.response.body", "body": response.body}
        return self._responses[refusal.reason]


class LingerMiddleware:
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

        async def send_and_linger(message: Message) -> None:
            nonlocal closing
            if message["type"] == "http.response.start":
                closing = unread and (chunked or rest > _SMALL or message["status"] == 408)
                if closing:
                    message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            elif closing and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await linger()
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        async def linger() -> None:
            size = 0
            try:
                async with asyncio.timeout(_LINGER_SECONDS):
                    while unread and size < _LINGER_BYTES:
                        size += len((await receive_counted()).get("body", b""))
            except TimeoutError:
                pass

        await self._app(scope, receive_counted, send_and_linger)
