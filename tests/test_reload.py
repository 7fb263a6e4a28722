"""Another policy in charge while requests come: who may ask for it, which may be had, what can go wrong."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from besteffort.artifacts.policy_file import TrainedPolicy, load_policy, save_policy
from besteffort.engines.running import Engine
from besteffort.errors import PolicyError
from besteffort.fleet import Fleet
from besteffort.observation import Encoding
from besteffort.policies import BUILT_IN, Policy, RoundRobin, load_named_policy
from besteffort.q_network import QNetwork
from besteffort.router import ApiKey, Dispatcher, PolicySource, Settings
from tests.fake_engine import RawEngine, plain_answer, wait_for
from tests.routing import routing

KEYS = Settings(api_key=ApiKey("client"), admin_key=ApiKey("admin"))
GIVEN = "/etc/besteffort/given.safetensors"


def save_preferring(path: Path, fleet: Fleet, model: int) -> None:
    """A policy that always takes one model."""
    encoding = Encoding(len(fleet.tasks), len(fleet.models), 8.0, 10.0)
    weight = np.zeros((encoding.size, len(fleet.models)), dtype=np.float32)
    bias = np.eye(len(fleet.models), dtype=np.float32)[model]
    save_policy(path, TrainedPolicy(QNetwork((weight,), (bias,)), encoding, {}), fleet)


def ask(url: str, method: str, path: str, body: Any = None, key: str = "admin") -> tuple[int, Any]:
    connection = HTTPConnection(urlsplit(url).netloc, timeout=20)
    data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    connection.request(method, path, data, {"authorization": f"Bearer {key}"})
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    is_json = response.getheader("content-type") == "application/json"
    return response.status, json.loads(answer) if is_json and answer else answer.decode()


class Router:
    """In front of an engine that answers at once; its fleet's folder holds `small` and `large`."""

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        for model, name in enumerate(fleet.model_names):
            save_preferring(folder / f"{name}.safetensors", fleet, model)
        self.fleet = fleet
        self.folder = folder
        self.said: list[str] = []
        self.loading: Callable[[], None] = lambda: None
        self.url = self.admin_url = ""

    @contextmanager
    def running(self, settings: Settings = KEYS, *, apart: bool = False) -> Iterator["Router"]:
        engine = RawEngine(lambda connection, number: connection.sendall(plain_answer()))
        replica = Engine(engine.url, "served")
        dispatcher = Dispatcher(self.fleet, RoundRobin(), ((replica, replica), (replica,)))
        source = PolicySource("round-robin", self.folder, self._load)
        listener = socket.create_server(("127.0.0.1", 0)) if apart else None
        with routing(
            dispatcher, settings, admin_listener=listener, source=source, say=self.said.append
        ) as self.url:
            self.admin_url = f"http://127.0.0.1:{listener.getsockname()[1]}" if listener else self.url
            yield self
        engine.close()

    def _load(self, name: str) -> Policy:
        self.loading()
        nowhere, rng = Path("/nowhere"), np.random.default_rng(0)
        return load_named_policy(name, self.fleet, profile=nowhere, rewards=nowhere, rng=rng)

    def put_in_charge(self, name: str) -> tuple[int, Any]:
        return ask(self.admin_url, "POST", "/admin/policy", {"policy": name})

    def model_of_next(self) -> str:
        connection = HTTPConnection(urlsplit(self.url).netloc, timeout=20)
        connection.request("POST", "/v1/completions", b"{}", {"authorization": "Bearer client"})
        response = connection.getresponse()
        response.read()
        connection.close()
        assert response.status == 200
        return str(response.getheader("x-besteffort-model"))


@pytest.fixture
def router(fleet: Fleet, tmp_path: Path) -> Router:
    return Router(fleet, tmp_path)


def test_a_policy_that_is_posted_decides_from_the_next_request_on(router: Router) -> None:
    with router.running():
        assert ask(router.url, "GET", "/admin/policy")[1]["policy"] == "round-robin"
        for name in ("large", "small", "large"):
            status, about = router.put_in_charge(f"{name}.safetensors")
            assert (status, about["policy"], about["given"]) == (
                200,
                f"trained:{name}",
                f"{name}.safetensors",
            )
            assert [router.model_of_next() for _ in range(3)] == [name] * 3
            assert ask(router.url, "GET", "/admin/policy") == (200, about)
        assert router.put_in_charge("round-robin")[1]["policy"] == "round-robin"
        assert {router.model_of_next() for _ in range(2)} == {"small", "large"}
        assert 'besteffort_policy_loads_total{outcome="ok"} 4.0' in ask(router.url, "GET", "/metrics")[1]
    assert router.said[0] == "trained:large is in charge, after round-robin"


