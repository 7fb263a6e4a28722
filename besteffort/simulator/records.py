"""The state of a fleet: arrays of records, no Python objects.

Time is kept per device, in milliseconds. A model on a device (a *site*) has a clock of *work*, in
milliseconds as if it had the device to itself, which runs slower while other models are busy there;
so a change of the busy set touches M clocks, and never the requests.

Records are whole 8-byte words and as small as they can be: with thousands of replicas, what costs is
not arithmetic but memory that is not in a cache. That of a replica is one line of it.
"""

from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from besteffort.simulator.compiled import compiled

Records = NDArray[np.void]
Ints = NDArray[np.int64]
_Item = TypeVar("_Item", bound=np.generic)

NONE = -1
MAX_TOKENS = 2**31 - 1  # that a record can count; more than any KV cache holds
MAX_BATCHED_TOKENS = 2048  # of prompts that one step reads: vLLM's default, whatever the model
CACHE_LINE_BYTES = 64
END_MS = 1e300  # after every event there is, and before the infinity of an idle device

REQUEST = np.dtype(
    [
        ("arrived_at_ms", "f8"),
        ("first_token_at_ms", "f8"),
        ("last_token_at_ms", "f8"),
        ("num_prompt_tokens", "i4"),
        ("num_output_tokens", "i4"),
        ("replica", "i4"),  # NONE before it is routed
        ("next_waiting", "i4"),  # behind it in the queue of its replica
    ],
    align=True,
)
MODEL = np.dtype(
    [
        ("in_flight", "i8"),
        ("next_replica", "i8"),  # that with the smallest batch
        ("first_replica", "i8"),
        ("num_replicas", "i8"),
        ("max_num_seqs", "i8"),
        ("kv_cache_tokens", "i8"),  # of prompts and outputs that run at once on a replica, at most
        ("prefill_base_ms", "f8"),
        ("prefill_ms_per_token", "f8"),
        ("context_ms_per_token", "f8"),
        ("overhead_ms", "f8"),  # of a request, beside the steps
        ("lag_steps", "i8"),  # a prompt waits for the running step and so many more; NONE: it interrupts
    ],
    align=True,
)
REPLICA = np.dtype(
    [
        ("tokens", "f8"),  # made by each decoding request since the replica last was idle
        ("tokens_at_ms", "f8"),  # the work clock when `tokens` was true
        ("model", "i4"),
        ("device", "i4"),
        ("nth_of_site", "i4"),
        ("first_seat", "i4"),
        ("in_flight", "i4"),  # waiting, prefilling and decoding
        ("num_decoding", "i4"),
        ("prefilling", "i4"),  # the first request whose prompt is being read, or NONE
        ("num_prefilling", "i4"),  # it and those behind it that are read in the same step
        ("first_waiting", "i4"),
        ("last_waiting", "i4"),
        ("kv_tokens", "i4"),  # that those which run may come to hold
        ("context_tokens", "i4"),  # before the present ones, of those that decode, half of their answers done
    ],
    align=True,
)
SITE = np.dtype(
    [
        ("work_ms", "f8"),
        ("mark_ms", "f8"),  # the work clock at its next event
        ("slowdown", "f8"),  # of the work clock, by what is in flight beside it
        ("next_replica", "i4"),  # whose event it is
        ("in_flight", "i4"),
        ("num_replicas", "i4"),
        ("first_mark", "i4"),  # its part of `marks`
    ],
    align=True,
)
DEVICE = np.dtype(
    [
        ("clock_ms", "f8"),
        ("busy_set", "i4"),  # bit m: model m has requests in flight here
        ("next_model", "i4"),  # whose event is the next
    ],
    align=True,
)
SEAT = np.dtype(
    [
        ("ends_at_tokens", "f8"),  # of the replica's `tokens`
        ("request", "i4"),
        ("kv_tokens", "i4"),  # that the request may come to hold
    ],
    align=True,
)
EVENT = np.dtype([("at_ms", "f8"), ("device", "i8")], align=True)


class State(NamedTuple):
    """One fleet; or `F` fleets, where each array but the tables has one more axis in front."""

    requests: Records  # (K,) in order of arrival
    completed: Ints  # (K,) in order of completion
    num_completed: Ints  # (1,)
    models: Records  # (M,)
    replicas: Records  # (R,) model by model
    sites: Records  # (D * M,) device by device
    devices: Records  # (D,)
    next_event: Records  # (1,)
    seats: Records  # (S,) per replica a heap of the token counts at which its requests end
    batches: Records  # (2 * R,) per model a tournament of its replicas by `in_flight`
    marks: Records  # (2 * R,) per site a tournament of its replicas by the work clock at their next event
    events: Records  # (2 * D,) a tournament of the devices by the time of their next event
    step_ms: NDArray[np.float64]  # (M, largest batch + 1)
    slowdown: NDArray[np.float64]  # (M, 2**M) by the busy set
    bend_at_tokens: NDArray[np.float64]  # (P,) prompts read in a step
    prefill_bend_ms: NDArray[np.float64]  # (M, P) by how much it is longer then than on a line
    pressure: NDArray[np.float64]  # (M, M, B) added to it by how many are in flight at another model


def on_cache_lines(array: NDArray[_Item]) -> NDArray[_Item]:
    """A copy that begins where a line does, so that no record of a replica lies on two."""
    memory = np.empty(array.nbytes + CACHE_LINE_BYTES, dtype=np.uint8)
    first = -memory.ctypes.data % CACHE_LINE_BYTES
    copy = memory[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@compiled
def fleet_of(states: State, fleet: int) -> State:
    """One of many fleets, as a view."""
    return State(
        states.requests[fleet],
        states.completed[fleet],
        states.num_completed[fleet],
        states.models[fleet],
        states.replicas[fleet],
        states.sites[fleet],
        states.devices[fleet],
        states.next_event[fleet],
        states.seats[fleet],
        states.batches[fleet],
        states.marks[fleet],
        states.events[fleet],
        states.step_ms,
        states.slowdown,
        states.bend_at_tokens,
        states.prefill_bend_ms,
        states.pressure,
    )
