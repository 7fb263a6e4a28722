"""What clients are told of their requests, before an answer and after it."""

import itertools
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import httpx
import numpy as np
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from besteffort.engines.running import Engine
from besteffort.fleet import Fleet
from besteffort.latency import Latency
from besteffort.policies import Static
from besteffort.rewards import Rewards
from besteffort.router import Dispatcher, Forecast
from besteffort.router.health import Health
from besteffort.router.metrics import Metrics
from besteffort.router.receipt import StreamEnd
from tests.fake_engine import FakeEngine, Script, serving
from tests.routing import door, routing

_CHOICE = 'data: {"choices":[{"index":0,"text":"a"}]}\n\n'
_ASKS = {"x-besteffort-receipt": "stream"}
_PARTS = (_CHOICE, "data: [DONE", "data: {}", "d", "\n", ": data: [DONE]\n", 'data: "\ndata: "\n', "x", "")


def forecast(fleet: Fleet) -> Forecast:
    latency = Latency(
        batch_sizes=np.array([1, 4]),
        step_ms=np.array([[2.0, 5.0], [10.0, 40.0]]),
        prefill_base_ms=np.array([4.0, 20.0]),
        prefill_ms_per_token=np.array([0.1, 0.5]),
        slowdown=np.array([[1.0, 1.0, 1.0, 1.5], [1.0, 1.0, 1.0, 2.0]]),
    )
    values = np.array([[0.4, 0.8], [0.9, 0.6]])
    unknown = np.full((2, 2), np.nan)
    rewards = Rewards(values, unknown, np.zeros((2, 2), dtype=np.int64), ("acc", "acc"), "given")
    return Forecast(fleet, latency, rewards)


@dataclass
class Told:
    url: str
    dispatcher: Dispatcher

    def post(self, body: dict[str, Any], headers: dict[str, str] | None = None) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=20)

    def metrics(self) -> str:
        return httpx.get(f"{self.url}/metrics").text


@contextmanager
def telling(fleet: Fleet, knows: Forecast | None, model: int = 0) -> Iterator[Told]:
    with ExitStack() as stack:
        engine = Engine(stack.enter_context(serving(FakeEngine("x").app)), "x")
        dispatcher = Dispatcher(fleet, Static(model, "always"), ((engine, engine), (engine,)), forecast=knows)
        yield Told(stack.enter_context(routing(dispatcher)), dispatcher)


def test_headers_say_the_latency_that_the_profile_predicts_for_the_batch_at_the_decision(
    fleet: Fleet,
) -> None:
    known = forecast(fleet)
    with telling(fleet, known, model=1) as told, ExitStack() as running:
        body = {"prompt": "x", "max_tokens": 2}
        for model in (1, 1, 0):  # two are at the large model, one at the small one
            running.enter_context(told.dispatcher.route(0, pinned=model))
        header = told.post(body).headers["x-besteffort-predicted-latency-ms-per-token"]
        expected = known.latency_ms_per_token(0, 1, 3, [1, 3])
        assert float(header) == pytest.approx(expected, rel=1e-3)


@given(sizes=st.tuples(*[st.integers(0, 2000)] * 2), task=st.integers(0, 1), model=st.integers(0, 1))
def test_a_prediction_is_that_of_the_policies_that_predict(
    fleet: Fleet, sizes: tuple[int, int], task: int, model: int
) -> None:
    known = forecast(fleet)
    of_task = fleet.tasks[task]
    on_device = list(sizes)
    on_device[model] += 1
    latency = Latency(
        batch_sizes=np.array([1, 4]),
        step_ms=np.array([[2.0, 5.0], [10.0, 40.0]]),
        prefill_base_ms=np.array([4.0, 20.0]),
        prefill_ms_per_token=np.array([0.1, 0.5]),
        slowdown=np.array([[1.0, 1.0, 1.0, 1.5], [1.0, 1.0, 1.0, 2.0]]),
    )
    expected = latency.predicted_ms_per_token(
        np.array(sizes, dtype=np.float64),
        num_prompt_tokens=round(sum(of_task.num_prompt_tokens) / 2),
        num_output_tokens=round(sum(of_task.num_output_tokens) / 2),
    )[model]
    assert known.latency_ms_per_token(task, model, on_device[model], on_device) == pytest.approx(expected)


