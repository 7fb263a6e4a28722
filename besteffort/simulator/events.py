"""The event loop: what happens to a fleet up to an instant, and when a request comes; O(log) each."""

import numpy as np

from besteffort.simulator.compiled import compiled
from besteffort.simulator.records import MAX_BATCHED_TOKENS, NONE, State
from besteffort.simulator.seats import pop_seat, push_seat
from besteffort.simulator.tournament import play


@compiled
def advance(state: State, until_ms: float) -> None:
    """Let everything happen up to `until_ms`, that instant included."""
    while state.next_event[0]["at_ms"] <= until_ms:
        _next_event(state)


@compiled
def route(state: State, request: int, model: int) -> None:
    """Hand a request, which arrives now, to the model's replica with the smallest batch."""
    replica = state.models[model]["next_replica"]
    device = state.replicas[replica]["device"]
    _move_clock(state, device, state.requests[request]["arrived_at_ms"])
    _enqueue(state, replica, request)
    _count(state, replica, +1)
    if state.replicas[replica]["prefilling"] == NONE and _may_begin(state, replica):
        if state.replicas[replica]["num_decoding"] == 0:
            _next_work(state, replica)
        elif state.models[model]["lag_steps"] == NONE:  # the prefill interrupts it: see how far it has come
            state.replicas[replica]["tokens"] = _tokens_now(state, replica)
            _next_work(state, replica)
        elif state.replicas[replica]["first_waiting"] == request:  # else another waits for the step already
            _stop_after_step(state, replica)
    _schedule(state, device)


@compiled
def _next_event(state: State) -> None:
    now_ms, device = state.next_event[0]["at_ms"], state.next_event[0]["device"]
    _move_clock(state, device, now_ms)
    site = device * len(state.models) + state.devices[device]["next_model"]
    replica = state.sites[site]["next_replica"]
    # Exactly, whatever rounding says: the event has come.
    state.sites[site]["work_ms"] = state.sites[site]["mark_ms"]
    if state.replicas[replica]["prefilling"] != NONE:
        _end_prefill(state, replica, now_ms)
    elif state.models[state.replicas[replica]["model"]]["lag_steps"] == NONE:
        first_seat = state.replicas[replica]["first_seat"]
        state.replicas[replica]["tokens"] = state.seats[first_seat]["ends_at_tokens"]
    else:  # it stops after whole steps, whether one ends there or a prompt waits
        state.replicas[replica]["tokens"] = np.rint(_tokens_now(state, replica))
    _end_decodes(state, replica, now_ms)
    _next_work(state, replica)
    _schedule(state, device)


@compiled
def _move_clock(state: State, device: int, now_ms: float) -> None:
    elapsed_ms = now_ms - state.devices[device]["clock_ms"]
    state.devices[device]["clock_ms"] = now_ms
    busy = state.devices[device]["busy_set"]
    num_models = len(state.models)
    for model in range(num_models):
        if busy >> model & 1:
            site = device * num_models + model
            state.sites[site]["work_ms"] += elapsed_ms / state.sites[site]["slowdown"]


@compiled
def _pace_ms(state: State, replica: int) -> float:
    """Work of a step of the batch that decodes."""
    model, num_decoding = state.replicas[replica]["model"], state.replicas[replica]["num_decoding"]
    context_ms = state.models[model]["context_ms_per_token"] * state.replicas[replica]["context_tokens"]
    return float(state.step_ms[model, num_decoding] + context_ms)


@compiled
def _tokens_now(state: State, replica: int) -> float:
    """How far those that decode have come."""
    site = state.replicas[replica]["device"] * len(state.models) + state.replicas[replica]["model"]
    since_ms = state.sites[site]["work_ms"] - state.replicas[replica]["tokens_at_ms"]
    return float(state.replicas[replica]["tokens"] + since_ms / _pace_ms(state, replica))


@compiled
def _stop_after_step(state: State, replica: int) -> None:
    """Have the next event when the step that runs ends, or those that were begun ahead of it."""
    # A prompt that comes just as a step ends, but for rounding, does not wait for the next one.
    stops_at = np.ceil(_tokens_now(state, replica) - 1e-9)
    stops_at += state.models[state.replicas[replica]["model"]]["lag_steps"]
    stops_at = min(stops_at, state.seats[state.replicas[replica]["first_seat"]]["ends_at_tokens"])
    num_steps = stops_at - state.replicas[replica]["tokens"]
    mark_ms = state.replicas[replica]["tokens_at_ms"] + num_steps * _pace_ms(state, replica)
    _set_mark(state, replica, mark_ms)


