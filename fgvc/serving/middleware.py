"""Load shedding: a request that can't be served is refused before anything else is done for it."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fgvc.serving.admission import Admission
from fgvc.serving.limits import Refusal
from fgvc.serving.metrics import OTHER, Metrics


class LoadSheddingMiddleware:
    """Middleware that refuses requests at the least cost: at five times its capacity, a server refuses four requests for each
    that it answers."""

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
