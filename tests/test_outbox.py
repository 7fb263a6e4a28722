"""Bytes leave in the order in which they were sent, once, and none waits longer than a turn of the loop."""

from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from besteffort.router.outbox import SMALL, Outbox

HELD = 20  # so many sent within one turn are enough that the last are held


class Loop:
    """Turns when it is told to."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.soon.append(callback)

    def turn(self) -> None:
        soon, self.soon = self.soon, []
        for callback in soon:
            callback()


class Wire:
    """What was written to several transports, in order; each is known by its number."""

    def __init__(self) -> None:
        self.written: list[tuple[int, bytes]] = []

    def end(self, number: int) -> Any:
        return End(self, number)


class End:
    def __init__(self, wire: Wire, number: int) -> None:
        self._wire = wire
        self._number = number
        self.is_closed = False

    def is_closing(self) -> bool:
        return self.is_closed

    def write(self, data: bytes) -> None:
        assert not self.is_closed
        self._wire.written.append((self._number, data))

    def writelines(self, parts: list[bytes]) -> None:
        self.write(b"".join(parts))


def made() -> tuple[Any, Wire, Outbox]:
    loop: Any = Loop()
    return loop, Wire(), Outbox(loop)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(0, 3), st.sampled_from((1, 7, SMALL, SMALL + 1))),
            st.sampled_from(("turn", "flush")),
        ),
        max_size=80,
    )
)
def test_all_is_written_once_and_in_order_whenever_the_loop_turns(events: list[Any]) -> None:
    loop, wire, outbox = made()
    ends = [wire.end(number) for number in range(4)]
    sent = []
    for nth, event in enumerate(events):
        if event == "turn":
            loop.turn()
            assert wire.written == sent
        elif event == "flush":
            outbox.flush()
            assert wire.written == sent
        else:
            number, size = event
            data = bytes([nth]) * size
            outbox.send(ends[number], [data[:1], data[1:]], len(data))
            sent.append((number, data))
    loop.turn()
    assert wire.written == sent
    assert not loop.soon


def test_what_comes_alone_is_written_at_once_but_for_a_try_now_and_then() -> None:
    loop, wire, outbox = made()
    end = wire.end(0)
    num_at_once = 0
    for number in range(170):
        outbox.send(end, [b"x"], 1)
        num_at_once += len(wire.written) == number + 1
        loop.turn()
    assert num_at_once == 160


def test_many_in_one_turn_are_written_at_its_end_and_so_are_those_of_the_next() -> None:
    loop, wire, outbox = made()
    for _ in range(HELD):
        outbox.send(wire.end(0), [b"x"], 1)
    loop.turn()
    assert len(wire.written) == HELD
    for _ in range(3):
        outbox.send(wire.end(0), [b"x"], 1)
    assert len(wire.written) == HELD
    loop.turn()
    assert len(wire.written) == HELD + 3


def test_what_was_closed_meanwhile_gets_nothing_and_keeps_nobody_from_it() -> None:
    loop, wire, outbox = made()
    ends = [wire.end(number) for number in range(HELD)]
    for end in ends:
        outbox.send(end, [b"x"], 1)
    before = len(wire.written)
    assert before < HELD
    ends[before].is_closed = True
    loop.turn()
    assert [number for number, _ in wire.written] == [n for n in range(HELD) if n != before]


def test_never_does_a_message_wait_for_more_than_a_few_others() -> None:
    loop, wire, outbox = made()
    for number in range(1, 201):
        outbox.send(wire.end(0), [b"x"], 1)
        assert number - len(wire.written) < 16
    loop.turn()
    assert len(wire.written) == 200


def test_never_is_a_lot_held() -> None:
    loop, wire, outbox = made()
    for number in range(1, 101):
        outbox.send(wire.end(0), [b"x" * SMALL], SMALL)
        assert (number - len(wire.written)) * SMALL <= 262_144
    loop.turn()
    assert len(wire.written) == 100
