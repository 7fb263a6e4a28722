"""The same router with uvicorn facing the clients, to see what the server in front costs.

python -m tests.benchmarks.behind_uvicorn PORT ENGINE_URL...
"""

import asyncio
import contextlib
import sys
from collections.abc import Sequence
from typing import Any

import uvicorn

from besteffort.engines.running import Engine
from besteffort.router.app import App
from besteffort.router.dispatcher import Dispatcher
from besteffort.router.endpoints import Endpoints
from besteffort.router.message import Reply, Request
from besteffort.router.settings import Settings
from besteffort.router.watch import Watch
from tests.benchmarks.router import FLEET_DIR, POLICY, load


class _Responder:
    """The answer of one request, as messages for `send`."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._body: list[bytes] = []

    def reply(self, reply: Reply) -> None:
        headers = [*reply.headers, (b"content-length", b"%d" % len(reply.body))]
        self.messages.put_nowait({"type": "http.response.start", "status": reply.status, "headers": headers})
        self.messages.put_nowait({"type": "http.response.body", "body": reply.body})
        self.messages.put_nowait(None)

    def answer(self, head: Sequence[bytes], body: bytes) -> None:
        self.begin(int(b"".join(head).split(b" ", 2)[1]), head, len(body))
        self.write(body)
        self.end()

    def begin(self, status: int, head: Sequence[bytes], length: int | None) -> None:
        _, *lines = b"".join(head).split(b"\r\n")[:-1]  # uvicorn writes that of the status itself
        pairs = [tuple(line.split(b": ", 1)) for line in lines]
        if length is not None:
            pairs.append((b"content-length", b"%d" % length))
        self.messages.put_nowait({"type": "http.response.start", "status": status, "headers": pairs})

    def write(self, data: bytes) -> None:
        self._body.append(data)

    def flush(self) -> None:
        if self._body:
            body, self._body = b"".join(self._body), []
            self.messages.put_nowait({"type": "http.response.body", "body": body, "more_body": True})

    def end(self) -> None:
        body = b"".join(self._body)
        self.messages.put_nowait({"type": "http.response.body", "body": body})
        self.messages.put_nowait(None)

    def break_off(self) -> None:
        self.messages.put_nowait(None)


class Asgi:
    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._app: Endpoints | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._app is None:
            self._app = App(self._dispatcher, Settings(), Watch(asyncio.get_running_loop())).public
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        request = Request(
            scope["method"].encode(), scope["raw_path"], dict(scope["headers"]), http_1_1=True, body=body
        )
        responder = _Responder()
        refusal = self._app.refuse(request)
        if refusal is not None:
            responder.reply(refusal)
        else:
            self._app.handle(request, responder)
        while (answer := await responder.messages.get()) is not None:
            await send(answer)


def main(port: int, urls: list[str]) -> None:
    fleet, policy = load(FLEET_DIR, POLICY)
    engines = tuple(
        (Engine(url, "mock"),) * model.replicas for model, url in zip(fleet.models, urls, strict=True)
    )
    config = uvicorn.Config(
        Asgi(Dispatcher(fleet, policy, engines)),
        port=port,
        log_level="warning",
        access_log=False,
        http="httptools",
        loop="uvloop",
        lifespan="off",
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
