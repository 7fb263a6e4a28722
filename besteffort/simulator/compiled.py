"""Numba with a cache that notices every change.

Numba keeps machine code beside the sources, and looks only at the time stamp of the file of the function
that Python calls: a change in a function that is called from there would go unnoticed. Here all
machine code is made anew after a change in any file of this folder.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from numba import config, njit

_Function = TypeVar("_Function", bound=Callable[..., Any])

_FILES = sorted(Path(__file__).parent.glob("*.py"))
_SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in _FILES)).hexdigest()


def compiled(function: _Function) -> _Function:
    """`njit` that keeps the function's type; inlined, since a call counts references to every array."""
    return cast(_Function, _cached(njit(error_model="numpy", forceinline=True, nogil=True)(function)))


def compiled_apart(function: _Function) -> _Function:
    """The same without inlining, for what is long and called from several places."""
    return cast(_Function, _cached(njit(error_model="numpy", nogil=True)(function)))


def _cached(dispatcher: Any) -> Any:
    if not config.DISABLE_JIT:
        dispatcher.enable_caching()
        # Numba has no public way to say what a cached function depends on.
        dispatcher._cache._cache_file._source_stamp = _SOURCES
    return dispatcher
