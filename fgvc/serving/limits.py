"""Bounds on what a request may cost, and its refusal."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.responses import JSONResponse

from fgvc.config.images import MAX_PIXELS

MIB = 1 << 20
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


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
