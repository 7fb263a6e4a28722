"""Which policies a router that runs may be told to take, and from where."""

import re
from collections.abc import Callable
from pathlib import Path

from besteffort.errors import PolicyError
from besteffort.policies import BUILT_IN, Policy

_SUFFIX = ".safetensors"
_MAX_LENGTH = 256
_STATIC = "static:"
# No part begins with a dot, so that none leads up or to what is half written.
_IN_FOLDER = re.compile(r"(?:\w[\w.-]*/)*\w[\w.-]*\.safetensors", re.ASCII)


class PolicySource:
    """Built-in policies, files in the fleet's folder, and the policy given at the start: nothing else.

    Whoever holds the admin key chooses among what the operator put there, and reads no other file.
    """

    def __init__(self, given: str, folder: Path, load: Callable[[str], Policy]) -> None:
        self.given = given
        self._folder = folder
        self._load = load

    def load(self, name: str) -> Policy:
        """A new policy, which remembers nothing; takes a while.

        Args:
            name: built-in, or `given`, or the path of a `.safetensors` file from the fleet's folder on.

        Raises:
            InputError: it is none of these, or cannot be used.
        """
        if name == self.given or name in BUILT_IN or self._is_static(name):
            return self._load(name)
        return self._load(str(self._path(name)))

    def _is_static(self, name: str) -> bool:
        return name.startswith(_STATIC) and len(name) <= _MAX_LENGTH and name.isprintable()

    def _path(self, name: str) -> Path:
        folder = self._folder.resolve()
        if len(name) <= _MAX_LENGTH and _IN_FOLDER.fullmatch(name):
            path = (folder / name).resolve()  # a link in the folder leads where it leads, but not out of it
            if path.is_relative_to(folder):
                return path
        shown = name if len(name) <= _MAX_LENGTH else name[:_MAX_LENGTH] + "..."
        raise PolicyError(
            f"policy {shown!r}: give the one of the start, the path of a {_SUFFIX} file from {self._folder} "
            f"on, or one of {', '.join(BUILT_IN)}"
        )
