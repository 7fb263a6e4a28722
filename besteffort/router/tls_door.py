"""Accepting connections that speak TLS."""

import asyncio
import socket
import ssl
from collections.abc import Callable
from functools import partial

_AT_A_TIME = 64  # connections, and then it is others' turn
_WITHOUT_FILES_S = 1.0  # before it is tried again to accept where no file is left


class TlsDoor:
    """Accepts at a socket that listens, and makes a protocol of each connection with a handshake behind it.

    asyncio's own server would have any number of handshakes under way, each with a quarter of a megabyte, and
    would tell nobody. Here one begins only while `has_room`; who comes beyond is closed, since nothing can be
    said before it. Made inside the running event loop.
    """

    def __init__(
        self,
        listener: socket.socket,
        tls: ssl.SSLContext,
        make: Callable[[], asyncio.Protocol],
        has_room: Callable[[], bool],
        handshake_s: float,
    ) -> None:
        self._listener = listener
        self._tls = tls
        self._make = make
        self._has_room = has_room
        self._handshake_s = handshake_s
        self._handshakes: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._open()

    @property
    def num_handshakes(self) -> int:
        return len(self._handshakes)

    def close(self) -> None:
        """Accept nobody any more, and give up handshakes."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for handshake in self._handshakes:
            handshake.cancel()

    def _open(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(_AT_A_TIME):
            try:
                client, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # no file is left; the listener stays readable
                self._loop.remove_reader(self._listener)
                self._pause = self._loop.call_later(_WITHOUT_FILES_S, self._open)
                return
            if self._has_room():
                handshake = self._loop.create_task(self._shake_hands(client))
                self._handshakes.add(handshake)
                handshake.add_done_callback(partial(self._ended, client))
            else:
                client.close()

    def _ended(self, client: socket.socket, handshake: asyncio.Task[None]) -> None:
        self._handshakes.discard(handshake)
        if handshake.cancelled():  # maybe before it began
            client.close()

    async def _shake_hands(self, client: socket.socket) -> None:
        client.setblocking(False)
        try:
            await self._loop.connect_accepted_socket(
                self._make, client, ssl=self._tls, ssl_handshake_timeout=self._handshake_s
            )
        except OSError:  # it speaks no TLS, or not in time, or is gone
            client.close()
