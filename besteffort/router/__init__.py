"""The data plane: an OpenAI-compatible server that routes each request by a policy."""

from besteffort.router.api_key import ApiKey
from besteffort.router.decision_log import DecisionLog
from besteffort.router.dispatcher import Dispatcher
from besteffort.router.forecast import Forecast
from besteffort.router.hang_up import HangUp
from besteffort.router.limits import Limits
from besteffort.router.policy_source import PolicySource
from besteffort.router.running import run_router, running_router
from besteffort.router.settings import Settings
from besteffort.router.waiting_room import waiting_room

__all__ = [
    "ApiKey",
    "DecisionLog",
    "Dispatcher",
    "Forecast",
    "HangUp",
    "Limits",
    "PolicySource",
    "Settings",
    "run_router",
    "running_router",
    "waiting_room",
]
