"""The router's endpoints, put together: what the server serves."""

import asyncio
import json
import time
from importlib import resources
from urllib.parse import unquote

import numpy as np

from besteffort.router.addressing import model_ids
from besteffort.router.admin import Admin
from besteffort.router.api_key import ApiKey
from besteffort.router.decision_log import DecisionLog
from besteffort.router.dispatcher import Dispatcher
from besteffort.router.endpoints import Endpoint, Endpoints, get
from besteffort.router.health import Health
from besteffort.router.message import Reply, Request, Responder
from besteffort.router.metrics import Metrics
from besteffort.router.openai_errors import error_reply
from besteffort.router.outbox import Outbox
from besteffort.router.proxy import Proxy
from besteffort.router.reload import Reload
from besteffort.router.seats import Seats
from besteffort.router.settings import Settings
from besteffort.router.upstream import Upstream
from besteffort.router.watch import Watch

_EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"
_MODELS = b"/v1/models/"


class App:
    """All that is served, in `public` and, where administration has a port of its own, in `inner`.

    Made inside the running event loop.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        settings: Settings,
        watch: Watch,
        *,
        reload: Reload | None = None,
        admin_apart: bool = False,
        decision_log: DecisionLog | None = None,
        rng: np.random.Generator | None = None,
    ) -> None:
        loop, limits = asyncio.get_running_loop(), settings.limits
        engines = {engine for of_model in dispatcher.engines for engine in of_model}
        outbox = Outbox(loop)
        self.upstreams = {engine: Upstream(engine.url, limits, watch, loop, outbox) for engine in engines}
        self.health = Health(dispatcher, self.upstreams, rng or np.random.default_rng())
        self.metrics = Metrics(dispatcher, self.health)
        self.proxy = Proxy(
            dispatcher,
            self.upstreams,
            self.health,
            self.metrics,
            limits,
            forward_authorization=settings.forward_authorization,
            decision_log=decision_log,
        )
        self._dispatcher = dispatcher
        began_at = int(time.time())  # s since the epoch, which OpenAI's schema wants of each model
        about = {"object": "model", "created": began_at, "owned_by": "besteffort"}
        self._models = {name: {"id": name, **about} for name in model_ids(dispatcher.fleet)}
        dispatcher.keeps_decisions = decision_log is not None
        dispatcher.seats = Seats(limits.max_in_flight, len(dispatcher.engines))
        for collector in (reload, decision_log):
            if collector is not None:
                self.metrics.add(collector)
        api = Reply(200, resources.files("besteffort.router").joinpath("openapi.json").read_bytes())
        health = {
            b"/health": get(self._say_health),
            b"/openapi.json": get(lambda request, responder: responder.reply(api)),
        }
        for_clients = health | self._for_clients(settings.api_key)
        for_us = health | self._for_us(settings, reload)
        self.inner = Endpoints(for_us, settings.admin_key) if admin_apart else None
        self.public = Endpoints(for_clients if admin_apart else for_us | for_clients, settings.api_key)

    def _for_clients(self, key: ApiKey | None) -> dict[bytes, Endpoint]:
        completions = Endpoint({b"POST": self.proxy.handle}, key)
        return {
            b"/v1/completions": completions,
            b"/v1/chat/completions": completions,
            b"/v1/models": get(self._list_models, key),
            _MODELS: get(self._show_model, key),
        }

    def _for_us(self, settings: Settings, reload: Reload | None) -> dict[bytes, Endpoint]:
        metrics_key = settings.api_key if settings.protect_metrics else None
        endpoints = {b"/metrics": get(self._show_metrics, metrics_key)}
        if reload is not None and settings.admin_key is not None:
            admin = Admin(self._dispatcher, reload)
            methods = {**get(admin.show_policy).methods, b"POST": admin.load_policy}
            endpoints[b"/admin/policy"] = Endpoint(methods, settings.admin_key)
        return endpoints

    def close(self) -> None:
        self.health.close()
        for upstream in self.upstreams.values():
            upstream.close()

    def _list_models(self, request: Request, responder: Responder) -> None:
        responder.reply(_json({"object": "list", "data": list(self._models.values())}))

    def _show_model(self, request: Request, responder: Responder) -> None:
        name = unquote(request.target.removeprefix(_MODELS).decode())
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
