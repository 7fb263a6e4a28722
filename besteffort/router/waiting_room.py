"""Whom clients find before the router runs: engines may take minutes to start."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import uvloop

from besteffort.router.message import Job, Reply, Request, Responder
from besteffort.router.openai_errors import error_reply
from besteffort.router.server import Server
from besteffort.router.settings import Settings
from besteffort.router.watch import Watch

_RETRY_AFTER_S = 5
_GRACE_S = 1.0  # for answers that are on their way


@contextmanager
def waiting_room(listeners: Sequence[socket.socket], settings: Settings) -> Iterator[None]:
    """While it is open, a thread of its own tells whoever comes to sockets that listen to come again later.

    The sockets listen on after it: who comes in between waits for what listens next.
    """
    loop, close = uvloop.new_event_loop(), asyncio.Event()

    async def receive() -> None:
        server = Server(_Starting(), settings.limits, Watch(loop))
        await server.listen([listener.dup() for listener in listeners], settings.tls)
        await close.wait()
        await server.drain(_GRACE_S)

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(receive())

    thread = threading.Thread(target=run, name="waiting room", daemon=True)
    thread.start()
    try:
        yield
    finally:
        if thread.is_alive():
            loop.call_soon_threadsafe(close.set)
            thread.join()


class _Starting:
    """A handler that takes nothing."""

    def __init__(self) -> None:
        message = "The engines are starting; come again later"
        # Each connection ends: the next request on it may be one that the router can take.
        self._for_all = error_reply(503, message, "starting", retry_after_s=_RETRY_AFTER_S, closes=True)
        said = json.dumps({"status": "starting"}).encode()
        self._of_health = Reply(503, said, headers=self._for_all.headers, closes=True)

    def refuse(self, request: Request) -> Reply:
        return self._of_health if request.target == b"/health" else self._for_all

    def handle(self, request: Request, responder: Responder) -> Job | None:
        raise AssertionError("all were refused")
