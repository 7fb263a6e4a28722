"""How much a client or an engine may send, and how long it may take."""

from dataclasses import dataclass

MEBIBYTE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in bytes, times in seconds. What goes over one is refused or broken off, never waited for."""

    # What clients may do.
    max_connections: int = 16_384
    max_in_flight: int = 4_096  # requests at the engines; those beyond are told to come again
    max_url: int = 2_048
    max_headers: int = 100  # of different names
    max_head: int = 32 * 1024  # all of a request or an answer before its body
    max_body: int = 32 * MEBIBYTE
    max_held: int = 512 * MEBIBYTE  # bodies of all requests together
    head_s: float = 10.0
    body_s: float = 60.0
    keep_alive_s: float = 75.0  # how long a connection may lie idle
    send_s: float = 60.0  # how long a client may read nothing of an answer that waits for it
    # What engines may do.
    connect_s: float = 5.0
    first_byte_s: float = 600.0  # a plain answer is generated whole before its first byte
    between_bytes_s: float = 120.0
    total_s: float = 3_600.0
    max_idle: int = 256  # connections kept open to each engine
    faults_to_open: int = 3  # in a row, before an engine gets no more requests
    probe_wait_s: float = 0.5  # before it is asked how it is; twice as long each time that it is not well
    max_probe_wait_s: float = 10.0
    probe_s: float = 5.0  # it has to answer
    token_s: float = 60.0  # it has to make one, where it answers nothing else
    # When we are told to stop.
    grace_s: float = 10.0
