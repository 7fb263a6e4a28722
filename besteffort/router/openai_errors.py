"""Errors in OpenAI's schema."""

import json

from starlette.responses import JSONResponse


def error_body(status: int, message: str, code: str, param: str | None = None) -> dict[str, object]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(status: int, message: str, code: str, param: str | None = None) -> JSONResponse:
    return JSONResponse(error_body(status, message, code, param), status)


def error_event(message: str, code: str) -> bytes:
    """The last event of a stream that had begun when its engine failed."""
    return b"data: " + json.dumps(error_body(502, message, code)).encode() + b"\n\n"
