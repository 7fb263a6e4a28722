"""What a request asks for, read from its head and its body."""

import math
from dataclasses import dataclass

import msgspec

from besteffort.fleet import Fleet
from besteffort.router.addressing import TASK_HEADER, Address, Addresses, UnknownAddressError
from besteffort.router.message import Refusal, Request
from besteffort.router.openai_errors import error_reply
from besteffort.router.receipt import DEADLINE_HEADER, RECEIPT_HEADER, STREAMED
from besteffort.router.request_body import RequestBody

_TASK = TASK_HEADER.encode()
_DEADLINE = DEADLINE_HEADER.encode()
_RECEIPT = RECEIPT_HEADER.encode()
_MAX_DEADLINE_MS = 1e6
_NOTE = "asked"  # of a request: what its head asks for


@dataclass(slots=True)
class _Head:
    """What the head alone asks for, where there is nothing wrong with it."""

    task: str | None
    deadline_ms_per_token: float | None  # its own
    streams_receipt: bool


class Asked(msgspec.Struct):
    """What a request asks for, as far as routing and accounting go."""

    address: Address
    deadline_ms_per_token: float
    body: RequestBody
    request_id: bytes
    streams_receipt: bool  # wants one at the end of a stream


class AskedReader:
    """Reads requests to one fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self._deadlines = [task.deadline_ms_per_token for task in fleet.tasks]
        self._addresses = Addresses(fleet)

    def read(self, request: Request, request_id: bytes) -> Asked:
        """Raises Refusal."""
        noted: _Head | None = request.notes.get(_NOTE)
        task = _task(request.headers) if noted is None else noted.task
        try:
            body = RequestBody(request.body)
            address = self._addresses.read(task, body.model)
        except ValueError:
            raise Refusal(error_reply(400, "The body is not a JSON object", "invalid_json")) from None
        except UnknownAddressError as error:
            raise Refusal(error_reply(404, str(error), "model_not_found", error.param)) from None
        if noted is None:
            deadline, streams = _deadline(request.headers), _streams_receipt(request.headers)
            noted = request.notes[_NOTE] = _Head(task, deadline, streams)
        deadline = noted.deadline_ms_per_token
        if deadline is None:
            deadline = self._deadlines[address.task]
        return Asked(address, deadline, body, request_id, noted.streams_receipt)


def _task(headers: dict[bytes, bytes]) -> str | None:
    """Raises Refusal: what follows is said to be something else than JSON."""
    media_type = headers.get(b"content-type")
    if media_type is not None and media_type.partition(b";")[0].strip().lower() != b"application/json":
        raise Refusal(error_reply(415, "The body must be application/json", "unsupported_media_type"))
    task = headers.get(_TASK)
    return None if task is None else task.decode("latin-1")


def _deadline(headers: dict[bytes, bytes]) -> float | None:
    """Raises Refusal: what was given is no positive number of milliseconds."""
    given = headers.get(_DEADLINE)
    if given is None:
        return None
    try:
        deadline = float(given)
    except ValueError:
        deadline = math.nan
    if not 0 < deadline <= _MAX_DEADLINE_MS:
        message = f"{DEADLINE_HEADER} must be a number of milliseconds over 0, up to {_MAX_DEADLINE_MS:g}"
        raise Refusal(error_reply(400, message, "invalid_deadline", DEADLINE_HEADER))
    return deadline


def _streams_receipt(headers: dict[bytes, bytes]) -> bool:
    """Raises Refusal: what was given is nothing that can be asked for."""
    given = headers.get(_RECEIPT)
    if given is None or given == STREAMED:
        return given is not None
    message = f"{RECEIPT_HEADER} must be {STREAMED.decode()!r}, or not be there"
    raise Refusal(error_reply(400, message, "invalid_receipt", RECEIPT_HEADER))
