"""Speed of the server (`fgvc bench serve`): server and client on a core each, beside onnxruntime alone in the same minute.

Ratios travel, seconds do not. The load under which requests are refused is open-loop: they come when they come, and the time that
counts begins when a request should have been sent, not when the client got round to it.
"""

from __future__ import annotations

import asyncio
import csv
import io
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from fgvc.errors import FgvcError
from fgvc.images.decode import decode
from fgvc.io.files import writing
from fgvc.runtime.bundle import load_bundle
from fgvc.runtime.engine import Engine, feed
from fgvc.serving.protocol import HEADER_LENGTH, TYPES

ROUNDS = 12  # of every measurement in turn
BLOCK = 40  # images in one of them
BATCH = 4  # images in a request of several
OVERLOAD = 5.0  # times what the server can do
MAX_REQUESTS = 20_000
CONNECTIONS = 400


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured figure, with its limit."""

    name: str
    value: float
    unit: str
    bar: str = ""  # its limit


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    seconds: float
    ended: float  # by `time.perf_counter`


@dataclass(slots=True)
class _Client:
    """Keep-alive connections to one server, opened as they are needed."""

    host: str
    port: int
    _idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    @classmethod
    def of(cls, url: str) -> _Client:
        return cls(urlsplit(url).hostname or "", urlsplit(url).port or 0)

    async def send(self, request: bytes, *, since: float | None = None) -> _Reply:
        """Send a request and read the reply. `since`: when it should have been sent, by `time.perf_counter`."""
        began = time.perf_counter() if since is None else since
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(self.host, self.port)
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        await reader.readexactly(int(head.split(b"\r\ncontent-length: ")[1].split(b"\r\n")[0]))
        if b"connection: close" in head:
            writer.close()
        else:
            self._idle.append((reader, writer))
        ended = time.perf_counter()
        return _Reply(int(head[9:12]), ended - began, ended)

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


def bench_serve(bundle: Path, *, image: Path | None = None, seconds: float = 5.0) -> list[Figure]:
    """Measure all figures for one bundle. `image`: to classify; default: a drawn 500 x 375 JPEG. `seconds`: of overload.

    Needs two CPUs, to keep client and server apart. Raises FgvcError.
    """
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise FgvcError("bench serve: needs two CPUs, one for the server and one for the client")
    picture = _drawn_jpeg() if image is None else image.read_bytes()
    engine = Engine(load_bundle(bundle), threads=1)
    session = engine.session
    x = feed(np.random.default_rng(0).random((1, 3, *engine.bundle.preprocess.size), dtype=np.float32), session.file)
    several = np.repeat(x, BATCH, axis=0)
    classify = _request("/v1/classify", picture)
    cases: dict[str, tuple[bytes, Callable[[], object], int]] = {
        "infer": (_tensor(x, session.input), lambda: session.infer(x), BLOCK),
        f"infer of {BATCH}": (_tensor(several, session.input), lambda: session.infer(several), max(2, BLOCK // BATCH)),
        "classify": (classify, lambda: engine.classify([decode(picture)]), BLOCK),
    }  # a request, the same work without a server, how often
    try:
        os.sched_setaffinity(0, {cpus[0]})
        with _server(bundle, cpus[-1]) as (process, url, ready):
            figures = [Figure("ready after", ready, "s", "<= 3")]
            for title, (request, without_server, count) in cases.items():
                figures += _bench_case(title, request, without_server, count, url, process.pid, cpus[-1])
            figures += asyncio.run(_overload(classify, url, seconds))
            figures.append(Figure("RSS at the end", _rss(process.pid), "MB", "< 300 for tf_efficientnet_lite0"))
        return figures
    finally:
        os.sched_setaffinity(0, cpus)


def show_figures(figures: Sequence[Figure]) -> None:
    """Print a table on stdout. Not in fgvc.cli.show, which imports the training packages."""
    table = Table("figure", "", "", "should be", box=None, pad_edge=False, header_style="bold")
    table.columns[1].justify = "right"
    for figure in figures:
        table.add_row(figure.name, f"{figure.value:.2f}", figure.unit, figure.bar)
    Console(highlight=False).print(table)


def write_figures(path: Path, figures: Sequence[Figure]) -> None:
    """Write the figures as CSV, one a line."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["name", "value", "unit", "bar"])
            for figure in figures:  # a quantile of no answers is none
                value = f"{figure.value:.3f}" if math.isfinite(figure.value) else ""
                writer.writerow([figure.name, value, figure.unit, figure.bar])


