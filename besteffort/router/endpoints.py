"""Paths, and what is served at them: a server's handler."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from besteffort.router.api_key import ApiKey
from besteffort.router.message import Job, Reply, Request, Responder
from besteffort.router.openai_errors import error_reply

Handle = Callable[[Request, Responder], Job | None]


@dataclass(frozen=True, slots=True)
class Endpoint:
    methods: Mapping[bytes, Handle]
    key: ApiKey | None = None  # None: open to all


def get(handle: Handle, key: ApiKey | None = None) -> Endpoint:
    return Endpoint({b"GET": handle, b"HEAD": handle}, key)


class Endpoints:
    """Handles every request that a server could read. A path that ends in `/` stands for all that begin so.

    `key` is asked for at paths that are not there, so that nobody without it learns which are.
    """

    def __init__(self, by_path: Mapping[bytes, Endpoint], key: ApiKey | None) -> None:
        self._by_path = by_path
        self._prefixes = [path for path in by_path if path.endswith(b"/")]
        self._key = key

    def refuse(self, request: Request) -> Reply | None:
        """A wrong key, path or method, told from the head alone."""
        endpoint = self._find(request.target)
        key = self._key if endpoint is None else endpoint.key
        refusal = None if key is None else key.refuse(request)
        if refusal is not None:
            return refusal
        said = f"{request.method.decode()} {request.target.decode()}"
        if endpoint is None:
            return error_reply(404, f"{said}: there is no such path", "not_found")
        if request.method not in endpoint.methods:
            allowed = b", ".join(endpoint.methods)
            message = f"{said}: the methods here are {allowed.decode()}"
            return error_reply(405, message, "method_not_allowed", headers=((b"allow", allowed),))
        return None

    def handle(self, request: Request, responder: Responder) -> Job | None:
        endpoint = self._by_path.get(request.target) or self._find(request.target)
        assert endpoint is not None, "else it was refused"
        return endpoint.methods[request.method](request, responder)

    def _find(self, target: bytes) -> Endpoint | None:
        endpoint = self._by_path.get(target)
        if endpoint is None:
            for prefix in self._prefixes:
                if target.startswith(prefix):
                    return self._by_path[prefix]
        return endpoint
