"""Load shedding: a request that can't be served is refused before anything else is done for it."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fgvc.serving.admission import Admission
from fgvc.serving.limits import Refusal
from fgvc.serving.metrics import OTHER, Metrics


class LoadSheddingMiddleware:
    """Turns work away at the price of a few lines: asked for five times what it can do, a server says so four times for each
    answer."""

    def __init__(self, app: ASGIApp, admission: Admission, metrics: Metrics) -> None:
        self._app, self._admission, self._metrics = app, admission, metrics
        self._said: dict[str, tuple[Message, Message]] = {}  # by reason: it is always the same

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._admission.refusal() if scope.get("method") == "POST" else None
        if refusal is None:
            return await self._app(scope, receive, send)
        self._metrics.rejected.labels(refusal.reason).inc()
        self._metrics.requests.labels(OTHER, "503").inc()
        start, body = self._said.get(refusal.reason) or self._say(refusal)
        await send(start)
        await send(body)

    def _say(self, refusal: Refusal) -> tuple[Message, Message]:
        response = refusal.response()
        start = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        self._said[refusal.reason] = start, {"type": "http.response.body", "body": response.body}
        return self._said[refusal.reason]
