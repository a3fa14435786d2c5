"""Bounded admission: so many requests are computed, so many wait, the rest are refused at once.

Without a bound an overloaded server answers nobody: each request waits longer than its client does.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request

from fgvc.serve.limits import Gone, Refusal

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Job:
    work: Callable[[], Any]
    answer: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Admission:
    """A few threads and a short queue before them, first come first served. For the event loop's thread alone."""

    def __init__(self, *, concurrency: int, queue: int) -> None:
        self.concurrency, self.queue = concurrency, queue
        self.in_flight = 0  # requests between their arrival and their answer, also those whose body is being read
        self.running = 0  # in threads; also of clients who no longer wait: a thread can't be stopped
        self.draining = False
        self._waiting: deque[_Job] = deque()
        self._asked: set[_Job] = set()  # whose answers somebody waits for
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="fgvc-infer")

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def full(self) -> bool:
        return self.running >= self.concurrency and self.waiting >= self.queue

    def refusal(self) -> Refusal | None:
        """Why nothing more is accepted, if so."""
        return _shutting_down() if self.draining else _queue_full() if self.full else None

    @contextmanager
    def arrival(self) -> Iterator[None]:
        """Around a request, from before its body is read: who can't be served need not send it.

        Raises Refusal (503) where the queue is full, or the server is about to stop.
        """
        if refusal := self.refusal():
            raise refusal
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    async def run(self, work: Callable[[], T], request: Request, *, deadline: float) -> T:
        """What `work` returns, in a thread. `request`: its body read, so that all that may come is its client's leaving.

        Raises Refusal (503) where the queue is full and (504) past `deadline`, a time of the event loop's clock, and Gone. A
        job that waits is then dropped; one that runs goes on, and its thread is taken until it ends.
        """
        if self.full:
            raise _queue_full()
        job = _Job(work)
        self._asked.add(job)
        self._waiting.append(job)
        self._start()
        left = asyncio.ensure_future(_left(request))
        seconds = max(0.0, deadline - asyncio.get_running_loop().time())
        try:
            await asyncio.wait({job.answer, left}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if job.answer.done():
                return job.answer.result()
            if left.done():
                raise Gone
            raise Refusal(504, "the deadline passed before the answer was there", reason="deadline")
        finally:
            left.cancel()
            job.answer.cancel()
            self._asked.discard(job)
            if job in self._waiting:
                self._waiting.remove(job)

    def abandon(self) -> None:
        """Refuse whoever still waits for an answer."""
        for job in self._asked:
            if not job.answer.done():
                job.answer.set_exception(_shutting_down())

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> None:
        while self._waiting and self.running < self.concurrency:
            job = self._waiting.popleft()
            self.running += 1
            done = asyncio.get_running_loop().run_in_executor(self._threads, job.work)
            done.add_done_callback(partial(self._finish, job))

    def _finish(self, job: _Job, done: asyncio.Future[Any]) -> None:
        self.running -= 1
        error = done.exception()
        if job.answer.done():
            pass  # its client no longer waits
        elif error is not None:
            job.answer.set_exception(error)
        else:
            job.answer.set_result(done.result())
        self._start()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _queue_full() -> Refusal:
    return Refusal(503, "the queue is full; try again", reason="queue_full")


def _shutting_down() -> Refusal:
    return Refusal(503, "the server is shutting down", reason="draining")
