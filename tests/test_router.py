import http.client
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from besteffort.engines.child import free_port
from besteffort.engines.running import Engine
from besteffort.fleet import Fleet
from besteffort.policies import RoundRobin, SlackFit
from besteffort.router import Dispatcher
from besteffort.router.addressing import Addresses, UnknownAddressError, model_ids
from tests.fake_engine import FakeEngine, serving, wait_for
from tests.routing import routing
from tests.test_thresholds import constant_latency


@dataclass
class Served:
    url: str
    dispatcher: Dispatcher
    engines: list[FakeEngine]  # two replicas of small, one of large

    def post(self, body: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=20)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", "/v1/completions", data, headers or {})
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        return response.status, {key.lower(): value for key, value in response.getheaders()}, answer

    def metrics(self) -> str:
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=20)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return text

    @property
    def num_in_flight(self) -> int:
        return sum(map(sum, self.dispatcher.in_flight))


@pytest.fixture
def served(fleet: Fleet) -> Iterator[Served]:
    fakes = [FakeEngine("small"), FakeEngine("small"), FakeEngine("large", step_s=0.005)]
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(fake.app)) for fake in fakes]
        engines = (
            (Engine(urls[0], "small"), Engine(urls[1], "small")),
            (Engine(urls[2], "name-of-large-upstream"),),
        )
        dispatcher = Dispatcher(fleet, RoundRobin(), engines)
        url = stack.enter_context(routing(dispatcher))
        yield Served(url, dispatcher, fakes)


def test_requests_go_to_the_model_that_the_policy_chooses_and_the_answer_says_so(served: Served) -> None:
    receipts = []
    for _ in range(4):
        status, headers, _ = served.post({"model": "besteffort/piqa", "prompt": "x", "max_tokens": 2})
        assert status == 200
        receipts.append((headers["x-besteffort-model"], headers["x-besteffort-task"]))
    assert receipts == [("small", "piqa"), ("large", "piqa")] * 2
    assert {body["model"] for body in served.engines[2].bodies} == {"name-of-large-upstream"}


def test_the_replica_with_the_smallest_batch_takes_the_request(served: Served) -> None:
    with served.dispatcher.route(0, pinned=0) as first, served.dispatcher.route(0, pinned=0) as second:
        assert (first.replica, second.replica) == (0, 1)
        assert served.dispatcher.in_flight == [[1, 1], [0]]
    assert served.num_in_flight == 0


def test_unknown_fields_reach_the_engine_untouched(served: Served) -> None:
    extras = {"logprobs": 2, "n": 1, "some_future_field": {"a": [1, None]}, "max_tokens": 1}
    served.post({"model": "large", "prompt": "x", **extras})
    body = served.engines[2].bodies[-1]
    assert {key: body[key] for key in extras} == extras


def test_a_model_asked_for_by_name_is_pinned(served: Served) -> None:
    for _ in range(3):
        _, headers, _ = served.post({"model": "large", "prompt": "x", "max_tokens": 1})
        assert headers["x-besteffort-model"] == "large"
        assert headers["x-besteffort-policy"] == "pinned"


def test_the_task_header_goes_before_the_model_name(served: Served) -> None:
    body = {"model": "besteffort/piqa", "prompt": "x", "max_tokens": 1}
    _, headers, _ = served.post(body, {"x-besteffort-task": "copa"})
    assert headers["x-besteffort-task"] == "copa"


@pytest.mark.parametrize("model", ["gpt-4", "besteffort/unheard", 7])
def test_an_unknown_model_gets_a_404_in_openai_s_schema(served: Served, model: object) -> None:
    status, _, answer = served.post({"model": model, "prompt": "x"})
    error = json.loads(answer)["error"]
    assert (status, error["type"], error["code"], error["param"]) == (
        404,
        "invalid_request_error",
        "model_not_found",
        "model",
    )


