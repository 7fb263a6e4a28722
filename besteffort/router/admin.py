"""What whoever holds the admin key may do: see which policy is in charge, and put another there."""

import json

import msgspec

from besteffort.errors import InputError
from besteffort.router.dispatcher import Dispatcher
from besteffort.router.message import Job, Reply, Request, Responder
from besteffort.router.openai_errors import error_reply
from besteffort.router.reload import Reload


class _Wanted(msgspec.Struct, forbid_unknown_fields=True):
    policy: str


_DECODER = msgspec.json.Decoder(_Wanted)


class Admin:
    def __init__(self, dispatcher: Dispatcher, reload: Reload) -> None:
        self._dispatcher = dispatcher
        self._reload = reload

    def show_policy(self, request: Request, responder: Responder) -> None:
        responder.reply(self._policy())

    def load_policy(self, request: Request, responder: Responder) -> Job | None:
        media_type = request.headers.get(b"content-type", b"application/json")
        if media_type.partition(b";")[0].strip().lower() != b"application/json":
            message = "The body must be application/json"
            responder.reply(error_reply(415, message, "unsupported_media_type"))
            return None
        try:
            name = _DECODER.decode(request.body).policy
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            message = 'The body must be a JSON object with one string, as in {"policy": "round-robin"}'
            responder.reply(error_reply(400, message, "invalid_json", "policy"))
            return None
        job = _Load(self, responder)
        self._reload.start(name, job.done)
        return job

    def _policy(self) -> Reply:
        about = {
            "policy": self._dispatcher.policy.name,
            "given": self._reload.name,
            "since": int(self._reload.since),
        }
        return Reply(200, json.dumps(about).encode())

    def outcome(self, error: BaseException | None) -> Reply:
        if error is None:
            return self._policy()
        if isinstance(error, InputError):
            return error_reply(400, str(error), "invalid_policy", "policy")
        return error_reply(500, "The policy could not be loaded; the router's log says why", "internal_error")


class _Load:
    """A policy on its way, and the client that waits for it."""

    def __init__(self, admin: Admin, responder: Responder) -> None:
        self._admin = admin
        self._responder: Responder | None = responder

    def done(self, error: BaseException | None) -> None:
        if self._responder is not None:
            self._responder.reply(self._admin.outcome(error))

    def cancel(self) -> None:
        """The load itself goes on."""
        self._responder = None

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass
