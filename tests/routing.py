"""A router for tests: in a thread of its own, with an event loop and sockets as in production."""

import asyncio
import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import uvloop

from besteffort.engines.running import Engine
from besteffort.fleet import Fleet
from besteffort.policies import RoundRobin
from besteffort.router import DecisionLog, Dispatcher, Limits, PolicySource, Settings, running_router
from besteffort.router.reload import Reload
from tests.fake_engine import RawEngine, Script, wait_for

PATIENCE_S = 20.0  # of clients; no test waits this long for anything but a fault


@contextmanager
def routing(
    dispatcher: Dispatcher,
    settings: Settings | None = None,
    *,
    admin_listener: socket.socket | None = None,
    source: PolicySource | None = None,
    say: Callable[[str], None] = lambda line: None,
    decision_log: DecisionLog | None = None,
) -> Iterator[str]:
    """Its URL, while it runs; what goes wrong in its event loop fails the test."""
    settings = settings or Settings()
    faults: list[object] = []
    loops: list[asyncio.AbstractEventLoop] = []
    started, stop = threading.Event(), asyncio.Event()
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        loops[0].set_exception_handler(lambda _, context: faults.append(context))
        reload = None if source is None else Reload(dispatcher, source, say)
        async with running_router(
            dispatcher,
            settings,
            listener,
            admin_listener=admin_listener,
            reload=reload,
            decision_log=decision_log,
        ):
            started.set()
            await stop.wait()

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(10)
    scheme = "http" if settings.tls is None else "https"
    try:
        yield f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join(settings.limits.grace_s + 10)
    assert not thread.is_alive()
    assert not faults, faults


@dataclass
class Door:
    """A router before one raw engine, and the ways in."""

    url: str
    engine: RawEngine
    dispatcher: Dispatcher

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        parts = urlsplit(self.url)
        client = socket.socket()
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(PATIENCE_S)
        client.connect((parts.hostname, parts.port))
        return client

    def exchange(self, data: bytes, *, half_close: bool = False) -> bytes:
        """All that comes back until the router closes the connection."""
        with self.connect() as client:
            client.sendall(data)
            if half_close:
                client.shutdown(socket.SHUT_WR)
            return read_all(client)

    def ask(self, request: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        with self.connect() as client:
            client.sendall(request)
            return read_response(client)

    def settled(self) -> None:
        """Return once nothing is in flight, as must come about without anyone's doing."""
        wait_for(lambda: sum(map(sum, self.dispatcher.in_flight)) == 0)


@contextmanager
def door(
    fleet: Fleet, script: Script, settings: Settings | None = None, source: PolicySource | None = None
) -> Iterator[Door]:
    engine = RawEngine(script)
    replica = Engine(engine.url, "served")
    dispatcher = Dispatcher(fleet, RoundRobin(), ((replica, replica), (replica,)))
    try:
        with routing(dispatcher, settings, source=source) as url:
            yield Door(url, engine, dispatcher)
    finally:
        engine.close()


def read_all(client: socket.socket) -> bytes:
    answer = b""
    while part := client.recv(65_536):
        answer += part
    return answer


def read_response(client: socket.socket) -> tuple[http.client.HTTPResponse, bytes]:
    with http.client.HTTPResponse(client) as response:
        response.begin()
        return response, response.read()


def completion(body: bytes = b'{"model":"large","prompt":"x"}', *headers: bytes) -> bytes:
    """A request; `content-length` is written unless a header says how the body is sent."""
    lines = [b"POST /v1/completions HTTP/1.1", b"host: a", *headers]
    if not any(line.lower().startswith(b"transfer-encoding") for line in headers):
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join([*lines, b"", body])


def limited(**limits: float) -> Settings:
    return Settings(limits=Limits(**limits))  # type: ignore[arg-type]