def _bench_case(
    name: str, request: bytes, without_server: Callable[[], object], count: int, url: str, pid: int, cpu: int
) -> Iterator[Figure]:
    """Time the server, one and two requests at a time, in turn with the same work without a server on the same core."""
    client_cpus = os.sched_getaffinity(0)
    bare, single, double, latencies = [], [], [], []
    cpu_bare = cpu_server = 0.0
    for number in range(ROUNDS + 1):
        os.sched_setaffinity(0, {cpu})
        began, busy = time.perf_counter(), time.process_time()
        for _ in range(count):
            without_server()
        a, cpu_a = (time.perf_counter() - began) / count, time.process_time() - busy
        os.sched_setaffinity(0, client_cpus)
        one_at_a_time, replies = asyncio.run(_closed_loop(request, url, 1, count))
        busy = _cpu_seconds(pid)
        two_at_a_time, _ = asyncio.run(_closed_loop(request, url, 2, count))
        if number:  # the first warms up
            cpu_bare, cpu_server = cpu_bare + cpu_a, cpu_server + _cpu_seconds(pid) - busy
            bare.append(a)
            single.append(one_at_a_time)
            double.append(two_at_a_time)
            latencies += [reply.seconds for reply in replies]
    overheads = [1000 * (b - a) for a, b in zip(bare, single, strict=True)]
    share = [100 * a / b for a, b in zip(bare, double, strict=True)]
    yield Figure(f"{name}: alone", 1000 * statistics.median(bare), "ms")
    yield Figure(f"{name}: p50, one at a time", 1000 * _quantile(latencies, 0.5), "ms")
    yield Figure(f"{name}: p95, one at a time", 1000 * _quantile(latencies, 0.95), "ms")
    yield Figure(f"{name}: p99, one at a time", 1000 * _quantile(latencies, 0.99), "ms")
    yield Figure(f"{name}: overhead, one at a time", statistics.median(overheads), "ms", "< 3")
    yield Figure(f"{name}: throughput, two at a time", 1 / statistics.median(double), "1/s")
    yield Figure(f"{name}: that, of alone", statistics.median(share), "%", ">= 90")
    # The same on a machine that others use: a core that is busy with one process does as much as its time allows.
    yield Figure(f"{name}: CPU time alone, of the server's", 100 * cpu_bare / max(cpu_server, 0.01), "%", ">= 90")


