"""The router's own figures, for Prometheus.

They are kept in plain numbers and put into prometheus_client's form when it asks: its own counters
would cost as much as the rest of a request's way.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

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
_OUTCOMES = ("ok", "refused", "failed", "cancelled")
_STATES = (State.CLOSED, State.HALF_OPEN, State.OPEN)
_DECISION_BUCKETS_S = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 1e-2)


class _Cell:
    """What came of one task's requests at one model."""

    __slots__ = ("late_weight", "latency", "num_late", "num_met", "outcomes", "ttft")

    def __init__(self) -> None:
        self.outcomes = dict.fromkeys(_OUTCOMES, 0)
        self.num_met = self.num_late = 0  # deadlines
        self.late_weight = 0.0  # what is left of answers that came late
        self.latency = Histogram(_LATENCY_BUCKETS_MS)
        self.ttft = Histogram(_TTFT_BUCKETS_MS)


class Metrics(Collector):
    def __init__(self, dispatcher: Dispatcher, health: Health) -> None:
        self._dispatcher = dispatcher
        self._health = health
        fleet = dispatcher.fleet
        self._cells = [[_Cell() for _ in fleet.models] for _ in fleet.tasks]  # by task, then by model
        self._retries: Counter[tuple[int, int, str]] = Counter()  # by task, model and replica
        self.turned_away: Counter[str] = Counter()  # by reason
        self._decision = Histogram(_DECISION_BUCKETS_S)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def add(self, others: Collector) -> None:
        """Show these figures too."""
        self._registry.register(others)

    def ended(
        self, route: Route, outcome: str, latency_ms_per_token: float | None, deadline_ms_per_token: float
    ) -> None:
        """Without a latency there was no answer, or none with a token count."""
        cell = self._cells[route.task][route.model]
        cell.outcomes[outcome] += 1
        if not route.pinned:  # else there was nothing to decide
            self._decision.observe(route.decision_s)
        if latency_ms_per_token is None:
            return
        cell.latency.observe(latency_ms_per_token)
        if latency_ms_per_token <= deadline_ms_per_token:
            cell.num_met += 1
        else:
            self._note_late(cell, latency_ms_per_token, deadline_ms_per_token)

    def _note_late(self, cell: _Cell, latency_ms_per_token: float, deadline_ms_per_token: float) -> None:
        cell.num_late += 1
        kind = self._dispatcher.fleet.deadline_kind
        if kind == "soft":
            weight = deadline_weight(latency_ms_per_token, deadline_ms_per_token, kind)
            cell.late_weight += float(weight)

    def retried(self, failed: Route) -> None:
        self._retries[failed.task, failed.model, str(failed.replica)] += 1

    @property
    def requests(self) -> dict[tuple[int, int, str], int]:
        """By task, model and outcome, of which there was at least one."""
        return {(*at, outcome): n for at, cell in self._all() for outcome, n in cell.outcomes.items() if n}

    def _all(self) -> Iterable[tuple[tuple[int, int], _Cell]]:
        """By task and model."""
        for task, of_task in enumerate(self._cells):
            for model, cell in enumerate(of_task):
                yield (task, model), cell

    @property
    def num_retries(self) -> int:
        return self._retries.total()

    def began(self, route: Route, first_byte_at: float) -> None:
        """A stream; of a plain answer the first byte says nothing about the first token."""
        self._cells[route.task][route.model].ttft.observe(1000.0 * (first_byte_at - route.arrived_at))

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
            {
                (*at, met): number
                for at, cell in self._all()
                for met, number in (("yes", cell.num_met), ("no", cell.num_late))
                if number
            },
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
            lambda cell: cell.latency,
        )
        yield self._histogram(
            "besteffort_ttft_ms",
            "Time from arrival at the router to the first event of a streamed answer.",
            lambda cell: cell.ttft,
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

    def _counter(
        self, name: str, about: str, label: str, counts: Mapping[tuple[int, int, str], int]
    ) -> Metric:
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
        for (task, model), cell in self._all():
            if any(cell.outcomes.values()):
                weight = cell.num_met + cell.late_weight
                had.add_metric(self._names(task, model), weight * rewards[task][model])
                num = cell.num_met + cell.num_late + cell.outcomes["failed"]
                peak.add_metric(self._names(task, model), num)
        yield had
        yield peak

    def _histogram(self, name: str, about: str, of: Callable[[_Cell], Histogram]) -> Metric:
        family = HistogramMetricFamily(name, about, labels=["task", "model"])
        for (task, model), cell in self._all():
            histogram = of(cell)
            if not histogram.is_empty:
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
