"""The router's own figures, for Prometheus."""

from typing import TypeVar, cast

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from besteffort.router.dispatcher import Dispatcher, Route

_M = TypeVar("_M", Counter, Histogram)

_LATENCY_BUCKETS_MS = (2, 5, 10, 15, 20, 30, 40, 50, 60, 80, 100, 150, 200, 400, 800, 1600)
_TTFT_BUCKETS_MS = (5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10240)
_DECISION_BUCKETS_S = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 1e-2)


class Metrics:
    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._children: dict[tuple[object, ...], Counter | Histogram] = {}
        self._registry = CollectorRegistry()
        self._registry.register(_State(dispatcher))
        labels = ["task", "model"]
        self._requests = Counter(
            "besteffort_requests",
            "Requests that ended, by outcome: ok, refused, failed, cancelled.",
            [*labels, "outcome"],
            registry=self._registry,
        )
        self._deadlines = Counter(
            "besteffort_deadlines",
            "Answered requests by whether their deadline was met.",
            [*labels, "met"],
            registry=self._registry,
        )
        self._latency = Histogram(
            "besteffort_latency_ms_per_token",
            "Time from arrival at the router to the last token, per output token.",
            labels,
            buckets=_LATENCY_BUCKETS_MS,
            registry=self._registry,
        )
        self._ttft = Histogram(
            "besteffort_ttft_ms",
            "Time from arrival at the router to the first byte of a streamed answer.",
            labels,
            buckets=_TTFT_BUCKETS_MS,
            registry=self._registry,
        )
        self._decision = Histogram(
            "besteffort_decision_seconds",
            "Time that the policy took to choose a model.",
            buckets=_DECISION_BUCKETS_S,
            registry=self._registry,
        )

    def ended(self, route: Route, outcome: str) -> None:
        self._child(self._requests, route, outcome).inc()
        self._decision.observe(route.decision_s)

    def began(self, route: Route, first_byte_at: float) -> None:
        """A stream; of a plain answer the first byte says nothing about the first token."""
        self._child(self._ttft, route).observe(1000.0 * (first_byte_at - route.arrived_at))

    def answered(
        self, route: Route, last_byte_at: float, num_tokens: int, deadline_ms_per_token: float
    ) -> None:
        """An answer with a token count; instants by the dispatcher's clock."""
        latency = 1000.0 * (last_byte_at - route.arrived_at) / num_tokens
        self._child(self._latency, route).observe(latency)
        self._child(self._deadlines, route, "yes" if latency <= deadline_ms_per_token else "no").inc()

    def _child(self, metric: _M, route: Route, *labels: str) -> _M:
        """Looking one up among prometheus_client's own costs more than counting with it."""
        key = (metric, route.task, route.model, *labels)
        child = self._children.get(key)
        if child is None:
            fleet = self._dispatcher.fleet
            names = fleet.task_names[route.task], fleet.model_names[route.model]
            child = self._children[key] = metric.labels(*names, *labels)
        return cast(_M, child)

    def render(self) -> bytes:
        """The text exposition format."""
        return bytes(generate_latest(self._registry))


class _State(Collector):
    """What is read off the dispatcher at the moment of the scrape."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def collect(self) -> list[Metric]:
        in_flight = GaugeMetricFamily(
            "besteffort_in_flight", "Requests in flight.", labels=["model", "replica"]
        )
        for name, counts in zip(self._dispatcher.fleet.model_names, self._dispatcher.in_flight, strict=True):
            for replica, count in enumerate(counts):
                in_flight.add_metric([name, str(replica)], count)
        rate = GaugeMetricFamily(
            "besteffort_arrival_rate_per_second",
            "Arrival rate over the last 5 arrivals, as the policy saw it last.",
            value=self._dispatcher.arrival_rate_per_s,
        )
        return [in_flight, rate]
