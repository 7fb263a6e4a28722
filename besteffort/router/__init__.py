"""The data plane: an OpenAI-compatible server that routes each request by a policy."""

from besteffort.router.api_key import ApiKey
from besteffort.router.dispatcher import Dispatcher
from besteffort.router.limits import Limits
from besteffort.router.running import Settings, run_router, running_router

__all__ = ["ApiKey", "Dispatcher", "Limits", "Settings", "run_router", "running_router"]