@pytest.mark.parametrize("model", ["x" * 1_000_000, ["x"] * 100_000, "\0" * 10_000, ["x" * 400, "y"]])
def test_what_is_asked_for_in_vain_is_not_told_at_length(served: Served, model: object) -> None:
    status, _, answer = served.post({"model": model, "prompt": "x"})
    assert (status, b"..." in answer, len(answer) < 1_000) == (404, True, True)
    status, _, answer = served.post({"model": "large"}, {"x-besteffort-task": "x" * 5_000})
    assert (status, b"..." in answer, len(answer) < 1_000) == (404, True, True)


def test_only_decisions_that_the_policy_made_are_timed(served: Served) -> None:
    for model in ("large", "besteffort", "small", "besteffort/piqa", "large"):
        assert served.post({"model": model, "prompt": "x", "max_tokens": 1})[0] == 200
    assert "besteffort_decision_seconds_count 2.0" in served.metrics()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/models", 405),
        ("POST", "/", 404),
    ],
)
def test_unknown_paths_and_methods_get_errors_in_openai_s_schema(
    served: Served, method: str, path: str, status: int
) -> None:
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=20)
    connection.request(method, path)
    response = connection.getresponse()
    assert response.status == status
    assert json.loads(response.read())["error"]["type"] == "invalid_request_error"
    connection.close()


