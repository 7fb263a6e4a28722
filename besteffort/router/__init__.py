"""The data plane: an OpenAI-compatible server that routes each request by a policy."""

from besteffort.router.app import build_app
from besteffort.router.dispatcher import Dispatcher

__all__ = ["Dispatcher", "build_app"]
