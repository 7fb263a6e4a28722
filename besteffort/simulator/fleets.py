"""Fleets laid out for the event loop, and what comes out of it in the words of `request`."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from besteffort.arrivals import arrival_rates_per_s
from besteffort.errors import TraceError
from besteffort.fleet import Fleet
from besteffort.latency import Latency
from besteffort.observation import Observation
from besteffort.request import Outcomes, Requests
from besteffort.simulator.courses import see_all_neighbours
from besteffort.simulator.records import (
    CACHE_LINE_BYTES,
    DEVICE,
    EVENT,
    MAX_TOKENS,
    MODEL,
    NONE,
    REPLICA,
    REQUEST,
    SEAT,
    SITE,
    Records,
    State,
    on_cache_lines,
)
from besteffort.simulator.tournament import tournament
from besteffort.simulator.walks import advance_all, route_all, run


def idle_state(fleet: Fleet, latency: Latency, workloads: Sequence[Requests]) -> State:
    """Fleets with nothing in flight, before the first arrival, one for each workload.

    Raises:
        TraceError: a request is larger than the KV cache of a model.
        ValueError: these are the latencies of another number of models.
    """
    if latency.num_models != len(fleet.models):
        raise ValueError(f"latencies of {latency.num_models} models for a fleet of {len(fleet.models)}")
    for workload in workloads:
        _check_fits(workload, fleet)
    requests = np.stack([_request_records(workload) for workload in workloads])
    models, replicas = _model_records(fleet, latency), _replica_records(fleet)
    sites = _sites(fleet, replicas)
    devices = np.zeros(fleet.num_devices, dtype=DEVICE)
    max_num_seqs = models["max_num_seqs"]
    seats = np.zeros(int(_seats_apart(max_num_seqs)[replicas["model"]].sum()), dtype=SEAT)
    num_fleets = len(workloads)

    def copies(one: NDArray[Any]) -> NDArray[Any]:
        return on_cache_lines(np.repeat(one[None], num_fleets, axis=0))

    return State(
        requests=on_cache_lines(requests),
        completed=np.full(requests.shape, NONE, dtype=np.int64),
        num_completed=np.zeros((num_fleets, 1), dtype=np.int64),
        models=copies(models),
        replicas=copies(replicas),
        sites=copies(sites),
        devices=copies(devices),
        next_event=copies(np.array([(np.inf, 0)], dtype=EVENT)),
        seats=copies(seats),
        batches=copies(_tournaments(replicas["model"], key=0.0)),
        marks=copies(_tournaments(_site_of(replicas, len(models)), key=np.inf)),
        events=copies(tournament(np.arange(fleet.num_devices), key=np.inf)),
        step_ms=np.ascontiguousarray(latency.step_table_ms(int(max_num_seqs.max()))),
        slowdown=np.array(latency.slowdown, dtype=np.float64, order="C"),
        bend_at_tokens=latency.bend_at_tokens.astype(np.float64),
        prefill_bend_ms=np.array(latency.prefill_bend_ms, dtype=np.float64, order="C"),
        pressure=np.ascontiguousarray(latency.pressure_table(_most_seats(fleet))),
    )


def _check_fits(workload: Requests, fleet: Fleet) -> None:
    """Whichever model a request goes to, it must be able to run there."""
    num_tokens = workload.num_prompt_tokens + workload.num_output_tokens
    for model in fleet.models:
        if np.any(num_tokens > (model.kv_cache_tokens or MAX_TOKENS)):
            index = int(np.argmax(num_tokens))
            raise TraceError(
                f"request {index} needs {num_tokens[index]} tokens, more than the KV cache of model "
                f"{model.name!r} holds ({model.kv_cache_tokens or MAX_TOKENS}): "
                "shorten it, or raise kv_cache_tokens"
            )


def _request_records(workload: Requests) -> Records:
    requests = np.zeros(len(workload), dtype=REQUEST)
    requests["arrived_at_ms"] = 1000.0 * workload.arrived_at
    requests["num_prompt_tokens"] = workload.num_prompt_tokens
    requests["num_output_tokens"] = workload.num_output_tokens
    requests["replica"] = requests["next_waiting"] = NONE
    requests["first_token_at_ms"] = requests["last_token_at_ms"] = np.nan
    return requests


def _model_records(fleet: Fleet, latency: Latency) -> Records:
    models = np.zeros(len(fleet.models), dtype=MODEL)
    models["num_replicas"] = [model.replicas for model in fleet.models]
    models["first_replica"] = models["next_replica"] = _starts(models["num_replicas"])
    models["max_num_seqs"] = [model.max_num_seqs for model in fleet.models]
    models["kv_cache_tokens"] = [model.kv_cache_tokens or MAX_TOKENS for model in fleet.models]
    models["prefill_base_ms"] = latency.prefill_base_ms
    models["prefill_ms_per_token"] = latency.prefill_ms_per_token
    models["context_ms_per_token"] = latency.context_ms_per_token
    models["overhead_ms"] = latency.overhead_ms
    models["lag_steps"] = NONE if latency.lag_steps is None else latency.lag_steps
    return models


def _replica_records(fleet: Fleet) -> Records:
    """Model by model; replica `r` of each is on device `fleet.device_of(r)`."""
    counts = [model.replicas for model in fleet.models]
    replicas = np.zeros(sum(counts), dtype=REPLICA)
    replicas["model"] = np.repeat(np.arange(len(counts)), counts)
    replicas["device"] = [fleet.device_of(r) for count in counts for r in range(count)]
    max_num_seqs = np.array([model.max_num_seqs for model in fleet.models])
    replicas["first_seat"] = _starts(np.repeat(_seats_apart(max_num_seqs), counts))
    replicas["prefilling"] = replicas["first_waiting"] = replicas["last_waiting"] = NONE
    return replicas


def _seats_apart(max_num_seqs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Seats from one replica's first to the next one's: an odd number of cache lines.

    At a power of two, the first seats of all replicas would fight for the same few lines of the cache.
    """
    in_line = CACHE_LINE_BYTES // SEAT.itemsize
    return (-(-max_num_seqs // in_line) | 1) * in_line


def _site_of(replicas: Records, num_models: int) -> NDArray[np.int64]:
    return np.asarray(replicas["device"].astype(np.int64) * num_models + replicas["model"])


def _sites(fleet: Fleet, replicas: Records) -> Records:
    """Every model on every device; `nth_of_site` of its replicas is set."""
    site_of = _site_of(replicas, len(fleet.models))
    sites = np.zeros(fleet.num_devices * len(fleet.models), dtype=SITE)
    sites["num_replicas"] = np.bincount(site_of, minlength=len(sites))
    first = _starts(sites["num_replicas"])
    sites["first_mark"] = 2 * first
    in_order = np.argsort(site_of, kind="stable")
    replicas["nth_of_site"][in_order] = np.arange(len(in_order)) - first[site_of[in_order]]
    return sites


def _tournaments(group_of: NDArray[np.int64], key: float) -> Records:
    """One for each group of replicas, one behind the other."""
    in_order = np.argsort(group_of, kind="stable")
    groups = np.split(in_order, np.flatnonzero(np.diff(group_of[in_order])) + 1)
    return np.concatenate([tournament(players, key) for players in groups])


def _most_seats(fleet: Fleet) -> int:
    """Of one model on one device."""
    return max(-(-model.replicas // fleet.num_devices) * model.max_num_seqs for model in fleet.models)


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each run begins, for runs of these lengths."""
    return np.asarray(np.cumsum(counts) - counts)


class ParallelFleets:
    """`F` independent copies of a fleet, each with `K` requests of its own, advanced side by side.

    For `index` from 0 to `K - 1`: `advance`, look, `route`; in the end `drain`.
    """

    def __init__(self, fleet: Fleet, latency: Latency, workloads: Sequence[Requests]) -> None:
        self._workloads = workloads
        self._state = idle_state(fleet, latency, workloads)
        self._num_collected = np.zeros(len(workloads), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._workloads)

    @property
    def num_requests(self) -> int:
        return int(self._state.requests.shape[1])

    def advance(self, index: int) -> None:
        """Bring every fleet to the arrival of its request `index`."""
        advance_all(self._state, index)

    def drain(self) -> None:
        """Let every fleet finish what it has."""
        advance_all(self._state, self.num_requests)

    @property
    def batch_sizes(self) -> NDArray[np.float64]:
        """Requests in flight per replica of each model, their mean; shape `(F, M)`."""
        models = self._state.models
        return np.asarray(models["in_flight"] / models["num_replicas"])

    @property
    def neighbours(self) -> NDArray[np.float64]:
        """`Observation.neighbours` of every fleet, shape `(F, M, M)`."""
        num_fleets, num_models = self._state.models.shape
        seen = np.zeros((num_fleets, num_models, num_models))
        see_all_neighbours(self._state, seen)
        return seen

    def route(self, index: int, models: NDArray[np.int64]) -> None:
        """Send request `index` of every fleet to the models of shape `(F,)`."""
        route_all(self._state, index, self._checked(models, len(self)))

    def run(self, models: NDArray[np.int64]) -> None:
        """Serve the whole workload of the first fleet by the models of shape `(K,)`."""
        run(self._state, self._checked(models, self.num_requests))

    def _checked(self, models: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """The event loop does not check its indices."""
        models = np.ascontiguousarray(models, dtype=np.int64)
        num_models = self._state.models.shape[1]
        if models.shape != (length,) or np.any((models < 0) | (models >= num_models)):
            raise ValueError(f"not {length} indices of {num_models} models: {models}")
        return models

    def collect_completed(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The fleets and the indices of the requests that completed since the last call."""
        num_completed = self._state.num_completed[:, 0]
        counts = num_completed - self._num_collected
        fleets = np.repeat(np.arange(len(self)), counts)
        nth = np.arange(len(fleets)) - np.repeat(_starts(counts) - self._num_collected, counts)
        self._num_collected = num_completed.copy()
        return fleets, self._state.completed[fleets, nth]

    def latency_ms_per_token(
        self, fleets: NDArray[np.int64], indices: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Of these requests; NaN while they are in flight."""
        requests = self._state.requests[fleets, indices]
        took_ms = requests["last_token_at_ms"] - requests["arrived_at_ms"]
        return np.asarray(took_ms / requests["num_output_tokens"])

    def outcomes(self, fleet: int = 0) -> Outcomes:
        """What became of the requests of one fleet, all of which must have been routed."""
        requests, replicas = self._state.requests[fleet], self._state.replicas[fleet]
        model = replicas["model"][requests["replica"]]
        return Outcomes(
            requests=self._workloads[fleet],
            model=model,
            replica=requests["replica"] - self._state.models[fleet]["first_replica"][model],
            sent_at=self._workloads[fleet].arrived_at,
            first_token_at=requests["first_token_at_ms"] / 1000.0,
            last_token_at=requests["last_token_at_ms"] / 1000.0,
            num_tokens_received=self._workloads[fleet].num_output_tokens,
            error=[""] * self.num_requests,
        )


def simulate(
    requests: Requests, fleet: Fleet, latency: Latency, choose: Callable[[Observation], int]
) -> Outcomes:
    """Serve a trace by a policy, which is asked for a model at each arrival."""
    fleets = ParallelFleets(fleet, latency, [requests])
    rates_per_s = arrival_rates_per_s(requests.arrived_at)
    for index in range(len(requests)):
        fleets.advance(index)
        seen = Observation(
            task=int(requests.task[index]),
            batch_sizes=fleets.batch_sizes[0],
            arrival_rate_per_s=float(rates_per_s[index]),
            arrived_at=float(requests.arrived_at[index]),
            neighbours=fleets.neighbours[0],
        )
        fleets.route(index, np.array([choose(seen)]))
    fleets.drain()
    return fleets.outcomes()


def simulate_choices(
    requests: Requests, fleet: Fleet, latency: Latency, models: NDArray[np.int64]
) -> Outcomes:
    """Serve a trace by models that are chosen beforehand, shape `(N,)`: the event loop at full speed."""
    fleets = ParallelFleets(fleet, latency, [requests])
    fleets.run(models)
    return fleets.outcomes()
