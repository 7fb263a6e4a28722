"""What goes out, gathered while there is much of it.

The kernel's work for one write drives ours out of the processor's caches. Where several connections have
something to say at a time, all of it is written together once they have been heard.
"""

import asyncio
from collections import deque
from collections.abc import Sequence

SMALL = 16_384  # bytes; a larger message is written at once, in parts, which costs less than to copy it
_MAX_TOGETHER = 16  # messages; of more the first would wait too long, and a client's not reading go unnoticed
_TRY_EVERY = 16  # messages that are written at once, before one is held to see whether it has company


class Outbox:
    """Writes in the order in which it is told to, at once or within the same turn of the event loop.

    Whoever closes a transport, or writes to it by other ways, calls `flush` before.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._held: deque[tuple[asyncio.WriteTransport, bytes]] = deque()
        self._num_flushed = 0  # messages that were held in this turn, and are not any more
        self._turn_ends = False  # will be told of it
        self._gathers = False  # the last ones had company
        self._num_alone = 0

    def send(self, transport: asyncio.WriteTransport, parts: Sequence[bytes], size: int) -> None:
        """Write bytes that nobody changes any more. `size` is of those parts that may be large."""
        if size > SMALL:
            self.flush()
            transport.writelines(parts)
        elif self._gathers or self._turn_ends or self._num_alone >= _TRY_EVERY:
            held = self._held
            held.append((transport, b"".join(parts)))
            if not self._turn_ends:
                self._turn_ends = True
                self.loop.call_soon(self._end_turn)
            elif len(held) == _MAX_TOGETHER:
                self.flush()
        else:
            self._num_alone += 1
            transport.write(b"".join(parts))

    def flush(self) -> None:
        """Write what is held."""
        held = self._held
        self._num_flushed += len(held)
        while held:
            transport, data = held.popleft()
            if not transport.is_closing():
                transport.write(data)

    def _end_turn(self) -> None:
        """Everyone has been heard."""
        self._gathers = self._num_flushed + len(self._held) > 1
        self._turn_ends = False
        self.flush()
        self._num_flushed = self._num_alone = 0
