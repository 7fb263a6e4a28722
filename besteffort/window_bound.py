"""How many windows of a trace any policy could bring to a threshold: a bound, by linear programming.

What is free in the programme is which share `x` of each request the largest model serves in time, and
how far `y` each window of consecutive requests is reached. Everything else is granted: a request that
goes elsewhere gets the best of the other models, in time and for nothing.

- *A window* that reaches the threshold has to make up for what its requests lose with those others, as
  far as that is more than the threshold leaves: the sum of `lost * x` is at least `needed * y`.
- *The largest model* is bounded in every interval of a grid, by what it does for requests in time. One
  of `L` tokens lives for `deadline * L` at most. If an interval holds only `o` of that life, then at
  least `n = L - (deadline * L - o) / step(1)` of its tokens are made there, and it is in a batch there
  for at most `o`. Let `b` of some set of such requests be in a replica's batch. No step is shorter than
  `step(b)`, whatever else runs, so for every `price >= 0`

      interval + price * sum(o) >= integral of (1 + price * b)
                                >= sum(n) * min over b of step(b) * (1 / b + price)

  In the last line comes what prompts take beyond a step, `1 + price` times, for each request all of whose
  time to begin lies in the interval. A price of 0 says how many tokens a replica makes at any batch; a
  higher one, that in large batches requests would be late.

By weak duality any prices of these constraints give a bound. Those that the solver ends with give the
lowest, but that it is a bound does not hang on the solver's tolerances.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array, diags_array, hstack, vstack

from besteffort.errors import UsageError
from besteffort.fleet import Fleet
from besteffort.latency import Latency
from besteffort.request import Requests
from besteffort.rewards import Rewards

LENGTHS_IN_LIVES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # of the intervals; longer ones add nothing to speak of
STARTS_PER_LENGTH = 4  # how densely intervals of one length overlap
TOLERANCE = 1e-9  # by which the mean of a window may miss the threshold

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def window_bound(
    requests: Requests,
    fleet: Fleet,
    latency: Latency,
    rewards: Rewards,
    *,
    threshold: float,
    window_size: int,
) -> int:
    """No policy brings more windows than this to `threshold`, even if it knows the whole trace.

    Windows slide by one request. Holds in the simulator's model of a fleet.

    Raises:
        UsageError: deadlines are soft, where a late answer is worth something too.
    """
    if fleet.deadline_kind != "hard":
        raise UsageError(
            f"fleet {fleet.name!r} has {fleet.deadline_kind} deadlines; "
            "windows are bounded for hard ones only: set deadline_kind"
        )
    if len(requests) < window_size:
        return 0
    lost = np.maximum(0.0, 1.0 - rewards.relative[:, :-1].max(axis=1, initial=0.0))[requests.task]
    served, needed = _window_rows(lost, threshold, window_size)
    work = work_rows(requests, fleet, latency)
    num_windows, num_requests = served.shape
    rows = vstack([
        hstack([-served, diags_array(needed)]),
        hstack([work, csr_array((work.shape[0], num_windows))]),
    ]).tocsr()  # fmt: skip
    limits = np.concatenate([np.zeros(num_windows), np.ones(work.shape[0])])
    worth = np.concatenate([np.zeros(num_requests), np.ones(num_windows)])
    return int(np.floor(_highest(worth, rows, limits) + 1e-6))


def _highest(worth: Floats, rows: csr_array, limits: Floats) -> float:
    """At least what `worth @ z` can be while `rows @ z <= limits` and every `z` is in [0, 1]."""
    solved = linprog(-worth, A_ub=rows, b_ub=limits, bounds=(0, 1), method="highs-ds")
    prices = np.zeros(len(limits)) if solved.ineqlin is None else np.maximum(0.0, -solved.ineqlin.marginals)
    return float(limits @ prices + np.maximum(0.0, worth - rows.T @ prices).sum())


def _window_rows(lost: Floats, threshold: float, window_size: int) -> tuple[csr_array, Floats]:
    """For each of `W` windows what its requests make up for, shape `(W, N)`, and how much is needed."""
    members = np.lib.stride_tricks.sliding_window_view(np.arange(len(lost)), window_size)
    left = window_size * (1.0 - threshold + TOLERANCE)
    needed = np.maximum(0.0, lost[members].sum(axis=1) - left)
    # A request that makes up for all that is needed does no more by making up for more.
    helps = np.minimum(lost[members], needed[:, None])
    window = np.repeat(np.arange(len(members)), window_size)
    shape = len(members), len(lost)
    return csr_array((helps.ravel(), (window, members.ravel())), shape=shape), needed


def work_rows(requests: Requests, fleet: Fleet, latency: Latency) -> csr_array:
    """What serving each request in time takes at least of the largest model in each of `I` intervals.

    As a share of what there is: no row's sum over the served requests is above 1. Shape `(I, N)`.
    """
    model = fleet.models[-1]
    step_ms = latency.step_table_ms(model.max_num_seqs)[-1, 1:]
    deadlines = np.array([task.deadline_ms_per_token for task in fleet.tasks])
    arrived_at = 1000.0 * requests.arrived_at  # ms from here on
    tokens = requests.num_output_tokens
    life: Floats = deadlines[requests.task] * tokens
    begins_by = arrived_at + life - (tokens - 1) * step_ms[0]
    at_least = max(0.0, step_ms[0] - latency.prefill_base_ms[-1] - latency.prefill_bend_ms[-1].min())
    prompt = np.maximum(0.0, latency.prefill_ms_per_token[-1] * requests.num_prompt_tokens - at_least)
    batch = np.arange(1, len(step_ms) + 1)
    parts = [csr_array((0, len(requests)))]
    for length in np.median(life) * np.array(LENGTHS_IN_LIVES):
        row, request, start = _meetings(arrived_at, life, length)
        begin, end = arrived_at[request], arrived_at[request] + life[request]
        inside = np.maximum(0.0, np.minimum(end, start + length) - np.maximum(begin, start))
        made = np.maximum(0.0, tokens[request] - (life[request] - inside) / step_ms[0])
        begun = (begin >= start) & (begins_by[request] <= start + length)
        for price in {0.0, _price(step_ms, float(deadlines.max()))}:
            per_token = float(np.min(step_ms * (1.0 / batch + price)))
            work = per_token * made + (1.0 + price) * prompt[request] * begun - price * inside
            share = np.maximum(0.0, work) / (model.replicas * length)
            parts.append(_binding(share, row, request, len(requests)))
    return vstack(parts).tocsr()


def _meetings(arrived_at: Floats, life: Floats, length: float) -> tuple[Indices, Indices, Floats]:
    """Which requests may live in which intervals of one length: the interval, the request, its start."""
    starts = np.arange(arrived_at[0] - length, arrived_at[-1] + life.max(), length / STARTS_PER_LENGTH)
    first = np.searchsorted(arrived_at, starts - life.max())
    counts = np.searchsorted(arrived_at, starts + length) - first
    row = np.repeat(np.arange(len(starts)), counts)
    request = np.arange(len(row)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
    return row, request, starts[row]


def _binding(share: Floats, row: Indices, request: Indices, num_requests: int) -> csr_array:
    """The rows that not all requests together keep."""
    rows = csr_array((share, (row, request)), shape=(int(row.max(initial=-1)) + 1, num_requests))
    rows.eliminate_zeros()
    return rows[np.asarray(rows.sum(axis=1)).ravel() > 1.0]


def _price(step_ms: Floats, deadline_ms: float) -> float:
    """At which a token of a request in time takes most, so that it bounds the tokens best; `(B,)` by batch.

    The work of a whole life per token, `step(b) / b + price * (step(b) - deadline)` at the best batch,
    rises with the price until the batch that is best there would be in time.
    """
    batch = np.arange(1, len(step_ms) + 1)
    in_time, late = np.nonzero((step_ms[:, None] < deadline_ms) & (step_ms > deadline_ms))
    per_token = step_ms / batch
    equal_at = (per_token[in_time] - per_token[late]) / (step_ms[late] - step_ms[in_time])
    prices = np.append(equal_at[equal_at > 0], 0.0)
    work = np.min(per_token + prices[:, None] * (step_ms - deadline_ms), axis=1)
    return float(prices[np.argmax(work)])
