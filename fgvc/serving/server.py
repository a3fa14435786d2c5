"""`fgvc serve`: the process around the application. Bind, load, answer, reload on SIGHUP, drain on SIGTERM."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import prometheus_client
import uvicorn
from starlette.types import ASGIApp

from fgvc.errors import FgvcError
from fgvc.runtime.engine import available_cpus
from fgvc.serving.admission import Admission
from fgvc.serving.app import Service, make_app
from fgvc.serving.examples import read_examples
from fgvc.serving.limits import Limits
from fgvc.serving.models import ModelRegistry
from fgvc.serving.wire import BoundedHttpProtocol

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # malloc.h
_KEEP_ALIVE = 75  # seconds; load balancers hold a connection for a minute, and must be the first to close it


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of `fgvc serve`."""

    host: str = "127.0.0.1"
    port: int = 8000
    threads: int = 1  # of onnxruntime in a request: on CPUs requests side by side give more than threads within one
    concurrency: int | None = None  # None: available CPUs / threads
    queue: int = 32
    grace: float = 20.0  # seconds from SIGTERM until the remaining requests are cut off
    poll: float = 0.0  # seconds between checks of the manifests; 0: reload on SIGHUP only
    any_bundle: bool = False  # a reload takes one of other labels or another preprocessing, too
    key: str | None = None
    limits: Limits = field(default_factory=Limits)
    examples: Sequence[Path] = ()  # files and folders of pictures that the page offers


def serve(places: Mapping[str, Path], settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; returns 0, or 1 where requests had to be cut off. Raises FgvcError for a bundle that can't
    be loaded and an address that can't be had, before anything is answered."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it can be answered: by default it would end the process
    _give_back_memory()
    prometheus_client.disable_created_metrics()  # an unneeded second line for each
    with _bind(settings.host, settings.port) as listener:
        models = ModelRegistry(places, threads=settings.threads, any_bundle=settings.any_bundle)
        concurrency = settings.concurrency or max(1, available_cpus() // settings.threads)
        admission = Admission(concurrency=concurrency, queue=settings.queue)
        examples = read_examples(settings.examples, max_pixels=settings.limits.pixels)
        app = make_app(Service(models, admission, settings.limits, examples=examples), key=settings.key)
        for served in models:
            extra = "" if served.explainer is None else ", explain"
            print(f"{served.name}: {len(served.labels)} classes{extra}", file=sys.stderr)
        print(
            f"{concurrency} at a time with {settings.threads} thread(s) each, {settings.queue} waiting; "
            f"{available_cpus()} CPU(s) available",
            file=sys.stderr,
        )
        server = _Server(_config(app, settings), models, admission, settings)
        asyncio.run(server.serve(sockets=[listener]))
    admission.close()
    if server.cut:
        print(f"{server.cut} request(s) were cut off after {settings.grace:g} s", file=sys.stderr)
    if admission.running:  # without a client: a thread that still computes would hold the process
        sys.stderr.flush()
        os._exit(1 if server.cut else 0)
    return 1 if server.cut else 0


def _give_back_memory() -> None:
    """Return blocks of the size of large pictures to the system when they are freed. glibc learns to keep them: four pictures of
    40 megapixels would leave a gigabyte with the process for good."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 4 << 20)
        ctypes.CDLL(None).mallopt(_M_TRIM_THRESHOLD, 16 << 20)


def _config(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app, http=partial(BoundedHttpProtocol, seconds=settings.limits.stall_seconds),  # type: ignore[arg-type]
        loop="asyncio", ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
        proxy_headers=False, timeout_keep_alive=_KEEP_ALIVE, timeout_graceful_shutdown=3,  # more than LingerMiddleware takes
    )  # fmt: skip


class _Server(uvicorn.Server):
    """Server that drains before uvicorn closes its sockets, so that health checks are answered as long as requests are."""

    def __init__(self, config: uvicorn.Config, models: ModelRegistry, admission: Admission, settings: Settings) -> None:
        super().__init__(config)
        self._models, self._admission, self._settings = models, admission, settings
        self._background: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None  # None: not started
        self.cut = 0  # requests that were not answered

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._loop.add_signal_handler(signal.SIGHUP, lambda: self._start(self._reload(changed_only=False)))
        if self._settings.poll:
            self._start(self._poll())
        assert sockets is not None
        host, port = sockets[0].getsockname()[:2]
        print(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, end at once at a second one. uvicorn's own handler would raise the signal again, and exit
        with it."""
        if self._admission.draining or self._loop is None:
            self.should_exit = self.force_exit = True
            self.cut = self._admission.in_flight
            return
        self._admission.draining = True  # at once, whatever the event loop does just now
        self._loop.call_soon_threadsafe(lambda: self._start(self._drain()))

    async def _drain(self) -> None:
        now = asyncio.get_running_loop().time
        end = now() + self._settings.grace
        while self._admission.in_flight and now() < end:
            await asyncio.sleep(0.02)
        self.cut = self._admission.in_flight
        self._admission.abandon()
        self.should_exit = True

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._settings.poll)
            await self._reload(changed_only=True)

    async def _reload(self, *, changed_only: bool) -> None:
        await asyncio.to_thread(self._models.reload, changed_only=changed_only)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)  # the loop itself holds tasks by weak references
        task.add_done_callback(self._background.discard)


def _bind(host: str, port: int) -> socket.socket:
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # "localhost" is both; clients that know one of them know this one.
        family, kind, number, _, address = min(addresses, key=lambda entry: entry[0] != socket.AF_INET)
        listener = socket.socket(family, kind, number)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise FgvcError(f"{host}:{port}: can't listen there: {error}") from error
    return listener