async def _closed_loop(request: bytes, url: str, connections: int, count: int) -> tuple[float, list[_Reply]]:
    """Measure the seconds a request, with so many clients, each of which sends again when it is answered."""
    client, replies = _Client.of(url), []

    async def go_on() -> None:
        for _ in range(count // connections):
            reply = await client.send(request)
            if reply.status != 200:
                raise FgvcError(f"bench serve: status {reply.status}")
            replies.append(reply)

    began = time.perf_counter()
    await asyncio.gather(*(go_on() for _ in range(connections)))
    spent = time.perf_counter() - began
    client.close()
    return spent / len(replies), replies


async def _overload(request: bytes, url: str, seconds: float) -> list[Figure]:
    """Measure the peak goodput with a queue that is never empty, then under five times as many requests as that."""
    client = _Client.of(url)
    began = time.perf_counter()
    best = _rate(await _paced(client, request, rate=0, seconds=seconds), began, seconds)
    began, cpu = time.perf_counter(), time.process_time()
    replies = await _paced(client, request, rate=OVERLOAD * best, seconds=seconds)
    busy = time.process_time() - cpu
    client.close()
    good = [reply.seconds for reply in replies if reply.status == 200]
    refused = [reply.seconds for reply in replies if reply.status == 503]
    other = len(replies) - len(good) - len(refused)
    return [
        Figure("classify: peak goodput", best, "1/s"),
        Figure("overload: offered", len(replies) / seconds, "1/s"),
        Figure("overload: goodput of the peak", 100 * _rate(replies, began, seconds) / best, "%", ">= 90"),
        Figure("overload: p50 of the answered", 1000 * _quantile(good, 0.5), "ms"),
        Figure("overload: p95 of the answered", 1000 * _quantile(good, 0.95), "ms"),
        Figure("overload: p99 of the answered", 1000 * _quantile(good, 0.99), "ms"),
        Figure("overload: p50 of the refused", 1000 * _quantile(refused, 0.5), "ms", "< 20"),
        Figure("overload: p99 of the refused", 1000 * _quantile(refused, 0.99), "ms", "< 20"),
        Figure("overload: neither answered nor refused", other, "", "0"),
        Figure("overload: the client's own CPU", 100 * busy / seconds, "%", "< 100, or the client is the limit"),
    ]


def _rate(replies: Sequence[_Reply], began: float, seconds: float) -> float:
    """Good answers a second while the load lasts: when it ends, a whole queue is still to be answered."""
    return sum(reply.status == 200 and reply.ended <= began + seconds for reply in replies) / seconds


async def _paced(client: _Client, request: bytes, *, rate: float, seconds: float) -> list[_Reply]:
    """Send so many requests a second, answered or not; 0: eight clients, each of which sends again when it is answered."""
    began = time.perf_counter()
    replies: list[_Reply] = []

    async def send_one(since: float) -> None:
        replies.append(await client.send(request, since=since))

    async def again() -> None:
        while time.perf_counter() - began < seconds:
            await send_one(time.perf_counter())

    if not rate:
        await asyncio.gather(*(again() for _ in range(8)))
        return replies
    tasks: set[asyncio.Task[None]] = set()
    for number in range(min(int(rate * seconds), MAX_REQUESTS)):
        due = began + number / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        while len(tasks) >= CONNECTIONS:  # bounded: the machine has so many sockets
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        task = asyncio.ensure_future(send_one(due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    return replies


@contextmanager
def _server(bundle: Path, cpu: int) -> Iterator[tuple[subprocess.Popen[str], str, float]]:
    """Run `fgvc serve` on one core: its process, its address, and the seconds until it had one."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "fgvc", "serve", f"model={bundle}", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    os.sched_setaffinity(process.pid, {cpu})
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise FgvcError(f"bench serve: the server did not start; try: fgvc serve {bundle}")
        yield process, url, time.perf_counter() - began
    finally:
        process.terminate()
        process.communicate(timeout=60)


def _tensor(x: np.ndarray, name: str) -> bytes:
    content = x.tobytes()
    tensor = {"name": name, "datatype": TYPES[x.dtype.name], "shape": x.shape, "parameters": {"binary_data_size": len(content)}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return _request("/v2/models/model/infer", head + content, f"{HEADER_LENGTH}: {len(head)}\r\n")


def _request(path: str, body: bytes, headers: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-length: {len(body)}\r\n{headers}\r\n".encode() + body


def _drawn_jpeg() -> bytes:
    """Draw a JPEG of the size of CUB's photographs, with something to decode."""
    rough = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(rough).resize((500, 375), Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
    return content.getvalue()


def _quantile(values: Sequence[float], share: float) -> float:
    return float(np.quantile(values, share)) if values else float("nan")


def _rss(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e6


def _cpu_seconds(pid: int) -> float:
    """CPU seconds of a process, all threads, in user and kernel mode."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
