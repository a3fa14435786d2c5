"""The queue: its bound, deadlines, clients that leave. Work is held by an event, not by sleeping."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from starlette.requests import Request

from fgvc.serving.admission import Admission
from fgvc.serving.bodies import BodyBudget, ClientGone
from fgvc.serving.limits import Limits, Refusal


class Client:
    """A request whose body, and whose leaving, the test sends."""

    def __init__(self, *parts: bytes) -> None:
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        for part in parts:
            self.messages.put_nowait({"type": "http.request", "body": part, "more_body": True})
        self.request = Request({"type": "http", "method": "POST", "headers": []}, self.messages.get)

    def end(self) -> None:
        self.messages.put_nowait({"type": "http.request", "body": b"", "more_body": False})

    def leave(self) -> None:
        self.messages.put_nowait({"type": "http.disconnect"})


class Work:
    """Counts its calls, each of which waits until it may end."""

    def __init__(self) -> None:
        self.calls, self.may_end = 0, threading.Event()

    def __call__(self) -> str:
        self.calls += 1
        assert self.may_end.wait(20)
        return "done"


def soon() -> float:
    return asyncio.get_running_loop().time() + 20


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.001)


def play(
    scene: Callable[[Admission, Work], Coroutine[Any, Any, None]], *, concurrency: int = 1, queue: int = 2
) -> None:
    admission, work = Admission(concurrency=concurrency, queue=queue), Work()
    try:
        asyncio.run(scene(admission, work))
    finally:
        work.may_end.set()
        admission.close()


def begin(
    admission: Admission, work: Work, client: Client | None = None, deadline: float | None = None
) -> asyncio.Task:
    return asyncio.ensure_future(admission.run(work, (client or Client()).request, deadline=deadline or soon()))


def test_so_many_run_so_many_wait_and_the_rest_are_refused() -> None:
    async def scene(admission: Admission, work: Work) -> None:
        tasks = [begin(admission, work) for _ in range(20)]
        await until(lambda: sum(task.done() for task in tasks) == 15)
        assert (admission.running, admission.waiting, admission.full) == (2, 3, True)
        for task in tasks[5:]:  # first come, first served
            error = task.exception()
            assert isinstance(error, Refusal)
            assert (error.status, error.response().headers["retry-after"]) == (503, "1")
        with pytest.raises(Refusal, match="queue is full"), admission.arrival():
            pass
        work.may_end.set()
        assert await asyncio.gather(*tasks[:5]) == ["done"] * 5
        assert (admission.running, admission.waiting, work.calls) == (0, 0, 5)

    play(scene, concurrency=2, queue=3)


def test_a_request_past_its_deadline_leaves_the_queue_uncomputed() -> None:
    async def scene(admission: Admission, work: Work) -> None:
        first = begin(admission, work)
        late = begin(admission, work, deadline=asyncio.get_running_loop().time() + 0.05)
        with pytest.raises(Refusal) as caught:
            await late
        assert caught.value.status == 504
        assert admission.waiting == 0
        work.may_end.set()
        await first
        await until(lambda: admission.running == 0)
        assert work.calls == 1

    play(scene)


def test_a_client_that_leaves_frees_its_place() -> None:
    async def scene(admission: Admission, work: Work) -> None:
        first, client = begin(admission, work), Client()
        second, third = begin(admission, work, client), begin(admission, work)
        await until(lambda: admission.full)
        client.leave()
        with pytest.raises(ClientGone):
            await second
        assert admission.waiting == 1
        work.may_end.set()
        assert await asyncio.gather(first, third) == ["done"] * 2
        assert work.calls == 2

    play(scene)


def test_a_thread_stays_taken_until_it_really_ends() -> None:
    async def scene(admission: Admission, work: Work) -> None:
        client = Client()
        first = begin(admission, work, client)
        await until(lambda: work.calls == 1)
        client.leave()
        with pytest.raises(ClientGone):
            await first
        second = begin(admission, work)
        await asyncio.sleep(0.05)
        assert (admission.running, admission.waiting, work.calls) == (1, 1, 1)
        work.may_end.set()
        assert await second == "done"

    play(scene)


def test_errors_of_work_reach_who_asked_and_free_the_thread() -> None:
    async def scene(admission: Admission, work: Work) -> None:
        def fail() -> None:
            raise MemoryError("no more")

        with pytest.raises(MemoryError, match="no more"):
            await admission.run(fail, Client().request, deadline=soon())
        left = Client()
        left.leave()
        with pytest.raises(ClientGone):  # nobody asks for this error, and nothing complains that it was never fetched
            await admission.run(work, left.request, deadline=soon())
        work.may_end.set()
        assert await admission.run(lambda: 1, Client().request, deadline=soon()) == 1

    play(scene)


def test_who_was_there_is_served_while_the_server_drains_and_nobody_else() -> None:
    async def scene(admission: Admission, work: Work) -> None:
        with admission.arrival():
            admission.draining = True
            assert admission.in_flight == 1
            work.may_end.set()
            assert await begin(admission, work) == "done"
        assert admission.in_flight == 0
        with pytest.raises(Refusal, match="shutting down") as caught, admission.arrival():
            pass
        assert caught.value.status == 503

    play(scene)


async def read(budget: BodyBudget, client: Client, *, limit: int = 100, deadline: float | None = None) -> bytes:
    async with budget.body(client.request, limit=limit, deadline=deadline or soon()) as body:
        assert budget.bytes == len(body)
        return body


def test_bodies_that_stall_drip_or_break_off() -> None:
    async def scene() -> None:
        budget = BodyBudget(Limits(stall_seconds=0.05))
        client = Client(b"ab", b"cd")
        client.end()
        assert await read(budget, client) == b"abcd"
        with pytest.raises(Refusal) as caught:
            await read(budget, Client(b"ab"))
        assert caught.value.status == 408

        client = Client(b"a")
        task = asyncio.ensure_future(read(budget, client, deadline=asyncio.get_running_loop().time() + 0.2))
        while not task.done():  # never stalls, and never ends
            client.messages.put_nowait({"type": "http.request", "body": b"", "more_body": True})
            await asyncio.sleep(0.01)
        assert isinstance(task.exception(), Refusal)

        client = Client(b"ab")
        client.leave()
        with pytest.raises(ClientGone):
            await read(budget, client)
        with pytest.raises(Refusal) as caught:
            await read(budget, Client(b"ab", b"c" * 99))
        assert caught.value.status == 413
        assert budget.bytes == 0

    asyncio.run(scene())
