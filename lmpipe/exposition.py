"""Counters as Prometheus reads them: text, and an HTTP endpoint. Only the supervisor's process needs it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from lmpipe.metrics import GAUGES, HELP


@dataclass(frozen=True, slots=True)
class Sample:
    """The counters of one process, or of one of its lives: lives of one name are added up, so that sums only grow."""

    process: str
    values: Mapping[str, int]


class _Samples(Collector):
    def __init__(self, collect: Callable[[], Iterable[Sample]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        sums: dict[str, dict[str, int]] = {}
        for sample in self._collect():
            for name, value in sample.values.items():
                by_process = sums.setdefault(name, {})
                # A gauge is what the latest life says; the caller yields the lives in order.
                by_process[sample.process] = value + (0 if name in GAUGES else by_process.get(sample.process, 0))
        for name, by_process in sorted(sums.items()):
            family = GaugeMetricFamily if name in GAUGES else CounterMetricFamily
            metric = family(f"lmpipe_{name}", HELP.get(name, name), labels=["process"])
            for process, value in by_process.items():
                metric.add_metric([process], value)
            yield metric


def render(samples: Iterable[Sample]) -> str:
    """Prometheus text format 0.0.4."""
    return generate_latest(_registry(lambda: samples)).decode()


def _registry(collect: Callable[[], Iterable[Sample]]) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(_Samples(collect))
    return registry


@dataclass(frozen=True, slots=True)
class Exporter:
    """A running HTTP endpoint."""

    server: WSGIServer
    thread: threading.Thread

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self.server.server_port

    def close(self) -> None:
        """Ends it."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def serve(host: str, port: int, collect: Callable[[], Iterable[Sample]]) -> Exporter:
    """Answers GET /metrics on threads of its own; `collect` is called there, for each request.

    Raises:
        OSError: the port (0: any) is taken.
    """
    server, thread = start_http_server(port, host, _registry(collect))
    return Exporter(server, thread)
