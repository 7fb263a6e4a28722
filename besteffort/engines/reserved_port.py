"""A port that stays a server's own, while it starts, and while it is dead and waits to be started again."""

import socket


class ReservedPort:
    """A TCP port of the loopback interface, until `close`.

    A socket is bound to it that never listens. Servers, which ask for SO_REUSEADDR or SO_REUSEPORT, can bind
    it besides; but the kernel gives it to nobody who asks for any free port, nor to a connection going out.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        try:
            for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
                self._socket.setsockopt(socket.SOL_SOCKET, option, 1)
            self._socket.bind(("127.0.0.1", 0))
        except OSError:
            self._socket.close()
            raise
        self.number = int(self._socket.getsockname()[1])

    def close(self) -> None:
        self._socket.close()