def test_a_file_that_is_written_anew_is_read_anew(router: Router) -> None:
    with router.running():
        router.put_in_charge("large.safetensors")
        save_preferring(router.folder / "large.safetensors", router.fleet, 0)
        assert router.model_of_next() == "large"
        router.put_in_charge("large.safetensors")
        assert router.model_of_next() == "small"


@pytest.mark.parametrize(
    ("name", "saying"),
    [
        ("cut.safetensors", "not a safetensors file"),
        ("nowhere.safetensors", "no such file"),
        ("static:huge", "has no model 'huge'"),
        ("hindsight", "needs to know the future"),
        ("greedy", "profile.parquet"),
        ("", "give the one of the start"),
        ("fleet.toml", "give the one of the start"),
        ("../large.safetensors", "give the one of the start"),
        ("/etc/passwd", "give the one of the start"),
        ("out.safetensors", "give the one of the start"),
    ],
)
def test_what_cannot_be_had_is_told_and_leaves_the_old_policy_in_charge(
    router: Router, tmp_path_factory: pytest.TempPathFactory, name: str, saying: str
) -> None:
    whole = (router.folder / "large.safetensors").read_bytes()
    (router.folder / "cut.safetensors").write_bytes(whole[:-8])
    outside = tmp_path_factory.mktemp("outside") / "large.safetensors"
    outside.write_bytes(whole)
    (router.folder / "out.safetensors").symlink_to(outside)
    with router.running():
        router.put_in_charge("small.safetensors")
        before = ask(router.url, "GET", "/admin/policy")
        status, answer = router.put_in_charge(name)
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (
            400,
            "invalid_policy",
            "policy",
        )
        assert saying.replace("profile.parquet", "/nowhere") in answer["error"]["message"]
        assert "\n" not in answer["error"]["message"]
        assert ask(router.url, "GET", "/admin/policy") == before
        assert router.model_of_next() == "small"
    assert router.said[-1] == f"warning: trained:small stays in charge: {answer['error']['message']}"


def test_a_load_that_fails_unforeseen_leaves_the_old_policy_in_charge(
    router: Router, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("unforeseen")

    router.loading = fail
    with router.running():
        status, answer = router.put_in_charge("large.safetensors")
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert {router.model_of_next() for _ in range(2)} == {"small", "large"}
        assert 'besteffort_policy_loads_total{outcome="failed"} 1.0' in ask(router.url, "GET", "/metrics")[1]
    assert "unforeseen" in caplog.text


def test_requests_are_answered_while_a_policy_loads_and_loads_take_turns(router: Router) -> None:
    go, begun = threading.Event(), threading.Semaphore(0)

    def wait() -> None:
        begun.release()
        assert go.wait(20)

    router.loading = wait
    answers: list[tuple[int, Any]] = []

    def post(name: str) -> None:
        answers.append(router.put_in_charge(name))

    with router.running():
        threads = [
            threading.Thread(target=post, args=(f"{name}.safetensors",)) for name in ("small", "large")
        ]
        threads[0].start()
        assert begun.acquire(timeout=20)
        threads[1].start()
        assert {router.model_of_next() for _ in range(2)} == {"small", "large"}
        go.set()
        for thread in threads:
            thread.join(20)
        assert [status for status, _ in answers] == [200, 200]
        assert router.model_of_next() == "large"


def test_a_client_that_does_not_wait_for_its_load_gets_it_all_the_same(router: Router) -> None:
    go, begun = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert go.wait(20)

    router.loading = wait
    with router.running():
        connection = HTTPConnection(urlsplit(router.url).netloc, timeout=20)
        headers = {"authorization": "Bearer admin"}
        connection.request("POST", "/admin/policy", b'{"policy":"large.safetensors"}', headers)
        assert begun.wait(20)
        connection.close()
        go.set()
        wait_for(lambda: ask(router.url, "GET", "/admin/policy")[1]["policy"] == "trained:large")


def test_no_request_fails_while_policies_change(router: Router) -> None:
    with router.running():
        models: list[str] = []
        stop = threading.Event()

        def load() -> None:
            while not stop.is_set():
                models.append(router.model_of_next())

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            for name in ("small.safetensors", "large.safetensors", "random", "nowhere.safetensors"):
                router.put_in_charge(name)
        stop.set()
        for thread in threads:
            thread.join(20)
    assert {"small", "large"} == set(models)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"policy":1}', b"{}", b'{"policy":"a","b":1}', b'{"policy":"\xff"}', b"[" * 5000],
)
def test_a_body_that_names_no_policy_is_refused(router: Router, body: bytes) -> None:
    with router.running():
        status, answer = ask(router.url, "POST", "/admin/policy", body)
        assert (status, answer["error"]["code"]) == (400, "invalid_json")


