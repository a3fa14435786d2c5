"""Exception handlers of the server: from an error to its response, in the form of Triton's errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from fgvc.serving.bodies import ClientGone
from fgvc.serving.limits import Refusal
from fgvc.serving.metrics import GONE


async def refused(request: Request, error: Exception) -> Response:
    """Answer a Refusal, and count it."""
    assert isinstance(error, Refusal)
    if error.reason:
        request.app.state.service.metrics.rejected.labels(error.reason).inc()
    return error.response()


async def gone(request: Request, error: Exception) -> Response:
    """Count a client that disconnected; nobody reads this answer."""
    request.app.state.service.metrics.rejected.labels("gone").inc()
    return Response(status_code=GONE)


async def out_of_memory(request: Request, error: Exception) -> Response:
    """Answer 503 where memory was short."""
    return await refused(request, Refusal(503, "not enough memory for this request", reason="out_of_memory"))


async def http_error(request: Request, error: Exception) -> Response:
    """Answer an error of Starlette's routing in Triton's form."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)


async def invalid(request: Request, error: Exception) -> Response:
    """Answer 400 with the first parameter that does not validate."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return JSONResponse({"error": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"}, 400)


async def broken(request: Request, error: Exception) -> Response:
    """Answer 500; the traceback goes to stderr."""
    return JSONResponse({"error": "internal error"}, 500)


HANDLERS: tuple[tuple[type[Exception], Callable[[Request, Exception], Awaitable[Response]]], ...] = (
    (Refusal, refused), (ClientGone, gone), (MemoryError, out_of_memory), (HTTPException, http_error),
    (RequestValidationError, invalid), (Exception, broken),
)  # fmt: skip