@compiled
def _schedule(state: State, device: int) -> None:
    """Find the device's next event; of events at the same time, that of the smallest model is first."""
    clock_ms, busy = state.devices[device]["clock_ms"], state.devices[device]["busy_set"]
    num_models = len(state.models)
    soonest_ms, soonest_model = np.inf, 0
    for model in range(num_models):
        if busy >> model & 1:
            site = device * num_models + model
            # Rounding may have carried the work clock past the mark by a trifle.
            left_ms = max(0.0, state.sites[site]["mark_ms"] - state.sites[site]["work_ms"])
            at_ms = clock_ms + left_ms * state.sites[site]["slowdown"]
            if at_ms < soonest_ms:
                soonest_ms, soonest_model = at_ms, model
    state.devices[device]["next_model"] = soonest_model
    at_ms, device = play(state.events, 0, len(state.devices), device, soonest_ms, device)
    state.next_event[0]["at_ms"] = at_ms
    state.next_event[0]["device"] = device


@compiled
def _enqueue(state: State, replica: int, request: int) -> None:
    state.requests[request]["replica"] = replica
    state.requests[request]["next_waiting"] = NONE  # of an earlier course of events, in a search
    if state.replicas[replica]["first_waiting"] == NONE:
        state.replicas[replica]["first_waiting"] = request
    else:
        state.requests[state.replicas[replica]["last_waiting"]]["next_waiting"] = request
    state.replicas[replica]["last_waiting"] = request


@compiled
def _count(state: State, replica: int, change: int) -> None:
    """Note that one request came to the replica (+1) or left it (-1)."""
    model, device = state.replicas[replica]["model"], state.replicas[replica]["device"]
    state.models[model]["in_flight"] += change
    in_flight = state.replicas[replica]["in_flight"] + change
    state.replicas[replica]["in_flight"] = in_flight
    first, size = state.models[model]["first_replica"], state.models[model]["num_replicas"]
    _, next_replica = play(state.batches, 2 * first, size, replica - first, float(in_flight), replica)
    state.models[model]["next_replica"] = next_replica
    site = device * len(state.models) + model
    state.sites[site]["in_flight"] += change
    busy = state.devices[device]["busy_set"] & ~(1 << model)
    busy |= (state.sites[site]["in_flight"] > 0) << model
    state.devices[device]["busy_set"] = busy
    num_models, last = len(state.models), state.pressure.shape[2] - 1
    for own in range(num_models):
        slowdown = state.slowdown[own, busy]
        for other in range(num_models):
            num_others = state.sites[device * num_models + other]["in_flight"]
            slowdown += state.pressure[own, other, min(num_others, last)]
        state.sites[device * num_models + own]["slowdown"] = max(1.0, slowdown)


@compiled
def _tokens_of(state: State, request: int) -> int:
    """What it comes to hold in the KV cache."""
    return state.requests[request]["num_prompt_tokens"] + state.requests[request]["num_output_tokens"]  # type: ignore[no-any-return]


@compiled
def _context_of(state: State, request: int) -> int:
    """Tokens before the present one, half way through the answer."""
    num_output_tokens = state.requests[request]["num_output_tokens"]
    return state.requests[request]["num_prompt_tokens"] + num_output_tokens // 2  # type: ignore[no-any-return]


@compiled
def _may_begin(state: State, replica: int) -> bool:
    """Whether one waits, a seat is free, and the first in the queue fits into the KV cache.

    All that it may come to hold is reserved at once. vLLM hands out the cache block by block, and stops
    a request when there is none left.
    """
    request, model = state.replicas[replica]["first_waiting"], state.replicas[replica]["model"]
    if request == NONE or state.replicas[replica]["num_decoding"] >= state.models[model]["max_num_seqs"]:
        return False
    needed = state.replicas[replica]["kv_tokens"] + _tokens_of(state, request)
    return bool(needed <= state.models[model]["kv_cache_tokens"])


@compiled
def _begin_prefill(state: State, replica: int) -> float:
    """Take as many waiting prompts as fit into one step; returns its work in ms.

    Such a step decodes too, as vLLM's chunked prefill does. It takes what these prompts take alone,
    and what a step of the whole batch takes beyond one of a single request.
    """
    model, num_decoding = state.replicas[replica]["model"], state.replicas[replica]["num_decoding"]
    num_seats = state.models[model]["max_num_seqs"] - num_decoding
    kv_tokens, kv_cache_tokens = state.replicas[replica]["kv_tokens"], state.models[model]["kv_cache_tokens"]
    request = state.replicas[replica]["first_waiting"]
    state.replicas[replica]["prefilling"] = request
    num_prompts, num_tokens = 0, 0
    while request != NONE and num_prompts < num_seats:
        num_more, needed = state.requests[request]["num_prompt_tokens"], _tokens_of(state, request)
        if num_prompts > 0 and num_tokens + num_more > MAX_BATCHED_TOKENS:
            break
        if kv_tokens + needed > kv_cache_tokens:
            break
        num_prompts, num_tokens, kv_tokens = num_prompts + 1, num_tokens + num_more, kv_tokens + needed
        request = state.requests[request]["next_waiting"]
    state.replicas[replica]["num_prefilling"] = num_prompts
    state.replicas[replica]["kv_tokens"] = kv_tokens
    state.replicas[replica]["first_waiting"] = request
    per_token_ms = state.models[model]["prefill_ms_per_token"]
    alone_ms = state.models[model]["prefill_base_ms"] + per_token_ms * num_tokens
    alone_ms += _bend_ms(state, model, num_tokens)
    single_ms = state.step_ms[model, 1]
    batch_ms = state.step_ms[model, num_decoding + num_prompts]
    context_ms = state.models[model]["context_ms_per_token"] * state.replicas[replica]["context_tokens"]
    return float(max(alone_ms, single_ms) + (batch_ms - single_ms) + context_ms)


