"""What can go wrong, in the order in which data meet it.

Every message is one line that names the file or the value and says how to mend it. The command
line prints it without a traceback and exits with `exit_status`.
"""


class BestEffortError(Exception):
    """Anything that `besteffort` can explain. Exit status 1."""

    exit_status = 1


class InputError(BestEffortError):
    """What the user gave cannot be used: a file, an option, a name. Exit status 2."""

    exit_status = 2


class UsageError(InputError):
    """An option or an argument that does not fit the others, or the machine."""


class FleetError(InputError):
    """`fleet.toml` is missing, malformed or inconsistent."""


class TraceError(InputError):
    """A trace cannot be read, imported, or sent to this fleet."""


class ProfileError(InputError):
    """`profile.parquet` is missing, malformed, or of another fleet."""


class RewardsError(InputError):
    """`rewards.parquet` is missing, malformed, or of another fleet."""


class PolicyError(InputError):
    """A policy's name or file cannot be used with this fleet."""


class GateError(BestEffortError):
    """A trained policy loses against a simpler one."""


class EngineError(BestEffortError):
    """A model server could not be started, or died, or does not answer."""