def test_json_nested_too_deep_to_parse_gets_a_400(served: Served) -> None:
    status, _, answer = served.post(b'{"prompt":' + b"[" * 200_000)
    assert (status, json.loads(answer)["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"\\ud800":1}'])
def test_a_body_that_is_no_json_object_gets_a_400(served: Served, body: bytes) -> None:
    status, _, answer = served.post(body)
    assert (status, json.loads(answer)["error"]["code"]) == (400, "invalid_json")


def test_an_engine_s_own_refusal_is_passed_on_as_it_is(served: Served) -> None:
    status, _, answer = served.post({"model": "large", "prompt": "refuse"})
    assert (status, json.loads(answer)["error"]["message"]) == (400, "too long")
    wait_for(lambda: 'outcome="refused"' in served.metrics())


def test_the_openai_package_streams_through_the_router(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="large", prompt="x", max_tokens=5, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == " 0 1 2 3 4"


def test_models_lists_the_router_its_tasks_and_the_fleet_s_own(served: Served, fleet: Fleet) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        ids = [model.id for model in client.models.list()]
    assert ids == ["besteffort", "besteffort/copa", "besteffort/piqa", "small", "large"]
    assert ids == model_ids(fleet)


def test_a_client_that_goes_away_ends_its_request_at_the_engine(served: Served) -> None:
    served.engines[2].step_s = 0.05
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=20)
    body = {"model": "large", "prompt": "x", "max_tokens": 1000, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body))
    response = connection.getresponse()
    assert response.read(6) == b"data: "
    assert served.num_in_flight == 1
    response.close()
    connection.close()
    wait_for(lambda: served.engines[2].num_running == 0 and served.num_in_flight == 0)
    assert served.engines[2].num_cancelled == 1
    wait_for(lambda: 'outcome="cancelled"' in served.metrics())


def test_a_stream_that_breaks_off_ends_with_an_error_event(served: Served) -> None:
    status, _, answer = served.post({"model": "large", "prompt": "break", "max_tokens": 6, "stream": True})
    *_, last = [line for line in answer.split(b"\n\n") if line]
    assert status == 200
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_failed"
    wait_for(lambda: served.num_in_flight == 0)


def test_an_engine_that_nobody_serves_gives_a_502_and_no_count_is_left(fleet: Fleet) -> None:
    dead = Engine(f"http://127.0.0.1:{free_port()}", "small")
    dispatcher = Dispatcher(fleet, RoundRobin(), ((dead, dead), (dead,)))
    with routing(dispatcher) as url:
        status, _, answer = Served(url, dispatcher, []).post({"model": "besteffort", "prompt": "x"})
        assert (status, json.loads(answer)["error"]["type"]) == (502, "server_error")
        wait_for(lambda: dispatcher.in_flight == [[0, 0], [0]])


def test_metrics_count_requests_and_their_deadlines(served: Served) -> None:
    served.post({"model": "besteffort/copa", "prompt": "x", "max_tokens": 4, "stream": True})
    answered = 'besteffort_requests_total{model="small",outcome="ok",task="copa"} 1.0'
    wait_for(lambda: answered in served.metrics())
    text = served.metrics()
    assert 'besteffort_deadlines_total{met="yes",model="small",task="copa"} 1.0' in text
    assert 'besteffort_latency_ms_per_token_count{model="small",task="copa"} 1.0' in text
    assert 'besteffort_in_flight{model="large",replica="0"} 0.0' in text


def test_only_streams_tell_a_time_to_the_first_token(served: Served) -> None:
    served.post({"model": "large", "prompt": "x", "max_tokens": 4})
    wait_for(
        lambda: 'besteffort_latency_ms_per_token_count{model="large",task="copa"} 1.0' in served.metrics()
    )
    assert "besteffort_ttft_ms_count{" not in served.metrics()
    served.post({"model": "large", "prompt": "x", "max_tokens": 4, "stream": True})
    wait_for(lambda: 'besteffort_ttft_ms_count{model="large",task="copa"} 1.0' in served.metrics())


def test_a_deadline_of_the_request_s_own_goes_before_the_task_s(served: Served) -> None:
    body = {"model": "large", "prompt": "x", "max_tokens": 4}
    _, headers, _ = served.post(body)
    assert headers["x-besteffort-deadline-ms-per-token"] == "40"
    _, headers, _ = served.post(body, {"x-besteffort-deadline-ms-per-token": "0.001"})
    assert headers["x-besteffort-deadline-ms-per-token"] == "0.001"
    wait_for(lambda: 'besteffort_deadlines_total{met="no",model="large",task="copa"} 1.0' in served.metrics())
    assert 'besteffort_deadlines_total{met="yes",model="large",task="copa"} 1.0' in served.metrics()


def test_a_policy_that_predicts_goes_by_the_request_s_own_deadline(served: Served, fleet: Fleet) -> None:
    served.dispatcher.put_in_charge(SlackFit(constant_latency(), fleet))  # 9.5 and 28.5 ms a token
    body, own = {"prompt": "x", "max_tokens": 1}, ("40", "20")
    asked = [served.post(body, {"x-besteffort-deadline-ms-per-token": deadline}) for deadline in own]
    assert [headers["x-besteffort-model"] for _, headers, _ in asked] == ["large", "small"]
    assert served.post(body)[1]["x-besteffort-model"] == "large"  # copa has 40 ms


@pytest.mark.parametrize("given", ["", "0", "-1", "nan", "inf", "1e9", "40 ms", "4_0x"])
def test_a_deadline_that_is_none_is_refused(served: Served, given: str) -> None:
    status, _, answer = served.post({"prompt": "x"}, {"x-besteffort-deadline-ms-per-token": given})
    error = json.loads(answer)["error"]
    assert (status, error["param"]) == (400, "x-besteffort-deadline-ms-per-token")


def test_a_body_that_says_it_is_no_json_gets_a_415(served: Served) -> None:
    status, _, _ = served.post({"prompt": "x"}, {"content-type": "text/plain"})
    assert status == 415


def test_one_model_can_be_looked_up(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        assert client.models.retrieve("besteffort/copa").id == "besteffort/copa"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4")


def test_an_address_is_read_from_header_and_model(fleet: Fleet) -> None:
    addresses = Addresses(fleet)
    assert addresses.read(None, None).task == 0
    assert addresses.read(None, "besteffort/piqa").task == 1
    assert addresses.read("piqa", "large").pinned == 1
    with pytest.raises(UnknownAddressError, match="copa, piqa"):
        addresses.read("chess", None)
