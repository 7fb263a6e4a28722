"""The requests that decode on a replica: a heap by the token count at which they end."""

from besteffort.simulator.compiled import compiled
from besteffort.simulator.records import Records


@compiled
def push_seat(seats: Records, base: int, size: int, tokens: float, request: int, kv_tokens: int) -> None:
    """Add one to the `size` that lie in `seats[base : base + size]`."""
    place = size
    while place > 0 and seats[base + ((place - 1) >> 1)]["ends_at_tokens"] > tokens:
        above = base + ((place - 1) >> 1)
        seats[base + place]["ends_at_tokens"] = seats[above]["ends_at_tokens"]
        seats[base + place]["request"] = seats[above]["request"]
        seats[base + place]["kv_tokens"] = seats[above]["kv_tokens"]
        place = (place - 1) >> 1
    seats[base + place]["ends_at_tokens"] = tokens
    seats[base + place]["request"] = request
    seats[base + place]["kv_tokens"] = kv_tokens


@compiled
def pop_seat(seats: Records, base: int, size: int) -> int:
    """Take away the request that ends first, and return it."""
    first = seats[base]["request"]
    size -= 1
    last = seats[base + size]
    tokens, request, kv_tokens = last["ends_at_tokens"], last["request"], last["kv_tokens"]
    place = 0
    while 2 * place + 1 < size:
        child = base + 2 * place + 1
        if 2 * place + 2 < size and seats[child + 1]["ends_at_tokens"] < seats[child]["ends_at_tokens"]:
            child += 1
        if seats[child]["ends_at_tokens"] >= tokens:
            break
        seats[base + place]["ends_at_tokens"] = seats[child]["ends_at_tokens"]
        seats[base + place]["request"] = seats[child]["request"]
        seats[base + place]["kv_tokens"] = seats[child]["kv_tokens"]
        place = child - base
    seats[base + place]["ends_at_tokens"] = tokens
    seats[base + place]["request"] = request
    seats[base + place]["kv_tokens"] = kv_tokens
    return int(first)
