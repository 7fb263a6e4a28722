"""A server of HTTP/1.1 on asyncio's protocols: listening, its connections, and how it ends.

A task and a few awaits per request cost more than all of the routing; callbacks do not (docs/log.md).
"""

import asyncio
import socket
import ssl
from collections.abc import Sequence

from besteffort.router.client_connection import ClientConnection
from besteffort.router.limits import Limits
from besteffort.router.message import Handler
from besteffort.router.outbox import Outbox
from besteffort.router.request_reader import Budget
from besteffort.router.tls_door import TlsDoor
from besteffort.router.watch import Watch

_POLL_S = 0.02


class Server:
    """One handler behind any number of listening sockets. Made inside the running event loop."""

    def __init__(self, handler: Handler, limits: Limits, watch: Watch) -> None:
        self.handler = handler
        self.limits = limits
        self.watch = watch
        self.loop = asyncio.get_running_loop()
        self.outbox = Outbox(self.loop)
        self.budget = Budget(limits.max_held)
        self.connections: set[ClientConnection] = set()
        self.draining = False
        self._listening: list[asyncio.Server] = []
        self._tls_doors: list[TlsDoor] = []

    async def listen(self, listeners: Sequence[socket.socket], tls: ssl.SSLContext | None = None) -> None:
        for listener in listeners:
            if tls is None:
                self._listening.append(await self.loop.create_server(self._connection, sock=listener))
            else:
                door = TlsDoor(listener, tls, self._connection, self._has_room, self.limits.head_s)
                self._tls_doors.append(door)

    def _connection(self) -> ClientConnection:
        return ClientConnection(self)

    def _has_room(self) -> bool:
        num_handshakes = sum(door.num_handshakes for door in self._tls_doors)
        return len(self.connections) + num_handshakes < self.limits.max_connections

    async def drain(self, grace_s: float | None = None) -> None:
        """Take no more requests, wait for those in work, by default as long as the limits say, then cut them
        off."""
        self.draining = True
        for listening in self._listening:
            listening.close()
        for door in self._tls_doors:
            door.close()
        give_up_at = self.loop.time() + (self.limits.grace_s if grace_s is None else grace_s)
        while self.connections and self.loop.time() < give_up_at:
            for connection in list(self.connections):
                connection.drain()
            await asyncio.sleep(_POLL_S)
        for connection in list(self.connections):
            connection.abort()
        await asyncio.sleep(0)
