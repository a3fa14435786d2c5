"""Reading a request's body within bounds of size, time and memory, each checked before it is spent.

A body is cut off while it is read: Starlette reads a form to its end before a handler could refuse it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from fgvc.serving.limits import Limits, Refusal


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
