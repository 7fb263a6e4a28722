"""A router for tests: in a thread of its own, with an event loop and sockets as in production."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvloop

from besteffort.router import Dispatcher, Settings, running_router


@contextmanager
def routing(dispatcher: Dispatcher, settings: Settings | None = None) -> Iterator[str]:
    """Its URL, while it runs; what goes wrong in its event loop fails the test."""
    settings = settings or Settings()
    faults: list[object] = []
    started, stop = threading.Event(), asyncio.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        loops[0].set_exception_handler(lambda _, context: faults.append(context))
        async with running_router(dispatcher, settings, listener):
            started.set()
            await stop.wait()

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())

    loops: list[asyncio.AbstractEventLoop] = []
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
