"""The API key: where it is read from, and the middleware that asks for it."""

from __future__ import annotations

import hmac
import os
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fgvc.errors import FgvcError

OPEN_PATHS = frozenset({"/", "/v2/health/live", "/v2/health/ready"})  # what health checks and a browser's first visit need


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