def test_headers_say_the_utility_given_up_against_the_largest_model(fleet: Fleet) -> None:
    with telling(fleet, forecast(fleet)) as told:
        given_up = [
            told.post({"model": name, "prompt": "x"}).headers["x-besteffort-utility-given-up"]
            for name in ("besteffort/copa", "large", "besteffort/piqa")
        ]
        assert [float(value) for value in given_up] == pytest.approx([0.5, 0.0, -1 / 3], abs=1e-3)


def test_without_profile_and_rewards_receipts_say_the_rest(fleet: Fleet) -> None:
    for knows in (None, Forecast(fleet, None, None)):
        with telling(fleet, knows) as told:
            headers = told.post({"prompt": "x"}).headers
            assert headers["x-besteffort-model"] == "small"
            assert "x-besteffort-predicted-latency-ms-per-token" not in headers
            assert "x-besteffort-utility-given-up" not in headers
            assert "besteffort_utility_total" not in told.metrics()


@pytest.mark.parametrize("deadline", ["1000", "0.0001"])
def test_the_openai_package_reads_a_stream_that_ends_with_a_receipt(fleet: Fleet, deadline: str) -> None:
    headers = {**_ASKS, "x-besteffort-deadline-ms-per-token": deadline}
    with (
        telling(fleet, forecast(fleet)) as told,
        openai.OpenAI(base_url=f"{told.url}/v1", api_key="none", max_retries=0) as client,
    ):
        asked = {"model": "besteffort/copa", "prompt": "x", "max_tokens": 5, "stream": True}
        *chunks, last = list(client.completions.create(**asked, extra_headers=headers))
        assert "".join(chunk.choices[0].text for chunk in chunks) == " 0 1 2 3 4"
        assert last.choices == []
        receipt = last.model_extra["besteffort"]
        facts = ("model", "replica", "task", "policy", "num_tokens", "utility_given_up")
        assert [receipt[name] for name in facts] == ["small", 0, "copa", "always", 5, 0.5]
        assert receipt["deadline_ms_per_token"] == float(deadline)
        assert receipt["deadline_met"] is (deadline == "1000")
        assert receipt["ttft_ms"] > 0
        assert 0.0001 < receipt["latency_ms_per_token"] < 1000
        assert receipt["predicted_latency_ms_per_token"] > 0
        assert (last.model, last.object) == ("small", "text_completion")


def test_a_chat_s_receipt_is_a_chat_s_chunk(fleet: Fleet) -> None:
    with (
        telling(fleet, None) as told,
        openai.OpenAI(base_url=f"{told.url}/v1", api_key="none", max_retries=0) as client,
    ):
        asked = {"model": "besteffort", "messages": [{"role": "user", "content": "x"}], "stream": True}
        *_, last = list(client.chat.completions.create(**asked, extra_headers=_ASKS))
        assert (last.object, last.choices) == ("chat.completion.chunk", [])
        assert last.model_extra["besteffort"]["predicted_latency_ms_per_token"] is None


def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]


def test_a_receipt_comes_only_to_streams_and_to_who_asks(fleet: Fleet) -> None:
    with telling(fleet, None) as told:
        stream = {"prompt": "x", "max_tokens": 2, "stream": True}
        assert len(events(told.post(stream))) == 3
        assert len(events(told.post(stream, _ASKS))) == 4
        plain = told.post({"prompt": "x"}, _ASKS)
        assert set(plain.json()) == {"choices", "usage"}
        refused = told.post({"prompt": "refuse"}, _ASKS)
        assert (refused.status_code, refused.json()["error"]["message"]) == (400, "too long")


