import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from besteffort.router.request_body import RequestBody

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
_BODY = st.dictionaries(st.sampled_from(("model", "prompt", "stream", "n")) | st.text(max_size=8), _JSON)


@given(_BODY, st.booleans())
def test_only_the_model_is_another_one_at_the_engine(body: dict[str, Any], ascii_only: bool) -> None:
    data = json.dumps(body, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        read = RequestBody(data)
    except UnicodeDecodeError:
        assert not ascii_only  # a lone surrogate has no UTF-8
        return
    assert read.model == body.get("model")
    assert json.loads(read.for_engine('odd "name"')) == {**body, "model": 'odd "name"'}


@pytest.mark.parametrize(
    "value",
    [
        "123456789012345678901234567890",
        "0.1000000000000000055511151231257827",
        "1E5",
        '"\\u00e9\\ud800"',
        '{"a" : 1, "a":2}',
        '[ 1,\n2 ]',
    ],
)  # fmt: skip
def test_values_stay_the_bytes_that_the_client_wrote(value: str) -> None:
    body = RequestBody(f'{{"x": {value} , "model": "a"}}'.encode())
    assert value.encode() in body.for_engine("b")


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "[1, NaN]", "1e400"])
def test_numbers_that_python_writes_and_vllm_reads_are_let_through(value: str) -> None:
    body = RequestBody(f'{{"x": {value}, "model": "a"}}'.encode())
    sent = json.loads(body.for_engine("b"))
    assert repr(sent["x"]) == repr(json.loads(value))
    assert sent["model"] == "b"


@pytest.mark.parametrize(
    ("data", "model"),
    [
        (b'{"model":"a","model":"b"}', "b"),
        (b'{"mod\\u0065l":"c"}', "c"),
        (b'{"tools":{"model":"x"}}', None),
        (b'{"prompt":"\\"model\\":\\"x\\"","model":"y"}', "y"),
    ],
)
def test_the_engine_gets_one_model_whatever_the_client_hid_it_in(data: bytes, model: str | None) -> None:
    body = RequestBody(data)
    assert body.model == model
    pairs = json.loads(body.for_engine("served"), object_pairs_hook=list)
    assert [value for key, value in pairs if key == "model"] == ["served"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b"\xff\xfe",
        b'{"a":"\xff"}',
        b"{}{}",
        b'\xef\xbb\xbf{"a":1}',
        b"{" * 10**6,
        b'{"\\ud800":1}',
        b"{" + b",".join(b'"%d":1' % number for number in range(1_001)) + b"}",
        b'{"n":NaN,' + b",".join(b'"%d":1' % number for number in range(1_000)) + b"}",
        b'{"n":NaN,"prompt":"'
        + b"x" * 300_000
        + b'"}',  # which Python would read, in the time of many requests
    ],
    ids=lambda data: repr(data)[2:40],
)
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r".*"):
        RequestBody(data)


@pytest.mark.parametrize(
    ("body", "number"),
    [
        ({}, 1),
        ({"prompt": "x", "n": None}, 1),
        ({"prompt": "x", "n": 3}, 3),
        ({"prompt": [5, 6, 7]}, 1),  # one prompt, of tokens
        ({"prompt": ["a", "b"]}, 2),
        ({"prompt": [[5, 6], [7], [8]], "n": 2}, 6),
        ({"prompt": []}, 1),
        ({"prompt": {"a": 1}, "n": "2"}, 1),
        ({"messages": [{"role": "user"}], "n": 2}, 2),
        ({"n": 0}, 1),
        ({"n": -2}, 1),
        ({"n": 1.5}, 1),
        ({"n": True}, 1),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_answers_are_counted_by_prompt_and_by_n(
    body: dict[str, object], number: int, indent: int | None
) -> None:
    assert RequestBody(json.dumps(body, indent=indent).encode()).num_answers == number


@pytest.mark.parametrize("value", [b"NaN", b"1e400", b'"\\ud800"', b"[" * 500 + b"]" * 500])
def test_a_value_that_nobody_can_use_is_the_engine_s_to_refuse(value: bytes) -> None:
    for extra in (b"", b',"x":NaN'):
        body = RequestBody(b'{"model":"a","max_tokens":%b,"n":%b%b}' % (value, value, extra))
        assert (body.model, body.max_tokens, body.num_answers) == ("a", None, 1)
        assert json.loads(body.for_engine("b"))["model"] == "b"


def test_prompts_that_cannot_be_counted_are_one() -> None:
    assert RequestBody(b'{"prompt":["\\ud800","b"],"n":2}').num_answers == 2


def test_numbers_that_are_wanted_have_a_bound() -> None:
    body = RequestBody(b'{"max_tokens":18446744073709551615,"n":%b}' % (b"1" * 400))
    assert (body.max_tokens, body.num_answers) == (2**31 - 1, 2**31 - 1)


def test_a_body_is_in_memory_once() -> None:
    data = '{"model":"a","prompt":"%s"}' % ("é" * 1_000_000)
    encoded = data.encode()
    tracemalloc.start()
    try:
        body = RequestBody(encoded)
        assert tracemalloc.get_traced_memory()[0] < 10_000
        assert body.model == "a"
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("model", ["x" * 2_000_000, [[]] * 1_000_000])
def test_of_a_model_that_is_too_long_to_be_one_only_the_beginning_is_read(model: Any) -> None:
    body = RequestBody(json.dumps({"model": model}).encode())
    assert 0 < len(body.model) <= 1_000
    assert json.loads(body.for_engine("b")) == {"model": "b"}


@contextmanager
def few_objects(at_most: int = 500_000) -> Iterator[None]:
    """So many bytes of them at a time: what is made of a long body is what holds up everyone else."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < at_most
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("num_names", [1, 300_000])
def test_of_very_many_fields_only_so_many_are_read_as_are_allowed(num_names: int) -> None:
    data = b"{" + b",".join(b'"%d":1' % (number % num_names) for number in range(300_000)) + b"}"
    with few_objects(), pytest.raises(ValueError, match="too many fields"):
        RequestBody(data)


def test_a_long_body_of_few_fields_is_read_however_many_parts_they_have() -> None:
    messages = [{"role": "user", "content": "a: b"}] * 10_000
    body = RequestBody(json.dumps({"model": "a", "messages": messages, "n": 2}).encode())
    assert (body.model, body.num_answers) == ("a", 2)
    assert json.loads(body.for_engine("b")) == {"model": "b", "messages": messages, "n": 2}
    with pytest.raises(ValueError, match="not JSON"):
        RequestBody(json.dumps({"messages": messages}).encode()[:-1])


@pytest.mark.parametrize("field", ["n", "stream", "max_tokens"])
def test_a_list_in_the_place_of_a_number_is_not_read(field: str) -> None:
    body = RequestBody(b'{"%b":[%b0]}' % (field.encode(), b"[]," * 300_000))
    with few_objects():
        assert (body.num_answers, body.is_streamed, body.max_tokens) == (1, False, None)


@pytest.mark.parametrize("prompt", ["", 'so "they" say: [', [7], [1, 2]])
def test_of_very_many_prompts_each_is_counted_and_none_is_made_an_object(prompt: Any) -> None:
    data = json.dumps({"prompt": [prompt] * 200_000, "n": 2}).encode()
    body = RequestBody(data)
    with few_objects(at_most=len(data) + 500_000):
        assert body.num_answers == 400_000
