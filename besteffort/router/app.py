"""The router's endpoints, put together: what the server serves."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote

import numpy as np

from besteffort.router.addressing import model_ids
from besteffort.router.api_key import ApiKey
from besteffort.router.dispatcher import Dispatcher
from besteffort.router.health import Health
from besteffort.router.limits import Limits
from besteffort.router.message import Job, Reply, Request, Responder
from besteffort.router.metrics import Metrics
from besteffort.router.openai_errors import error_reply
from besteffort.router.proxy import Proxy
from besteffort.router.upstream import Upstream
from besteffort.router.watch import Watch

_EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"
_GET = (b"GET", b"HEAD")
_POST = (b"POST",)
_MODEL_PREFIX = b"/v1/models/"


@dataclass(frozen=True, slots=True)
class Endpoint:
    methods: tuple[bytes, ...]
    handle: Callable[[Request, Responder], Job | None]
    is_open: bool = False  # whoever has no key may see it too


class App:
    """Handles every request that the server could read; made inside the running event loop."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        limits: Limits,
        watch: Watch,
        *,
        api_key: ApiKey | None = None,
        protect_metrics: bool = False,
        forward_authorization: bool = False,
        rng: np.random.Generator | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        engines = {engine for of_model in dispatcher.engines for engine in of_model}
        self.upstreams = {engine: Upstream(engine.url, limits, watch, loop) for engine in engines}
        self.health = Health(dispatcher, self.upstreams, rng or np.random.default_rng())
        self.metrics = Metrics(dispatcher, self.health)
        self.proxy = Proxy(
            dispatcher,
            self.upstreams,
            self.health,
            self.metrics,
            limits,
            forward_authorization=forward_authorization,
        )
        self._dispatcher = dispatcher
        self._api_key = api_key
        began_at = int(time.time())  # s since the epoch, which OpenAI's schema wants of each model
        about = {"object": "model", "created": began_at, "owned_by": "besteffort"}
        self._models = {name: {"id": name, **about} for name in model_ids(dispatcher.fleet)}
        completions = Endpoint(_POST, self.proxy.handle)
        self._endpoints = {
            b"/v1/completions": completions,
            b"/v1/chat/completions": completions,
            b"/v1/models": Endpoint(_GET, self._list_models),
            b"/health": Endpoint(_GET, self._say_health, is_open=True),
            b"/metrics": Endpoint(_GET, self._show_metrics, is_open=not protect_metrics),
        }
        self._model = Endpoint(_GET, self._show_model)

    def refuse(self, request: Request) -> Reply | None:
        """A wrong key, path or method, told from the head alone."""
        endpoint = self._find(request.target)
        if self._api_key is not None and (endpoint is None or not endpoint.is_open):
            refusal = self._api_key.refuse(request)
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
        endpoint = self._find(request.target)
        assert endpoint is not None, "else it was refused"
        return endpoint.handle(request, responder)

    def close(self) -> None:
        self.health.close()
        for upstream in self.upstreams.values():
            upstream.close()

    def _find(self, target: bytes) -> Endpoint | None:
        endpoint = self._endpoints.get(target)
        if endpoint is None and target.startswith(_MODEL_PREFIX):
            return self._model
        return endpoint

    def _list_models(self, request: Request, responder: Responder) -> None:
        responder.reply(_json({"object": "list", "data": list(self._models.values())}))

    def _show_model(self, request: Request, responder: Responder) -> None:
        name = unquote(request.target.removeprefix(_MODEL_PREFIX).decode())
        entry = self._models.get(name)
        if entry is None:
            message = f"The model {name!r} does not exist; give one of {', '.join(self._models)}"
            responder.reply(error_reply(404, message, "model_not_found", "model"))
        else:
            responder.reply(_json(entry))

    def _say_health(self, request: Request, responder: Responder) -> None:
        fleet = self._dispatcher.fleet
        names = {"fleet": fleet.name, "models": fleet.model_names, "tasks": fleet.task_names}
        about = {"policy": self._dispatcher.policy.name, **names, "breakers": self.health.states}
        status = self.health.status
        responder.reply(_json({"status": status, **about}, 503 if status == "down" else 200))

    def _show_metrics(self, request: Request, responder: Responder) -> None:
        responder.reply(Reply(200, self.metrics.render(), _EXPOSITION))


def _json(value: object, status: int = 200) -> Reply:
    return Reply(status, json.dumps(value).encode())
