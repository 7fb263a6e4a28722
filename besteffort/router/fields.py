"""The fields of a JSON object that somebody sent: names, and values as the bytes that were written."""

import itertools
import json

import msgspec

_DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_MAX_FIELDS = 1_000  # each costs some 200 bytes, and may be told in 8
_FEW = 64 * 1024  # bytes: the fields that are in so little are read in no time
_MAX_LENIENT = 256 * 1024  # bytes: what is read as Python would takes thirty times as much memory

Fields = dict[str, msgspec.Raw]


def read_fields(data: bytes) -> Fields:
    """Raises ValueError: it is no JSON object, or deeper or of more fields than any is."""
    try:
        # There is a colon for each field at least.
        has_few = len(data) <= _FEW or data.count(b":") <= _MAX_FIELDS
        fields = _DECODER.decode(data) if has_few else _read_counting(data)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except msgspec.DecodeError:
        fields = _read_leniently(data)
    if len(fields) > _MAX_FIELDS:
        raise ValueError("too many fields")
    return fields


class _Name(str):
    """Of a field, that somebody counts."""

    __slots__ = ()


class _TooManyError(Exception):
    """No ValueError, which msgspec would take for its own."""


def _read_counting(data: bytes) -> Fields:
    """As the decoder does, but it ends at the first field that is too many: millions would take seconds.

    Raises msgspec.DecodeError, or ValueError.
    """
    numbers = itertools.count(1)

    def name(kind: type, text: str) -> _Name:
        if next(numbers) > _MAX_FIELDS:
            raise _TooManyError
        return _Name(text)

    try:
        fields = msgspec.json.decode(data, type=dict[_Name, msgspec.Raw], dec_hook=name)
    except _TooManyError:
        raise ValueError("too many fields") from None
    return {str(key): value for key, value in fields.items()}


def _read_leniently(data: bytes) -> Fields:
    """NaN, infinities and the like are not JSON, but Python clients write them and vLLM reads them."""
    if len(data) > _MAX_LENIENT:
        raise ValueError("not JSON, and too long to be read otherwise")
    try:
        value = json.loads(data.decode())
        if not isinstance(value, dict):
            raise ValueError("not an object")
        fields = {key: msgspec.Raw(json.dumps(part).encode()) for key, part in value.items()}
    except RecursionError:
        raise ValueError("nested too deep") from None
    "".join(value).encode()  # raises ValueError where a key is nothing that can be sent on
    if isinstance(value.get("model"), float):  # perhaps NaN
        raise ValueError("a number as its model")
    return fields