def test_a_receipt_of_a_kind_that_there_is_not_is_refused(fleet: Fleet) -> None:
    with telling(fleet, None) as told:
        answer = told.post({"prompt": "x"}, {"x-besteffort-receipt": "paper"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-besteffort-receipt")


def test_a_stream_that_breaks_off_ends_with_its_error_and_no_receipt(fleet: Fleet) -> None:
    with telling(fleet, None) as told:
        answer = told.post({"prompt": "break", "max_tokens": 6, "stream": True}, _ASKS)
        assert "error" in json.loads(events(answer)[-1])
        assert '"besteffort"' not in answer.text


def sends_stream(body: bytes, head: bytes) -> Script:
    return lambda connection, _: connection.sendall(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n" + head + body
    )


def test_a_stream_with_a_length_and_one_without_a_last_event_get_their_receipt_at_the_end(
    fleet: Fleet,
) -> None:
    token = _CHOICE.encode()
    with_length = sends_stream(token + b"data: [DONE]\n\n", b"content-length: %d\r\n\r\n" % (len(token) + 14))
    without_end = sends_stream(token, b"content-length: %d\r\n\r\n" % len(token))
    held_back = sends_stream(token + b"data: [D", b"content-length: %d\r\n\r\n" % (len(token) + 8))
    for script, num_events, last in ((with_length, 3, "[DONE]"), (without_end, 2, ""), (held_back, 2, "")):
        with door(fleet, script) as one:
            answer = httpx.post(f"{one.url}/v1/completions", json={"stream": True}, headers=_ASKS, timeout=20)
            assert len(events(answer)) == num_events
            assert last in events(answer)[-1]
            assert answer.text.count('"num_tokens": 1') == 1


@given(
    before=st.lists(st.sampled_from(_PARTS), max_size=8),
    after=st.sampled_from(("", "\n\n", "\n\nmore\n\ndata: [DONE]")),
    done=st.sampled_from(("data: [DONE]", "data:[DONE]")),
    places=st.lists(st.integers(min_value=0), max_size=20),
)
def test_the_end_of_a_stream_is_found_however_it_is_cut(
    before: list[str], after: str, done: str, places: list[int]
) -> None:
    text = "".join(before)
    head = (text if text.endswith("\n") or not text else text + "\n").encode()
    data = head + done.encode() + after.encode()
    bounds = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    expected = next(
        offset
        for offset in range(len(data))
        if data.startswith((b"data: [DONE]", b"data:[DONE]"), offset)
        and (offset == 0 or data[offset - 1 : offset] == b"\n")
    )
    stream_end, passed = StreamEnd(), b""
    for start, end in itertools.pairwise(bounds):
        out, rest = stream_end.feed(data[start:end])
        passed += out
        if rest:
            assert (passed, rest) == (data[:expected], data[expected:end])
            break
    else:
        pytest.fail("the end was not found")


@given(parts=st.lists(st.sampled_from(_PARTS[1:]), max_size=8))
def test_a_stream_without_an_end_comes_through_whole(parts: list[str]) -> None:
    parts = [part for part in parts if "[DONE" not in part]
    stream_end = StreamEnd()
    passed = b"".join(stream_end.feed(part.encode())[0] for part in parts)
    assert passed + stream_end.rest() == "".join(parts).encode()


def test_performance_can_be_told_from_the_metrics(fleet: Fleet) -> None:
    with telling(fleet, forecast(fleet)) as told:
        in_time = {"x-besteffort-deadline-ms-per-token": "100000"}
        late = {"x-besteffort-deadline-ms-per-token": "0.0001"}
        for headers in (in_time, in_time, late):
            told.post({"model": "besteffort/copa", "prompt": "x"}, headers)
        told.post({"model": "large", "prompt": "x"}, in_time)
        text = told.metrics()
        assert 'besteffort_utility_total{model="small",task="copa"} 1.0' in text  # 2 of 3, each worth 0.5
        assert 'besteffort_utility_peak_total{model="small",task="copa"} 3.0' in text
        assert 'besteffort_utility_total{model="large",task="copa"} 1.0' in text
        assert 'besteffort_utility_peak_total{model="large",task="copa"} 1.0' in text


@pytest.mark.parametrize(("kind", "worth"), [("hard", 1.0), ("soft", 1.98)])
def test_an_answer_that_is_late_is_worth_what_its_deadline_leaves_of_it(
    fleet: Fleet, kind: str, worth: float
) -> None:
    engine = Engine("http://127.0.0.1:1", "x")
    dispatcher = Dispatcher(
        fleet.model_copy(update={"deadline_kind": kind}),
        Static(1, "always"),
        ((engine, engine), (engine,)),
        forecast=forecast(fleet),
    )
    metrics = Metrics(dispatcher, cast(Health, None))  # which is asked for its breakers alone
    with dispatcher.route(0) as route:
        for latency in (40.0, 42.0, 44.0):  # 2 ms late, and so late that nothing is left
            metrics.ended(route, "ok", latency, 40.0)
        metrics.ended(route, "failed", None, 40.0)
        metrics.ended(route, "cancelled", None, 40.0)
    families = {family.name: family for family in metrics.collect_utilities()}
    assert families["besteffort_utility"].samples[0].value == pytest.approx(worth)
    assert families["besteffort_utility_peak"].samples[0].value == 4.0


def test_of_several_answers_side_by_side_the_mean_one_s_latency_per_token_counts(fleet: Fleet) -> None:
    body = (_CHOICE * 6 + "data: [DONE]\n\n").encode()
    script = sends_stream(body, b"content-length: %d\r\n\r\n" % len(body))
    asked = [{"prompt": "a"}, {"prompt": "a", "n": 2}, {"prompt": ["a", "b", "c"]}, {"prompt": [1, 2, 3]}]
    with door(fleet, script) as one:
        ticks = itertools.count()
        one.dispatcher.clock = lambda: 0.001 * next(ticks)  # the same number of them for each request
        latencies = []
        for fields in asked:
            answer = httpx.post(
                f"{one.url}/v1/completions", json={**fields, "stream": True}, headers=_ASKS, timeout=20
            )
            latencies.append(json.loads(events(answer)[-2])["besteffort"]["latency_ms_per_token"])
            one.settled()
        assert latencies == pytest.approx([latencies[0] * factor for factor in (1, 2, 3, 1)], rel=0.01)


def test_headers_are_those_of_each_request_and_not_of_the_last_one(fleet: Fleet) -> None:
    with telling(fleet, forecast(fleet), model=1) as told:
        said = []
        for deadline, model in (("40", "small"), ("41", "small"), ("40", "large"), ("40", "small")):
            extra = {"x-besteffort-deadline-ms-per-token": deadline}
            headers = told.post({"model": model, "prompt": "x"}, extra).headers
            said.append((headers["x-besteffort-deadline-ms-per-token"], headers["x-besteffort-model"]))
        assert said == [("40", "small"), ("41", "small"), ("40", "large"), ("40", "small")]


def test_metrics_show_what_has_happened_and_nothing_else(fleet: Fleet) -> None:
    with telling(fleet, forecast(fleet), model=1) as told:
        told.post({"prompt": "x", "max_tokens": 2})
        shown = told.metrics().splitlines()
        labels = '{model="large",task="copa"}'
        for name, expected in (
            ("requests_total", ['{model="large",outcome="ok",task="copa"}']),
            ("deadlines_total", ['{met="yes",model="large",task="copa"}']),
            ("retries_total", []),
            ("latency_ms_per_token_count", [labels]),
            ("ttft_ms_count", []),
            ("utility_peak_total", [labels]),
        ):
            begin = f"besteffort_{name}{{"
            assert [line for line in shown if line.startswith(begin)] == [
                f"besteffort_{name}{one} 1.0" for one in expected
            ]
