"""The router's own figures, for Prometheus.

They are kept in plain numbers and put into prometheus_client's form when it asks: its own counters
would cost as much as the rest of a request's way.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from besteffort.deadline import deadline_weight
from besteffort.router.breaker import State
from besteffort.router.dispatcher import Dispatcher, Route
from besteffort.router.health import Health
from besteffort.router.histogram import Histogram

_LATENCY_BUCKETS_MS = (2, 5, 10, 15, 20, 30, 40, 50, 60, 80, 100, 150, 200, 400, 800, 1600)
_TTFT_BUCKETS_MS = (5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10240)
_STATES = (State.CLOSED, State.HALF_OPEN, State.OPEN)
_DECISION_BUCKETS_S = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 1e-2)


class Metrics(Collector):
    def __init__(self, dispatcher: Dispatcher, health: Health) -> None:
        self._dispatcher = dispatcher
        self._health = health
        # By task, model and outcome, whether the deadline was met, or replica.
        self.requests: Counter[tuple[int, int, str]] = Counter()
        self._deadlines: Counter[tuple[int, int, str]] = Counter()
        self._retries: Counter[tuple[int, int, str]] = Counter()
        self.turned_away: Counter[str] = Counter()  # by reason
        # What is left of answers that came late, by task and model.
        self._late_weights = defaultdict[tuple[int, int], float](float)
        # By task and model.
        self._latency = defaultdict[tuple[int, int], Histogram](lambda: Histogram(_LATENCY_BUCKETS_MS))
        self._ttft = defaultdict[tuple[int, int], Histogram](lambda: Histogram(_TTFT_BUCKETS_MS))
        self._decision = Histogram(_DECISION_BUCKETS_S)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def add(self, others: Collector) -> None:
        """Show these figures too."""
        self._registry.register(others)

    def ended(self, route: Route, outcome: str) -> None:
        self.requests[route.task, route.model, outcome] += 1
        if not route.pinned:  # else there was nothing to decide
            self._decision.observe(route.decision_s)

    def retried(self, failed: Route) -> None:
        self._retries[failed.task, failed.model, str(failed.replica)] += 1

    @property
    def num_retries(self) -> int:
        return self._retries.total()

    def began(self, route: Route, first_byte_at: float) -> None:
        """A stream; of a plain answer the first byte says nothing about the first token."""
        self._ttft[route.task, route.model].observe(1000.0 * (first_byte_at - route.arrived_at))

    def answered(self, route: Route, latency_ms_per_token: float, deadline_ms_per_token: float) -> None:
        """An answer with a token count."""
        at = route.task, route.model
        self._latency[at].observe(latency_ms_per_token)
        if latency_ms_per_token <= deadline_ms_per_token:
            self._deadlines[*at, "yes"] += 1
            return
        self._deadlines[*at, "no"] += 1
        kind = self._dispatcher.fleet.deadline_kind
        if kind == "soft":
            weight = deadline_weight(latency_ms_per_token, deadline_ms_per_token, kind)
            self._late_weights[at] += float(weight)

    def render(self) -> bytes:
        """The text exposition format."""
        return bytes(generate_latest(self._registry))

    def collect(self) -> Iterable[Metric]:
        yield self._counter(
            "besteffort_requests",
            "Requests that ended, by outcome: ok, refused, failed, cancelled.",
            "outcome",
            self.requests,
        )
        yield self._counter(
            "besteffort_deadlines",
            "Answered requests by whether their deadline was met.",
            "met",
            self._deadlines,
        )
        yield self._counter(
            "besteffort_retries",
            "Requests that another replica took over, by the one that failed.",
            "replica",
            self._retries,
        )
        yield self._turned_away()
        yield from self.collect_utilities()
        yield self._histogram(
            "besteffort_latency_ms_per_token",
            "Time from arrival at the router to the last token, per output token.",
            self._latency,
        )
        yield self._histogram(
            "besteffort_ttft_ms",
            "Time from arrival at the router to the first event of a streamed answer.",
            self._ttft,
        )
        decision = self._decision
        yield HistogramMetricFamily(
            "besteffort_decision_seconds",
            "Time that the policy took to choose a model.",
            buckets=decision.buckets(),
            sum_value=decision.sum,
        )
        yield self._in_flight()
        yield from self._breakers()
        yield GaugeMetricFamily(
            "besteffort_arrival_rate_per_second",
            "Arrival rate over the last 5 arrivals, as the policy saw it last.",
            value=self._dispatcher.arrival_rate_per_s,
        )

    def _counter(self, name: str, about: str, label: str, counts: Counter[tuple[int, int, str]]) -> Metric:
        family = CounterMetricFamily(name, about, labels=["task", "model", label])
        for (task, model, value), count in counts.items():
            family.add_metric([*self._names(task, model), value], count)
        return family

    def _turned_away(self) -> Metric:
        family = CounterMetricFamily(
            "besteffort_turned_away",
            "Requests that were told to come again: overloaded, no_replica.",
            labels=["reason"],
        )
        for reason, count in self.turned_away.items():
            family.add_metric([reason], count)
        return family

    def collect_utilities(self) -> Iterable[Metric]:
        """Whose quotient is the performance, over any span; none without rewards."""
        forecast = self._dispatcher.forecast
        if forecast is None or (rewards := forecast.relative_rewards) is None:
            return
        labels = ["task", "model"]
        had = CounterMetricFamily(
            "besteffort_utility",
            "What answers were worth: deadline weight times relative reward.",
            labels=labels,
        )
        peak = CounterMetricFamily(
            "besteffort_utility_peak",
            "What the best models' answers in time would have been worth; failed requests count too.",
            labels=labels,
        )
        for task, model in sorted({(task, model) for task, model, _ in self.requests}):
            met, missed = (self._deadlines[task, model, word] for word in ("yes", "no"))
            weight = met + self._late_weights[task, model]
            had.add_metric(self._names(task, model), weight * rewards[task][model])
            peak.add_metric(self._names(task, model), met + missed + self.requests[task, model, "failed"])
        yield had
        yield peak

    def _histogram(self, name: str, about: str, histograms: dict[tuple[int, int], Histogram]) -> Metric:
        family = HistogramMetricFamily(name, about, labels=["task", "model"])
        for (task, model), histogram in histograms.items():
            family.add_metric(self._names(task, model), histogram.buckets(), histogram.sum)
        return family

    def _in_flight(self) -> Metric:
        family = GaugeMetricFamily("besteffort_in_flight", "Requests in flight.", labels=["model", "replica"])
        for name, counts in zip(self._dispatcher.fleet.model_names, self._dispatcher.in_flight, strict=True):
            for replica, count in enumerate(counts):
                family.add_metric([name, str(replica)], count)
        return family

    def _breakers(self) -> Iterable[Metric]:
        labels = ["model", "replica"]
        state = GaugeMetricFamily(
            "besteffort_breaker_state", "0: closed, requests pass; 1: half-open; 2: open.", labels=labels
        )
        openings = CounterMetricFamily("besteffort_breaker_openings", "How often it opened.", labels=labels)
        probes = CounterMetricFamily(
            "besteffort_probes", "Questions to an engine whether it is well.", labels=[*labels, "outcome"]
        )
        for name, of_model in zip(self._dispatcher.fleet.model_names, self._health.breakers, strict=True):
            for replica, breaker in enumerate(of_model):
                at = [name, str(replica)]
                state.add_metric(at, _STATES.index(breaker.state))
                openings.add_metric(at, breaker.num_openings)
                for outcome, count in breaker.num_probes.items():
                    probes.add_metric([*at, outcome], count)
        return state, openings, probes

    def _names(self, task: int, model: int) -> list[str]:
        fleet = self._dispatcher.fleet
        return [fleet.task_names[task], fleet.model_names[model]]
