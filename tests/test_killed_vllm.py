"""A real vLLM server that is killed while it works, beside one that goes on."""

import http.client
import importlib.util
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from tests.conftest import ROOT
from tests.fake_engine import wait_for
from tests.test_serve import serving

pytestmark = pytest.mark.vllm

_PATIENCE_S = 300.0  # with a machine that does much else


@dataclass
class Answer:
    """`status` is there as soon as the answer's head is."""

    status: int = 0
    replica: str | None = None
    begun: threading.Event = field(default_factory=threading.Event)  # a token has come
    last: str = ""  # a stream's last event

    @property
    def end(self) -> str:
        """`whole`, or the code of the error that a stream ended with."""
        return "whole" if self.last in ("", "[DONE]") else json.loads(self.last)["error"]["code"]


@dataclass
class Router:
    url: str

    def ask(self, answer: Answer | None = None, **body: object) -> Answer:
        answer = answer or Answer()
        with closing(http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=_PATIENCE_S)) as client:
            wanted = {"model": "besteffort", "prompt": "x", "ignore_eos": True, **body}
            client.request("POST", "/v1/completions", json.dumps(wanted))
            with client.getresponse() as response:
                answer.status, answer.replica = response.status, response.headers["x-besteffort-replica"]
                for line in response:
                    if line.startswith(b"data: "):
                        answer.begun.set()
                        answer.last = line.removeprefix(b"data: ").decode().strip()
        return answer

    def get(self, path: str) -> str:
        with closing(http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=_PATIENCE_S)) as client:
            client.request("GET", path)
            return client.getresponse().read().decode()

    def metric(self, name: str) -> float:
        """Of the first replica."""
        lines = self.get("/metrics").splitlines()
        told = [line for line in lines if line.startswith(f"besteffort_{name}{{") and 'replica="0"' in line]
        return sum(float(line.rpartition(" ")[2]) for line in told)

    @property
    def breakers(self) -> list[str]:
        return list(json.loads(self.get("/health"))["breakers"]["opt-22m"])


@pytest.fixture
def fleet_dir(tmp_path: Path) -> Path:
    """The second of the shipped models, twice, each with four seats, so that requests wait in its server."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: run `make setup`")
    shipped = (ROOT / "artifacts" / "tiny-opt-cpu" / "fleet.toml").read_text()
    top, _, model, _ = shipped.split("[[models]]")
    model = model.replace("max_num_seqs = 32", "max_num_seqs = 4\nreplicas = 2")
    task = shipped.partition("[[tasks]]")
    (tmp_path / "fleet.toml").write_text(f"{top}[[models]]{model}{''.join(task[1:])}")
    return tmp_path


def server_of(router_pid: int, replica: int) -> list[psutil.Process]:
    """vLLM's API server and all that it started; its tether is not among them."""
    tether = psutil.Process(router_pid).children()[replica]
    return tether.children(recursive=True)


def asked_under_way(clients: ThreadPoolExecutor, router: Router) -> Iterator[tuple[Answer, "Future[Answer]"]]:
    """Two streams at each replica, of which tokens have come."""
    for _ in range(4):
        answer = Answer()
        asked = clients.submit(router.ask, answer, stream=True, max_tokens=480)
        assert answer.begun.wait(_PATIENCE_S)
        yield answer, asked


def test_a_vllm_server_that_is_killed_under_load_costs_only_the_streams_it_had_begun_and_comes_back(
    fleet_dir: Path,
) -> None:
    with serving(fleet_dir) as (process, url, _), ExitStack() as stack:
        router = Router(url)
        clients = stack.enter_context(ThreadPoolExecutor(40))
        begun = list(asked_under_way(clients, router))
        plain = [clients.submit(router.ask, max_tokens=100) for _ in range(20)]
        late = [Answer() for _ in range(10)]
        streams = [clients.submit(router.ask, one, stream=True, max_tokens=20) for one in late]
        wait_for(lambda: router.metric("in_flight") >= 12)
        server = server_of(process.pid, 0)
        assert len(server) >= 1
        for one in server:
            one.kill()

        answers = [one.result() for one in plain]
        assert [answer.status for answer in answers] == [200] * 20
        ends = {(answer.replica, asked.result().end) for answer, asked in begun}
        assert ends == {("0", "engine_failed"), ("1", "whole")}
        assert [one.result().status for one in streams] == [200] * 10
        assert {(one.replica, one.end) for one in late} <= {*ends, ("0", "whole")}
        assert router.metric("retries_total") >= 3
        assert router.metric("breaker_openings_total") == 1
        assert router.breakers in (["open", "closed"], ["half-open", "closed"])
        assert process.stderr is not None
        assert "died with exit status -9 and is started again" in process.stderr.readline()

        give_up_at = time.monotonic() + _PATIENCE_S
        while (answer := router.ask(max_tokens=2)).replica != "0":
            assert answer.status == 200, "one was sent to a server that is not back"
            assert time.monotonic() < give_up_at
        assert answer.status == 200
        assert router.breakers == ["closed", "closed"]
        assert router.metric("probes_total") >= 1
        assert router.metric("in_flight") == 0
