"""One request's way: read, routed, sent to its engine, and the answer's bytes passed on as they come."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from besteffort.router.addressing import (
    TASK_HEADER,
    Address,
    UnknownAddressError,
    read_address,
)
from besteffort.router.dispatcher import Dispatcher, Route
from besteffort.router.metrics import Metrics
from besteffort.router.openai_errors import error_event, error_response
from besteffort.router.token_count import TokenCount

CONNECT_TIMEOUT_S = 10.0
# Headers that speak of one connection and not of the answer (RFC 9110, Sec. 7.6.1), and those that
# the server in front writes itself.
_NOT_PASSED_ON = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer "
    b"transfer-encoding upgrade content-length server date".split()
)


class Upstream:
    """The connections to the engines, open while the application runs."""

    session: aiohttp.ClientSession

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
        # No limit in all: how long an answer may take is the client's to say.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False
        ) as self.session:
            yield


class Completions:
    """An ASGI endpoint for one of OpenAI's paths."""

    def __init__(self, path: str, dispatcher: Dispatcher, metrics: Metrics, upstream: Upstream) -> None:
        self._path = path
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._upstream = upstream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            body = json.loads(await request.body())
            address = read_address(
                self._dispatcher.fleet, request.headers.get(TASK_HEADER), body.get("model")
            )
        except ClientDisconnect:
            return
        except (ValueError, AttributeError, RecursionError):
            refusal = error_response(400, "The body is not a JSON object", "invalid_json")
            await refusal(scope, receive, send)
        except UnknownAddressError as error:
            refusal = error_response(404, str(error), "model_not_found", error.param)
            await refusal(scope, receive, send)
        else:
            await self._route(address, body, scope, receive, send)

    async def _route(
        self, address: Address, body: dict[str, Any], scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Pass the answer on until it ends or the client goes away, which ends it upstream too."""
        with self._dispatcher.route(address.task, address.pinned) as route:
            answer = _Answer(self._dispatcher, route, self._path, body)
            passing = asyncio.create_task(answer.pass_on(self._upstream.session, scope, receive, send))
            leaving = asyncio.create_task(_client_gone(receive))
            try:
                await asyncio.wait({passing, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not passing.done():
                    answer.outcome = "cancelled"
            except asyncio.CancelledError:  # the server stops, and has waited long enough
                answer.outcome = "cancelled"
            finally:
                passing.cancel()
                leaving.cancel()
                await asyncio.gather(passing, leaving, return_exceptions=True)
        self._metrics.ended(route, answer.outcome)
        if answer.outcome == "ok" and answer.num_tokens:
            self._metrics.answered(route, answer.first_byte_at, answer.last_byte_at, answer.num_tokens)
        if not passing.cancelled() and (fault := passing.exception()):
            raise fault


async def _client_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Answer:
    """An engine's answer on its way to the client, and what became of it."""

    def __init__(self, dispatcher: Dispatcher, route: Route, path: str, body: dict[str, Any]) -> None:
        self._dispatcher = dispatcher
        self._route = route
        self._url = f"{route.engine.url}{path}"
        self._body = json.dumps({**body, "model": route.engine.served_name}).encode()
        self._tokens = TokenCount(stream=bool(body.get("stream")), chat="chat" in path)
        self._begun = False
        self._stream = bool(body.get("stream"))
        self.outcome = "failed"
        self.first_byte_at = self.last_byte_at = route.arrived_at

    @property
    def num_tokens(self) -> int:
        return self._tokens.total

    async def pass_on(
        self, session: aiohttp.ClientSession, scope: Scope, receive: Receive, send: Send
    ) -> None:
        # What the client did not ask to be compressed is not, and its tokens can be counted.
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        try:
            async with session.post(self._url, data=self._body, headers=headers) as response:
                await self._pass_on(response, send)
        except (aiohttp.ClientError, OSError) as error:
            await self._fail(error, scope, receive, send)

    async def _pass_on(self, response: aiohttp.ClientResponse, send: Send) -> None:
        headers = [*_passed_on(response), *self._receipt()]
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        self._begun = True
        clock = self._dispatcher.clock
        async for chunk in response.content.iter_any():
            self.last_byte_at = clock()
            if self.first_byte_at == self._route.arrived_at:
                self.first_byte_at = self.last_byte_at
            self._tokens.feed(chunk)
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        self.outcome = "ok" if response.status < 400 else "refused"
        await send({"type": "http.response.body", "body": b""})

    async def _fail(self, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        fleet = self._dispatcher.fleet
        name = f"{fleet.model_names[self._route.model]}, replica {self._route.replica}"
        message = f"The engine of {name} failed: {type(error).__name__}"
        if not self._begun:
            await error_response(502, message, "engine_failed")(scope, receive, send)
        elif self._stream:
            event = error_event(message, "engine_failed")
            await send({"type": "http.response.body", "body": event})
        else:
            raise ConnectionError(message)  # half an answer: the server breaks the connection off

    def _receipt(self) -> list[tuple[bytes, bytes]]:
        fleet = self._dispatcher.fleet
        facts = {
            "model": fleet.model_names[self._route.model],
            "replica": str(self._route.replica),
            "task": fleet.task_names[self._route.task],
            "policy": "pinned" if self._route.pinned else self._dispatcher.policy.name,
        }
        return [(f"x-besteffort-{key}".encode(), value.encode()) for key, value in facts.items()]


def _passed_on(response: aiohttp.ClientResponse) -> list[tuple[bytes, bytes]]:
    return [(key, value) for key, value in response.raw_headers if key.lower() not in _NOT_PASSED_ON]
