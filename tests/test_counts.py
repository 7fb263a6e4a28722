"""What is counted for a request is taken back exactly once, whatever becomes of it and in whatever order.

The connections of clients and engines are the router's own; only the network between is played, so that every
order of events can come about, and thousands of them in seconds.
"""

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from besteffort.engines.running import Engine
from besteffort.fleet import Fleet
from besteffort.policies import RoundRobin
from besteffort.router import Dispatcher, Limits, Settings
from besteffort.router.app import App
from besteffort.router.breaker import State
from besteffort.router.client_connection import ClientConnection
from besteffort.router.dispatcher import NoReplicaError
from besteffort.router.loads import Standing
from besteffort.router.server import Server
from besteffort.router.watch import Watch
from tests.fake_engine import plain_answer
from tests.routing import completion

_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_EVENT = b'21\r\ndata: {"choices":[{"text":"a"}]}\n\n\r\n'
_FROM_CLIENTS = (
    completion(b'{"model":"large","stream":true}'),
    completion(b'{"model":"besteffort"}') * 3,
    completion(b'{"stream":true,"n":2}', b"x-besteffort-receipt: stream"),
    completion(b'{"model":"nobody"}'),
    b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n" * 3 + completion(b'{"model":"large"}'),
    b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n{",
    b"garbage\r\n\r\n",
)
_FROM_ENGINES = (
    plain_answer(),
    plain_answer() * 2,
    _STREAM,
    _EVENT,
    b"0\r\n\r\n",
    b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n",
    b"HTTP/1.1 400 Bad\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 500 Dead\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 500 Dead\r\ncontent-length: 2\r\n\r\n{}garbage",
    b"HTTP/1.1 200 OK\r\n\r\nuntil the end",
    b"garbage\r\n\r\n",
)


class _Transport:
    """One end of a connection that is only played. Ending it is noticed later, as in life."""

    def __init__(self, loop: "_Network", protocol: Any) -> None:
        self._loop = loop
        self.protocol = protocol
        self.is_open = True
        self.reads = True
        self.written = 0

    def write(self, data: bytes) -> None:
        self.written += len(data)

    def writelines(self, parts: list[bytes]) -> None:
        self.written += sum(map(len, parts))

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True

    def is_closing(self) -> bool:
        return not self.is_open

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        pass

    def get_extra_info(self, name: str) -> Any:
        return self

    def setsockopt(self, *_: object) -> None:
        pass

    def close(self) -> None:
        self.end(None)

    def abort(self) -> None:
        self.end(None)

    def end(self, error: Exception | None) -> None:
        if self.is_open:
            self.is_open = False
            self._loop.later.append(lambda: self.protocol.connection_lost(error))


@dataclass
class _Timer:
    due_at: float
    callback: Callable[[], None]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class _Network:
    """What the router takes for its event loop: real tasks, a clock that is set by hand, no sockets."""

    def __init__(self, choice: random.Random) -> None:
        self._choice = choice
        self.now = 0.0
        self.later: list[Callable[[], None]] = []
        self.clients: list[_Transport] = []
        self.engines: list[_Transport] = []
        self._timers: list[_Timer] = []
        self.create_task = asyncio.get_running_loop().create_task

    def time(self) -> float:
        return self.now

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> "_Timer":
        self._timers.append(_Timer(self.now + delay_s, callback))
        return self._timers[-1]

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.later.append(callback)

    def tick(self) -> None:
        due = [timer for timer in self._timers if timer.due_at <= self.now]
        self._timers = [timer for timer in self._timers if timer.due_at > self.now]
        self._choice.shuffle(due)
        for timer in due:
            if not timer.cancelled:
                timer.callback()

    async def create_connection(self, protocol: Callable[[], Any], *_: object, **__: object) -> None:
        for _ in range(self._choice.randrange(3)):
            await asyncio.sleep(0)
        if self._choice.random() < 0.2:
            raise ConnectionRefusedError("refused")
        self.engines.append(self._open(protocol()))

    def connect_client(self, protocol: ClientConnection) -> None:
        self.clients.append(self._open(protocol))

    def _open(self, protocol: Any) -> _Transport:
        transport = _Transport(self, protocol)
        protocol.connection_made(transport)
        return transport


def events(network: _Network, server: Server, choice: random.Random) -> Iterator[Callable[[], None]]:
    """What may happen next, one thing each time."""

    def some(transports: list[_Transport]) -> _Transport | None:
        alive = [one for one in transports if one.is_open]
        return choice.choice(alive) if alive else None

    while True:
        kind = choice.random()
        client, engine = some(network.clients), some(network.engines)
        if kind < 0.15 or client is None:
            yield lambda: network.connect_client(ClientConnection(server))
        elif kind < 0.40:
            if client.reads:
                data = choice.choice(_FROM_CLIENTS)
                yield lambda: client.protocol.data_received(data)  # noqa: B023
        elif kind < 0.45:
            yield lambda: client.end(choice.choice((None, ConnectionResetError())))  # noqa: B023
        elif kind < 0.48:
            client.protocol.eof_received()
            yield client.close
        elif kind < 0.53:
            yield client.protocol.pause_writing
            yield client.protocol.resume_writing
        elif kind < 0.56 and network.later:
            yield network.later.pop(choice.randrange(len(network.later)))
        elif kind < 0.60:
            network.now += choice.choice((0.1, 1.0, 5.0, 200.0))
            yield network.tick
        elif engine is not None and kind < 0.90:
            if engine.reads:
                data = choice.choice(_FROM_ENGINES)
                yield lambda: engine.protocol.data_received(data)  # noqa: B023
        elif engine is not None:
            engine.protocol.eof_received()
            yield lambda: engine.end(choice.choice((None, ConnectionResetError())))  # noqa: B023


async def play(fleet: Fleet, seed: int) -> dict[str, int]:
    """The outcomes that were counted."""
    choice = random.Random(seed)
    network: Any = _Network(choice)
    engines = tuple(
        tuple(Engine(f"http://{model.name}:{replica}", "x") for replica in range(1, model.replicas + 1))
        for model in fleet.models
    )
    dispatcher = Dispatcher(fleet, RoundRobin(), engines)
    limits = Limits(max_in_flight=4, faults_to_open=choice.choice((1, 2)))
    watch = Watch(network)
    app = App(dispatcher, Settings(limits=limits), watch)
    for upstream in app.upstreams.values():
        upstream.loop = upstream.outbox.loop = network
    server = Server(app.public, limits, watch)
    server.loop = server.outbox.loop = network
    happening = events(network, server, choice)
    for _ in range(choice.randrange(5, 80)):
        next(happening)()
        if choice.random() < 0.5:
            await asyncio.sleep(0)
        counted = sum(map(sum, dispatcher.in_flight))
        assert 0 <= counted == app.proxy.num_in_flight <= limits.max_in_flight
    for client in network.clients:
        client.end(None)
    for _ in range(10):
        await asyncio.sleep(0)
        while network.later:
            network.later.pop()()
    assert dispatcher.in_flight == [[0, 0], [0]]
    check_health(app, dispatcher)
    await close(app, network)
    assert (app.proxy.num_in_flight, server.budget.held, server.connections) == (0, 0, set())
    busy = [one for one in network.engines if one.is_open and not one.protocol.is_idle]
    assert not busy, "an engine still works for a client that is gone"
    outcomes: dict[str, int] = {}
    for (_, _, outcome), count in app.metrics.requests.items():
        outcomes[outcome] = outcomes.get(outcome, 0) + count
    outcomes["retries"] = app.metrics.num_retries
    outcomes["turned away"] = sum(app.metrics.turned_away.values())
    for breaker in (breaker for of_model in app.health.breakers for breaker in of_model):
        for what, count in (("openings", breaker.num_openings), ("returns", breaker.num_probes["ok"])):
            outcomes[what] = outcomes.get(what, 0) + count
    return outcomes


def check_health(app: App, dispatcher: Dispatcher) -> None:
    """Requests go where a breaker is closed; where none is, to one that does not hang."""
    for model, of_model in enumerate(app.health.breakers):
        standings = [breaker.standing for breaker in of_model]
        assert [breaker.state is State.CLOSED for breaker in of_model] == [
            standing is Standing.UP for standing in standings
        ]
        if min(standings) is Standing.OUT:
            with pytest.raises(NoReplicaError):
                dispatcher.begin(0, model)
        else:
            with dispatcher.route(0, model) as route:
                assert app.health.of(route).standing is min(standings)


async def close(app: App, network: Any) -> None:
    """After it the router asks nobody anything, however long one waits."""
    app.close()
    num_connections = len(network.engines)
    for _ in range(5):
        network.now += 1000.0
        network.tick()
        await asyncio.sleep(0)
        while network.later:
            network.later.pop()()
    assert len(network.engines) == num_connections
    assert not any(one.is_open for one in network.engines)


@pytest.mark.parametrize("batch", range(4))
def test_counts_end_at_zero_after_any_order_of_events(fleet: Fleet, batch: int) -> None:
    ways = ("ok", "refused", "failed", "cancelled", "retries", "turned away", "openings", "returns")
    totals = dict.fromkeys(ways, 0)
    for seed in range(batch * 1000, batch * 1000 + 1000):
        for outcome, count in asyncio.run(play(fleet, seed)).items():
            totals[outcome] += count
    assert min(totals.values()) > 50, totals  # every way to end, and to fail and return, was among them
