"""An engine that misbehaves on request, for what vLLM cannot be made to do, and a thread to serve it."""

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp


class FakeEngine:
    """Answers `max_tokens` tokens, one each `step_s`; the prompt may ask for a fault.

    If it `counts`, streams end with their number of tokens. Each event but the first has so many tokens, and
    says how many there were, unless it is one.
    """

    def __init__(
        self, name: str, step_s: float = 0.0, *, counts: bool = False, tokens_per_event: int = 1
    ) -> None:
        self.name = name
        self.step_s = step_s
        self.counts = counts
        self.tokens_per_event = tokens_per_event
        self.came_at: list[float] = []  # as `bodies`, by `time.monotonic`
        self.bodies: list[dict[str, Any]] = []
        self.num_running = 0
        self.num_cancelled = 0
        paths = ("/v1/completions", "/v1/chat/completions")
        routes = [Route(path, self._complete, methods=["POST"]) for path in paths]
        self.app = Starlette(routes=[*routes, Route("/health", self._health)])

    async def _health(self, request: Request) -> Response:
        return Response()

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.came_at.append(time.monotonic())
        if body.get("prompt") == "hang":
            await asyncio.sleep(3600)
        if body.get("prompt") == "refuse":
            error = {"message": "too long", "type": "BadRequestError", "param": None, "code": 400}
            return JSONResponse({"error": error}, 400)
        num_tokens = int(body.get("max_tokens", 4))
        if body.get("stream"):
            return StreamingResponse(
                self._events(num_tokens, str(body.get("prompt"))),
                media_type="text/event-stream",
            )
        await asyncio.sleep(self.step_s * num_tokens)
        choice = {"index": 0, "text": " a" * num_tokens, "finish_reason": "length"}
        return JSONResponse({"choices": [choice], "usage": {"completion_tokens": num_tokens}})

    async def _events(self, num_tokens: int, prompt: str) -> AsyncIterator[bytes]:
        self.num_running += 1
        try:
            for index in range(num_tokens):
                if index or prompt != "begin":
                    await asyncio.sleep(self.step_s)
                if prompt == "break" and index == num_tokens // 2:
                    raise ConnectionResetError("asked for")
                if index % self.tokens_per_event and index + 1 < num_tokens:
                    continue
                event: dict[str, Any] = {"choices": [{"index": 0, "text": f" {index}"}]}
                if self.tokens_per_event > 1:
                    event["usage"] = {"completion_tokens": index + 1}
                # As vLLM writes it: no space after a colon.
                yield b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"
            if self.counts:
                yield b'data: {"choices":[],"usage":{"completion_tokens":%d}}\n\n' % num_tokens
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_running -= 1


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """Its URL, while a thread serves it."""
    config = uvicorn.Config(app, port=0, log_level="critical", lifespan="auto")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


class EngineProcess:
    """A `FakeEngine` in a process of its own, which can be killed and come back at the same port."""

    def __init__(self, port: int, step_s: float = 0.0) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "tests.fake_engine", str(port), str(step_s)]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command)
        wait_for(self._accepts, 30.0)

    def kill(self) -> None:
        """As `kill -9`."""
        self._process.kill()
        self._process.wait()

    def _accepts(self) -> bool:
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", self.port)).close()
            return True
        return False


def wait_for(condition: Any, timeout_s: float = 10.0) -> None:
    """Return once `condition()` holds; fail if it never does."""
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, "it never came about"
        time.sleep(0.01)


Script = Callable[[socket.socket, int], None]


class RawEngine:
    """Reads whole requests off raw sockets and leaves the answer to a script, byte by byte.

    The script gets the socket and how many requests came before, and may do whatever a server must not.
    """

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[bytes] = []
        self.num_connections = 0
        self.num_left = 0  # connections that the router ended
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while request := read_message(connection):
                self.requests.append(request)
                self.script(connection, len(self.requests) - 1)
        self.num_left += 1


def read_message(connection: socket.socket) -> bytes:
    """One request or response with a `content-length`; nothing if the other side ended first."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (part := connection.recv(65_536)):
            return b""
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
    while length is not None and len(body) < int(length[1]):
        if not (part := connection.recv(65_536)):
            return b""
        body += part
    return head + b"\r\n\r\n" + body


def plain_answer(num_tokens: int = 1, text: str = " a") -> bytes:
    body = json.dumps({"choices": [{"text": text}], "usage": {"completion_tokens": num_tokens}}).encode()
    return (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    )


if __name__ == "__main__":
    uvicorn.run(FakeEngine("", float(sys.argv[2])).app, port=int(sys.argv[1]), log_level="critical")
