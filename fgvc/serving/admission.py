"""Bounded admission: a few requests are computed, a few wait, all others are refused at once.

Without a bound an overloaded server answers no request in time: each waits longer than its client does.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from starlette.requests import Request

from fgvc.serving.bodies import ClientGone
from fgvc.serving.limits import Refusal

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Job:
    work: Callable[[], Any]
    answer: asyncio.Future[Any]

    def fail(self, error: Exception) -> None:
        """Answer with an error, unless there is an answer already."""
        if not self.answer.done():
            self.answer.set_exception(error)


class Admission:
    """A few threads and a short queue before them, first come first served. For the event loop's thread alone.

    The threads are plain ones: concurrent.futures' locks and futures cost more than the rest of a request's path.
    """

    def __init__(self, *, concurrency: int, queue: int) -> None:
        self.concurrency, self.queue = concurrency, queue
        self.in_flight = 0  # requests between their arrival and their answer, also those whose body is being read
        self.running = 0  # in threads; also of clients who no longer wait: a thread can't be stopped
        self.draining = False
        self._waiting: deque[_Job] = deque()
        self._awaited: set[_Job] = set()  # their answers are awaited
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()  # for the threads
        for number in range(concurrency):
            Thread(target=self._compute, name=f"fgvc-infer-{number}", daemon=True).start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def full(self) -> bool:
        return self.running >= self.concurrency and self.waiting >= self.queue

    def refusal(self) -> Refusal | None:
        """Refusal of the next request, or None where it would be accepted."""
        return _shutting_down() if self.draining else _queue_full() if self.full else None

    @contextmanager
    def arrival(self) -> Iterator[None]:
        """Count a request as in flight, from before its body is read: a client that can't be served need not send it.

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
        """Run `work` in a thread and return its result. `request`: its body read, so that all that may come is a disconnect.

        Raises Refusal (503) where the queue is full and (504) past `deadline`, a time of the event loop's clock, and ClientGone.
        A job that waits is then dropped; one that runs goes on, and its thread is taken until it ends.
        """
        if self.full:
            raise _queue_full()
        loop = asyncio.get_running_loop()
        job = _Job(work, loop.create_future())
        self._awaited.add(job)
        self._waiting.append(job)
        self._start()
        disconnect = loop.create_task(_fail_on_disconnect(request, job))
        timeout = loop.call_at(deadline, job.fail, _too_late())
        try:
            return await job.answer
        finally:
            disconnect.cancel()
            timeout.cancel()
            self._awaited.discard(job)
            if job in self._waiting:
                self._waiting.remove(job)

    def abandon(self) -> None:
        """Refuse all requests that still wait for an answer."""
        for job in self._awaited:
            job.fail(_shutting_down())

    def close(self) -> None:
        for _ in range(self.concurrency):
            self._jobs.put(None)

    def _start(self) -> None:
        while self._waiting and self.running < self.concurrency:
            self.running += 1
            self._jobs.put(self._waiting.popleft())

    def _compute(self) -> None:
        """Run jobs in a thread until it is told to stop by None."""
        while (job := self._jobs.get()) is not None:
            result, error = None, None
            try:
                result = job.work()
            except Exception as caught:
                error = caught
            with suppress(RuntimeError):  # the loop is closed, and no request waits any more
                job.answer.get_loop().call_soon_threadsafe(self._finish, job, result, error)
            del job, result, error

    def _finish(self, job: _Job, result: Any, error: Exception | None) -> None:
        self.running -= 1
        if error is not None:
            job.fail(error)
        elif not job.answer.done():  # else its client no longer waits
            job.answer.set_result(result)
        self._start()


async def _fail_on_disconnect(request: Request, job: _Job) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.fail(ClientGone())


def _queue_full() -> Refusal:
    return Refusal(503, "the queue is full; try again", reason="queue_full")


def _too_late() -> Refusal:
    return Refusal(504, "the deadline passed before the answer was there", reason="deadline")


def _shutting_down() -> Refusal:
    return Refusal(503, "the server is shutting down", reason="draining")
