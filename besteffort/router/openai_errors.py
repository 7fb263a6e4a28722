"""Errors in OpenAI's schema."""

import json

from besteffort.router.message import Header, Reply


def error_body(status: int, message: str, code: str, param: str | None = None) -> bytes:
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error}).encode()


def error_reply(
    status: int,
    message: str,
    code: str,
    param: str | None = None,
    *,
    headers: tuple[Header, ...] = (),
    retry_after_s: int | None = None,
    closes: bool = False,
) -> Reply:
    if retry_after_s is not None:
        headers = (*headers, (b"retry-after", b"%d" % retry_after_s))
    return Reply(status, error_body(status, message, code, param), headers=headers, closes=closes)


def error_event(message: str, code: str) -> bytes:
    """The last event of a stream that had begun when its engine failed."""
    return b"data: " + error_body(502, message, code) + b"\n\n"
