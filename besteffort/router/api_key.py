"""Who may use the router."""

import hmac

from besteffort.router.message import Reply, Request
from besteffort.router.openai_errors import error_reply

_SCHEME = b"bearer "


class ApiKey:
    """The one key that clients must show as `Authorization: Bearer KEY`."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    def refuse(self, request: Request) -> Reply | None:
        """How long this takes does not depend on how much of a wrong key is right."""
        given = request.headers.get(b"authorization", b"")
        scheme, key = given[: len(_SCHEME)], given[len(_SCHEME) :]
        if scheme.lower() == _SCHEME and hmac.compare_digest(key.strip(), self._key):
            return None
        challenge = ((b"www-authenticate", b"Bearer"),)
        return error_reply(401, "The API key is missing or wrong", "invalid_api_key", headers=challenge)

    def __repr__(self) -> str:
        return "ApiKey(...)"
