"""A real vLLM server that says it is well while nothing comes of its engine."""

import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from urllib.parse import urlsplit

import psutil
import pytest

from besteffort.policies import Static
from besteffort.router import Dispatcher
from tests.conftest import TinyEngines
from tests.fake_engine import wait_for
from tests.routing import limited, routing

pytestmark = pytest.mark.vllm

_LARGEST = "opt-90m"


def engine_core(url: str) -> list[psutil.Process]:
    """All that vLLM's API server there has started."""
    words = ("-m", "vllm.entrypoints.openai.api_server", "--port", str(urlsplit(url).port))
    for process in psutil.Process().children(recursive=True):
        command = process.cmdline()
        if set(words) <= set(command) and "besteffort.engines.tether" not in command:
            return process.children(recursive=True)
    raise AssertionError("no server of ours listens there")


def ask(url: str, model: str) -> tuple[int, str | None]:
    """The status, and which model answered."""
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)) as client:
        body = {"model": model, "prompt": "x", "max_tokens": 2}
        client.request("POST", "/v1/completions", json.dumps(body))
        response = client.getresponse()
        response.read()
        return response.status, response.headers["x-besteffort-model"]


def breaker(url: str) -> str:
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)) as client:
        client.request("GET", "/health")
        (state,) = json.loads(client.getresponse().read())["breakers"][_LARGEST]
        return str(state)


def test_an_engine_core_that_hangs_is_out_until_it_makes_a_token_though_its_server_says_it_is_well(
    tiny_engines: TinyEngines,
) -> None:
    core = engine_core(tiny_engines.urls[_LARGEST][0])
    assert core
    dispatcher = Dispatcher(tiny_engines.fleet, Static(2, f"static:{_LARGEST}"), tiny_engines.engines)
    limits = limited(first_byte_s=5.0, token_s=5.0, probe_wait_s=0.1, max_probe_wait_s=0.2)
    with routing(dispatcher, limits) as url, ExitStack() as stack, ThreadPoolExecutor(3) as clients:
        assert ask(url, "besteffort") == (200, _LARGEST)
        for process in core:
            process.suspend()
            stack.callback(process.resume)
        assert {status for status, _ in clients.map(ask, [url] * 3, [_LARGEST] * 3)} == {504}
        wait_for(lambda: breaker(url) != "closed", 60.0)
        assert ask(url, _LARGEST) == (503, None)
        assert ask(url, "besteffort") == (200, "opt-22m")
        stack.close()
        wait_for(lambda: breaker(url) == "closed", 60.0)
        assert ask(url, "besteffort") == (200, _LARGEST)
