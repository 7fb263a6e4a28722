import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from besteffort.router.token_count import PlainCount, StreamCount, TokenCount

_ENDS = ("\n\n", "\r\n\r\n")
_SPACES = ((",", ":"), (", ", ": "), (" , ", " : "))
# Among them what only looks like the keys that are counted.
_TEXTS = ("a", '"choices":[{', '"completion_tokens": 7}', "role", '"role":', "\n\n", "data: [DONE]", "é\0")


def event(value: object, spaces: tuple[str, str], end: str) -> bytes:
    return f"data: {json.dumps(value, separators=spaces)}{end}".encode()


def cut(data: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(bounds)]


def total(count: TokenCount, parts: list[bytes]) -> int:
    for part in parts:
        count.feed(part)
    return count.total


@given(
    texts=st.lists(st.sampled_from(_TEXTS), max_size=12),
    spaces=st.sampled_from(_SPACES),
    end=st.sampled_from(_ENDS),
    places=st.lists(st.integers(min_value=0), max_size=20),
    chat=st.booleans(),
    num_choices=st.integers(1, 3),
    usage=st.none() | st.integers(0, 10**6),
)
def test_a_stream_is_counted_the_same_however_it_is_written_and_cut(
    texts: list[str],
    spaces: tuple[str, str],
    end: str,
    places: list[int],
    chat: bool,
    num_choices: int,
    usage: int | None,
) -> None:
    values: list[object] = []
    for index in range(num_choices):
        if chat:
            values.append({"choices": [{"index": index, "delta": {"role": "assistant", "content": ""}}]})
        for text in texts:
            choice = {"delta": {"content": text}} if chat else {"text": text, "logprobs": None}
            values.append({"choices": [{"index": index, **choice}], "usage": None})
    if usage is not None:
        values.append({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": usage}})
    stream = b": hello" + end.encode() + b"".join(event(value, spaces, end) for value in values)
    stream += f"data: [DONE]{end}".encode()
    expected = num_choices * len(texts) if usage is None else usage
    assert total(StreamCount(), cut(stream, places)) == expected


@given(
    num_tokens=st.integers(0, 10**9),
    text=st.sampled_from(_TEXTS),
    indent=st.none() | st.integers(0, 8),
    padding=st.integers(0, 3000),
    places=st.lists(st.integers(min_value=0), max_size=20),
)
def test_a_plain_answer_is_counted_by_its_usage_however_it_is_written_and_cut(
    num_tokens: int, text: str, indent: int | None, padding: int, places: list[int]
) -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": num_tokens, "completion_tokens_details": {"a": 1}}
    value = {"choices": [{"text": text}], "usage": usage, "prompt_token_ids": [1] * padding}
    assert total(PlainCount(), cut(json.dumps(value, indent=indent).encode(), places)) == num_tokens


def test_a_role_in_every_event_does_not_hide_its_token() -> None:
    events = [event({"choices": [{"delta": {"role": "assistant", "content": "x"}}]}, (",", ":"), "\n\n")] * 3
    assert total(StreamCount(), events) == 3


def test_the_last_of_several_usages_counts() -> None:
    events = [event({"choices": [{}], "usage": {"completion_tokens": n}}, (",", ":"), "\n\n") for n in (1, 2)]
    assert total(StreamCount(), events) == 2


def test_an_answer_without_a_usage_has_no_count() -> None:
    assert total(PlainCount(), [b'{"choices":[]}']) == 0


def test_the_last_usage_counts_where_it_is_none_at_all_however_the_answer_is_cut() -> None:
    parts = [b'{"of":{"completion_tokens":7},', b'"usage":{"completion_tokens":0}}']
    assert total(PlainCount(), [b"".join(parts)]) == total(PlainCount(), parts) == 0


@pytest.mark.parametrize("size", [1000, 100_000])
def test_an_endless_line_is_not_kept(size: int) -> None:
    count = StreamCount()
    for _ in range(4_000_000 // size):
        count.feed(b"x" * size)
    assert len(count._tail) <= 2_000_000
    count.feed(b'\ndata: {"choices":[{"text":"a"}]}\n\n')
    assert count.total == 1
