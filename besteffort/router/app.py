"""The router's endpoints, put together as one ASGI application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as Endpoint

from besteffort.router.addressing import model_ids
from besteffort.router.dispatcher import Dispatcher
from besteffort.router.metrics import Metrics
from besteffort.router.proxy import Completions, Upstream


def build_app(dispatcher: Dispatcher) -> Starlette:
    """An ASGI application over a dispatcher and its engines."""
    metrics = Metrics(dispatcher)
    upstream = Upstream()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with upstream.opened():
            yield

    async def models(request: Request) -> Response:
        ids = model_ids(dispatcher.fleet)
        entries = [{"id": name, "object": "model", "owned_by": "besteffort"} for name in ids]
        return JSONResponse({"object": "list", "data": entries})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "policy": dispatcher.policy.name})

    async def exposition(request: Request) -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    completions = [
        Endpoint(path, Completions(path, dispatcher, metrics, upstream), methods=["POST"])
        for path in ("/v1/completions", "/v1/chat/completions")
    ]
    plain = [
        Endpoint("/v1/models", models),
        Endpoint("/health", health),
        Endpoint("/metrics", exposition),
    ]
    return Starlette(routes=[*completions, *plain], lifespan=lifespan)