def test_administration_asks_for_its_own_key_and_is_not_there_without_one(router: Router) -> None:
    with router.running():
        for method, body in (("GET", None), ("POST", {"policy": "random"})):
            for key in ("client", "", "Admin"):
                assert ask(router.url, method, "/admin/policy", body, key)[0] == 401
        assert ask(router.url, "GET", "/v1/models", key="admin")[0] == 401
        assert ask(router.url, "GET", "/admin/policy")[1]["policy"] == "round-robin"
        assert ask(router.url, "PUT", "/admin/policy")[0] == 405
    with router.running(Settings()):
        assert ask(router.url, "GET", "/admin/policy")[0] == 404
        assert ask(router.url, "POST", "/admin/policy", {"policy": "random"})[0] == 404


def test_a_port_of_their_own_is_where_metrics_and_administration_are(router: Router) -> None:
    with router.running(apart=True):
        paths = ("/metrics", "/admin/policy", "/health", "/v1/models")
        assert [ask(router.admin_url, "GET", path)[0] for path in paths] == [200, 200, 200, 404]
        assert [ask(router.url, "GET", path, key="client")[0] for path in paths] == [404, 404, 200, 200]
        assert ask(router.admin_url, "POST", "/v1/completions", {}, key="client")[0] == 401
        assert router.put_in_charge("large.safetensors")[0] == 200
        assert router.model_of_next() == "large"
    with router.running(Settings(), apart=True):
        assert [ask(router.admin_url, "GET", path)[0] for path in ("/metrics", "/admin/policy")] == [200, 404]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.one_of(st.sampled_from(["..", "/", ".", "a", "b.safetensors", "\0", "~", "static:"]),
                                st.text(max_size=4)), max_size=6))  # fmt: skip
def test_no_name_leads_out_of_the_folder(tmp_path: Path, parts: list[str]) -> None:
    asked: list[str] = []

    def load(name: str) -> Policy:
        asked.append(name)
        return RoundRobin()

    name = "".join(parts)
    with contextlib.suppress(PolicyError):
        PolicySource(GIVEN, tmp_path, load).load(name)
    if asked and name not in BUILT_IN and not name.startswith("static:"):
        assert Path(asked[0]).is_relative_to(tmp_path)
        assert ".." not in Path(asked[0]).parts


def test_the_policy_of_the_start_may_lie_anywhere(tmp_path: Path) -> None:
    asked: list[str] = []

    def load(name: str) -> Policy:
        asked.append(name)
        return RoundRobin()

    PolicySource(GIVEN, tmp_path, load).load(GIVEN)
    assert asked == [GIVEN]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    places=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6),
    cut=st.one_of(st.none(), st.integers(0, 10**6)),
)
def test_a_policy_file_with_other_bytes_is_a_policy_or_refused_in_one_line(
    fleet: Fleet, tmp_path: Path, places: list[tuple[int, int]], cut: int | None
) -> None:
    path = tmp_path / "damaged.safetensors"
    save_preferring(path, fleet, 1)
    data = bytearray(path.read_bytes())
    for place, value in places:
        data[place % len(data)] = value
    path.write_bytes(data[: None if cut is None else cut % len(data)])
    try:
        told = ""
        network = load_policy(path, fleet).network
    except PolicyError as error:
        told = str(error)
    assert told.startswith(f"{path}: ") or np.isfinite(network.weights[0]).all()
    assert "\n" not in told
