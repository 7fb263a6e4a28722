"""The body of a completion request: read as far as routing needs, all else untouched."""

import re
from functools import lru_cache
from typing import Any

import msgspec

from besteffort.router.fields import read_fields

_ENCODER = msgspec.json.Encoder()
_LIST_OF_PROMPTS = re.compile(rb'\[\s*["\[]')  # one prompt may be a list as well, of tokens
_MAX_NUMBER = 2**31 - 1  # of tokens or answers
_MAX_SCALAR = 1_000  # bytes of JSON that a name or a number is read from
_NUM_NAMES = 256  # of models, that are kept as JSON
_MUCH = 64 * 1024  # bytes: in more there may be so many prompts that to make each an object holds up everyone


class RequestBody:
    """A JSON object whose values stay the bytes that the client wrote, but for `model`.

    Of a key that is there twice the last counts, as for vLLM.
    """

    def __init__(self, data: bytes) -> None:
        """Raises ValueError: it is not a JSON object in UTF-8, or deeper or of more fields than any is, or
        its model is nothing that JSON knows. Whatever is read of it afterwards raises nothing.
        """
        if not data.isascii():
            data.decode()  # raises ValueError where it is not UTF-8; its values stay parts of `data`
        self._fields = read_fields(data)
        self._has_lists = data.find(b"[") >= 0
        model = self._fields.get("model")
        self.model = None if model is None else _read_model(model)
        """None if it is missing; of one that is too long to be any, its beginning"""

    @property
    def num_answers(self) -> int:
        """`n` for each prompt; what makes no sense is the engine's to refuse, and counts as one."""
        n, prompt = self._fields.get("n"), self._fields.get("prompt")
        number = 1
        if n is not None and isinstance(given := _read(n), int) and given > 1:
            number = min(given, _MAX_NUMBER)
        if self._has_lists and prompt is not None and (begun := _LIST_OF_PROMPTS.match(prompt)):
            number *= _num_prompts(prompt, are_tokens=begun[0].endswith(b"["))
        return number

    @property
    def prompt(self) -> memoryview | None:
        """The JSON of the prompt or the messages; None if there are none."""
        raw = self._fields.get("prompt") or self._fields.get("messages")
        return None if raw is None else memoryview(raw)

    @property
    def max_tokens(self) -> int | None:
        """How many tokens the client wants at most; None if it does not say."""
        raw = self._fields.get("max_completion_tokens") or self._fields.get("max_tokens")
        value = None if raw is None else _read(raw)
        if not isinstance(value, int) or value <= 0:
            return None
        return value if value < _MAX_NUMBER else _MAX_NUMBER  # quicker than `min`

    @property
    def is_streamed(self) -> bool:
        """Whether the client wants a stream."""
        raw = self._fields.get("stream")
        return raw is not None and _read(raw) is True

    def for_engine(self, served_name: str) -> bytes:
        self._fields["model"] = _as_json(served_name)
        return _ENCODER.encode(self._fields)

    def let_go(self) -> None:
        """Of all of it: it goes to no engine any more."""
        self._fields = {}


@lru_cache(_NUM_NAMES)
def _as_json(name: str) -> msgspec.Raw:
    return msgspec.Raw(_ENCODER.encode(name))


def _read_model(raw: msgspec.Raw) -> Any:
    """Raises ValueError."""
    value = memoryview(raw)
    if len(value) > _MAX_SCALAR:
        return str(value[:_MAX_SCALAR], errors="replace")
    return msgspec.json.decode(raw)


def _read(raw: msgspec.Raw) -> Any:
    """A number or a boolean. None where it is too long for one, or nothing that JSON knows: NaN, 1e400."""
    if len(memoryview(raw)) > _MAX_SCALAR:
        return None
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        return None


def _num_prompts(prompts: msgspec.Raw, *, are_tokens: bool) -> int:
    """At least 1. Of a long list the brackets are counted, or the quotes that no backslash stands before: as
    good as exact, and in a tenth of the time."""
    text = bytes(prompts)
    if len(text) > _MUCH:
        number = text.count(b"[") - 1 if are_tokens else (text.count(b'"') - text.count(b'\\"')) // 2
        return max(1, number)
    try:
        return max(1, len(msgspec.json.decode(text, type=list[msgspec.Raw])))
    except (msgspec.DecodeError, RecursionError):
        return 1
