"""The router while it runs: its event loop, its server, and how it is told to stop."""

import asyncio
import gc
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import uvloop

from besteffort.router.app import App
from besteffort.router.decision_log import DecisionLog
from besteffort.router.dispatcher import Dispatcher
from besteffort.router.hang_up import HangUp
from besteffort.router.policy_source import PolicySource
from besteffort.router.reload import Reload
from besteffort.router.server import Server
from besteffort.router.settings import Settings
from besteffort.router.watch import Watch

_ENDING = (signal.SIGINT, signal.SIGTERM)


@asynccontextmanager
async def running_router(
    dispatcher: Dispatcher,
    settings: Settings,
    listener: socket.socket,
    *,
    admin_listener: socket.socket | None = None,
    reload: Reload | None = None,
    decision_log: DecisionLog | None = None,
) -> AsyncIterator[Server]:
    """The router on a socket that listens; at the end requests in work have a while to end.

    On `admin_listener`, if there is one, are metrics and administration, until all requests have ended.
    """
    watch = Watch(asyncio.get_running_loop())
    app = App(
        dispatcher,
        settings,
        watch,
        reload=reload,
        admin_apart=admin_listener is not None,
        decision_log=decision_log,
    )
    server = Server(app.public, settings.limits, watch)
    await server.listen([listener], settings.tls)
    inner = None
    if admin_listener is not None and app.inner is not None:
        inner = Server(app.inner, settings.limits, watch)
        await inner.listen([admin_listener], settings.tls)
    try:
        yield server
    finally:
        await server.drain()
        if inner is not None:
            await inner.drain(grace_s=0.0)
        app.close()


def run_router(
    dispatcher: Dispatcher,
    settings: Settings,
    listener: socket.socket,
    *,
    admin_listener: socket.socket | None = None,
    decision_log: DecisionLog | None = None,
    source: PolicySource,
    hang_up: HangUp,
    say: Callable[[str], None],
) -> None:
    """Serve until SIGINT or SIGTERM; SIGHUP loads the policy of the start anew. `say` hears what is done.

    From then on none of these signals changes anything: whoever called this still has things to end.
    """

    async def serve() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        reload = Reload(dispatcher, source, say)

        def hung_up() -> None:
            if hang_up.was_the_terminal_s:
                stop.set()
            else:
                reload.start()

        for number in _ENDING:
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, hung_up)
        if hang_up.came:
            hung_up()
        running = running_router(
            dispatcher,
            settings,
            listener,
            admin_listener=admin_listener,
            reload=reload,
            decision_log=decision_log,
        )
        async with running:
            await stop.wait()
        reload.close()

    # What is here by now stays: a collection that walks all of it would hold up every request.
    gc.collect()
    gc.freeze()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())
    hang_up.ignore()
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)