@compiled
def _bend_ms(state: State, model: int, num_tokens: int) -> float:
    """As `np.interp`: level before the first length and after the last."""
    at_tokens, bends_ms = state.bend_at_tokens, state.prefill_bend_ms[model]
    last = len(at_tokens) - 1
    if num_tokens >= at_tokens[last]:
        return float(bends_ms[last])
    nth = 0
    while at_tokens[nth] <= num_tokens:
        nth += 1
    if nth == 0:
        return float(bends_ms[0])
    share = (num_tokens - at_tokens[nth - 1]) / (at_tokens[nth] - at_tokens[nth - 1])
    return float(bends_ms[nth - 1] + share * (bends_ms[nth] - bends_ms[nth - 1]))


@compiled
def _next_work(state: State, replica: int) -> None:
    """Begin the next prefill if one may begin; else decode on; else be idle."""
    model = state.replicas[replica]["model"]
    site = state.replicas[replica]["device"] * len(state.models) + model
    work_ms = state.sites[site]["work_ms"]
    num_decoding = state.replicas[replica]["num_decoding"]
    mark_ms = np.inf
    if _may_begin(state, replica):
        mark_ms = work_ms + _begin_prefill(state, replica)
    elif num_decoding > 0:
        state.replicas[replica]["tokens_at_ms"] = work_ms
        ends_at = state.seats[state.replicas[replica]["first_seat"]]["ends_at_tokens"]
        num_steps = ends_at - state.replicas[replica]["tokens"]
        mark_ms = work_ms + num_steps * _pace_ms(state, replica)
    else:
        state.replicas[replica]["tokens"] = 0.0
    _set_mark(state, replica, mark_ms)


@compiled
def _set_mark(state: State, replica: int, mark_ms: float) -> None:
    """Have the replica's next event at that time of its site's work clock."""
    site = state.replicas[replica]["device"] * len(state.models) + state.replicas[replica]["model"]
    first, size = state.sites[site]["first_mark"], state.sites[site]["num_replicas"]
    nth = state.replicas[replica]["nth_of_site"]
    mark_ms, next_replica = play(state.marks, first, size, nth, mark_ms, replica)
    state.sites[site]["mark_ms"] = mark_ms
    state.sites[site]["next_replica"] = next_replica


@compiled
def _end_prefill(state: State, replica: int, now_ms: float) -> None:
    """The prompts are read and their first tokens are there; those that decoded got one too."""
    state.replicas[replica]["tokens"] += 1.0
    request = state.replicas[replica]["prefilling"]
    base, num_decoding = state.replicas[replica]["first_seat"], state.replicas[replica]["num_decoding"]
    seen_at_ms = now_ms + state.models[state.replicas[replica]["model"]]["overhead_ms"]
    for _ in range(state.replicas[replica]["num_prefilling"]):
        state.requests[request]["first_token_at_ms"] = seen_at_ms
        num_steps = state.requests[request]["num_output_tokens"] - 1
        ends_at, kv_tokens = state.replicas[replica]["tokens"] + num_steps, _tokens_of(state, request)
        push_seat(state.seats, base, num_decoding, ends_at, request, kv_tokens)
        num_decoding += 1
        state.replicas[replica]["context_tokens"] += _context_of(state, request)
        request = state.requests[request]["next_waiting"]
    state.replicas[replica]["num_decoding"] = num_decoding
    state.replicas[replica]["prefilling"] = NONE
    state.replicas[replica]["num_prefilling"] = 0


@compiled
def _end_decodes(state: State, replica: int, now_ms: float) -> None:
    """Complete the requests that have all their tokens."""
    base = state.replicas[replica]["first_seat"]
    tokens = state.replicas[replica]["tokens"]
    while state.replicas[replica]["num_decoding"] > 0 and state.seats[base]["ends_at_tokens"] <= tokens:
        state.replicas[replica]["kv_tokens"] -= state.seats[base]["kv_tokens"]
        request = pop_seat(state.seats, base, state.replicas[replica]["num_decoding"])
        state.replicas[replica]["num_decoding"] -= 1
        state.replicas[replica]["context_tokens"] -= _context_of(state, request)
        _complete(state, replica, request, now_ms)


@compiled
def _complete(state: State, replica: int, request: int, now_ms: float) -> None:
    overhead_ms = state.models[state.replicas[replica]["model"]]["overhead_ms"]
    state.requests[request]["last_token_at_ms"] = now_ms + overhead_ms
    state.completed[state.num_completed[0]] = request
    state.num_completed[0] += 1
    _count(state, replica, -1)
