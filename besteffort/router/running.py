"""The router while it runs: its event loop, its server, and how it is told to stop."""

import asyncio
import gc
import signal
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import uvloop

from besteffort.router.api_key import ApiKey
from besteffort.router.app import App
from besteffort.router.dispatcher import Dispatcher
from besteffort.router.limits import Limits
from besteffort.router.server import Server
from besteffort.router.watch import Watch


@dataclass(frozen=True)
class Settings:
    """What whoever starts the router may choose."""

    limits: Limits = field(default_factory=Limits)
    api_key: ApiKey | None = None
    protect_metrics: bool = False
    forward_authorization: bool = False
    tls: ssl.SSLContext | None = None


@asynccontextmanager
async def running_router(
    dispatcher: Dispatcher, settings: Settings, listener: socket.socket
) -> AsyncIterator[Server]:
    """The router on a socket that listens; at the end requests in work have a while to end."""
    watch = Watch(asyncio.get_running_loop())
    app = App(
        dispatcher,
        settings.limits,
        watch,
        api_key=settings.api_key,
        protect_metrics=settings.protect_metrics,
        forward_authorization=settings.forward_authorization,
    )
    server = Server(app, settings.limits, watch)
    await server.listen([listener], settings.tls)
    try:
        yield server
    finally:
        await server.drain()
        app.close()


def run_router(dispatcher: Dispatcher, settings: Settings, listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM."""

    async def serve() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with running_router(dispatcher, settings, listener):
            await stop.wait()

    # What is here by now stays: a collection that walks all of it would hold up every request.
    gc.collect()
    gc.freeze()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())
