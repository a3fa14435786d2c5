"""The server's metrics for Prometheus. Labels are routes and models, never a client's text: their number is bounded."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fgvc.serving.admission import Admission
from fgvc.serving.models import ModelRegistry

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"  # whatever has no route, or came to none
GONE = 499  # nginx's code for a client that left before its answer
_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """Metrics in a registry of their own, so that a process may have several."""

    def __init__(self, models: ModelRegistry, admission: Admission) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "fgvc_requests", "Answered requests, by route and status.", ("route", "code"), registry=self._registry
        )
        self.seconds = Histogram(
            "fgvc_request_seconds",
            "From a request's headers to its answer.",
            ("route",),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self.rejected = Counter(
            "fgvc_rejected",
            "Requests refused, or answered too late: queue_full, memory, draining, deadline, slow, gone, out_of_memory.",
            ("reason",),
            registry=self._registry,
        )
        self._registry.register(_State(models, admission))
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _State(Collector):
    """Collector of the present state of models and admission, read at each scrape."""

    def __init__(self, models: ModelRegistry, admission: Admission) -> None:
        self._models, self._admission = models, admission

    def collect(self) -> Iterator[Metric]:
        admission = self._admission
        yield GaugeMetricFamily("fgvc_queue_depth", "Requests that wait for a thread.", admission.waiting)
        yield GaugeMetricFamily("fgvc_running", "Threads that compute.", admission.running)
        yield GaugeMetricFamily("fgvc_in_flight", "Requests between arrival and answer.", admission.in_flight)
        reloads = CounterMetricFamily("fgvc_reloads", "Bundles exchanged for new ones.", labels=("model",))
        failures = CounterMetricFamily("fgvc_reload_failures", "Bundles that could not be loaded.", labels=("model",))
        about = GaugeMetricFamily(
            "fgvc_model_info", "1; the manifest tells bundles apart.", labels=("model", "manifest")
        )
        for served in self._models:
            reloads.add_metric((served.name,), self._models.reloads[served.name])
            failures.add_metric((served.name,), self._models.failures[served.name])
            about.add_metric((served.name, served.digest), 1)
        yield from (reloads, failures, about)


class MetricsMiddleware:
    """Middleware that counts and times every request that load shedding lets in."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, code = time.perf_counter(), 500

        async def send_counted(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_counted)
        finally:
            route = getattr(scope.get("route"), "path", OTHER)  # the template, not what the client wrote
            self._metrics.requests.labels(route, str(code)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - started)
