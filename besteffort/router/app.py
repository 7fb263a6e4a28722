"""The router's endpoints, put together as one ASGI application."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as Endpoint

from besteffort.router.addressing import model_ids
from besteffort.router.dispatcher import Dispatcher
from besteffort.router.metrics import Metrics
from besteffort.router.openai_errors import error_response
from besteffort.router.proxy import Completions, Upstream


def build_app(dispatcher: Dispatcher) -> Starlette:
    """An ASGI application over a dispatcher and its engines."""
    metrics = Metrics(dispatcher)
    upstream = Upstream()
    began_at = int(time.time())  # s since the epoch, which OpenAI's schema wants of each model

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with upstream.opened():
            yield

    async def models(request: Request) -> Response:
        ids = model_ids(dispatcher.fleet)
        about = {"object": "model", "created": began_at, "owned_by": "besteffort"}
        entries = [{"id": name, **about} for name in ids]
        return JSONResponse({"object": "list", "data": entries})

    async def health(request: Request) -> Response:
        fleet = dispatcher.fleet
        names = {"fleet": fleet.name, "models": fleet.model_names, "tasks": fleet.task_names}
        return JSONResponse({"status": "ok", "policy": dispatcher.policy.name, **names})

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
    return Starlette(
        routes=[*completions, *plain],
        lifespan=lifespan,
        exception_handlers={HTTPException: _refuse, Exception: _own_fault},
    )


async def _refuse(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods, in OpenAI's schema like everything else."""
    assert isinstance(error, HTTPException), "registered for no other"
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = "not_found" if error.status_code == 404 else "method_not_allowed"
    response = error_response(error.status_code, message, code)
    response.headers.update(error.headers or {})
    return response


async def _own_fault(request: Request, error: Exception) -> Response:
    return error_response(500, "The router failed; its log says how", "internal_error")
