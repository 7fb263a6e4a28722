"""What goes out, gathered while there is much of it.

The kernel's work for one write drives ours out of the processor's caches. Where several connections have
something to say at a time, all of it is written together once they have been heard.
"""

import asyncio
from collections import deque
from collections.abc import Sequence

SMALL = 65_536  # bytes; up to this, copying costs less than writing in parts
_MAX_HELD = 262_144  # bytes; more is written at once, so that a client that does not read is noticed
_MAX_TOGETHER = 16  # messages; of more the first would wait too long
_TRY_EVERY = 16  # messages that are written at once, before one is held to see whether it has company


class Outbox:
    """Writes in the order in which it is told to, at once or within the same turn of the event loop.

    Whoever closes a transport, or writes to it by other ways, calls `flush` before.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._held: deque[tuple[asyncio.WriteTransport, bytes]] = deque()
        self._num_bytes = 0  # held
        self._num_gathered = 0  # messages in this turn, those that were flushed before its end included
        self._gathers = False  # the last ones had company
        self._num_alone = 0

    def send(self, transport: asyncio.WriteTransport, parts: Sequence[bytes]) -> None:
        """Write bytes that nobody changes any more."""
        size = 0
        for part in parts:
            size += len(part)
        if size > SMALL:
            self.flush()
            transport.writelines(parts)
        elif self._num_gathered or self._gathers or self._num_alone >= _TRY_EVERY:
            self._hold(transport, b"".join(parts), size)
        else:
            self._num_alone += 1
            transport.write(b"".join(parts))

    def flush(self) -> None:
        """Write what is held."""
        held = self._held
        self._num_bytes = 0
        while held:
            transport, data = held.popleft()
            if not transport.is_closing():
                transport.write(data)

    def _hold(self, transport: asyncio.WriteTransport, data: bytes, size: int) -> None:
        if not self._num_gathered:
            self.loop.call_soon(self._end_turn)
        self._num_gathered += 1
        self._held.append((transport, data))
        self._num_bytes += size
        if self._num_bytes > _MAX_HELD or len(self._held) >= _MAX_TOGETHER:
            self.flush()

    def _end_turn(self) -> None:
        """Everyone has been heard."""
        self._gathers = self._num_gathered > 1
        self._num_gathered = self._num_alone = 0
        self.flush()
