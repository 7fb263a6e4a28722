"""A warning where a profile was measured on something else than what is here now."""

from pathlib import Path

from besteffort.artifacts.profile_file import load_samples
from besteffort.fleet import Fleet
from besteffort.profiling import doubts
from besteffort.progress import Progress


def warn_if_stale(profile: Path, fleet: Fleet, progress: Progress) -> None:
    """A line for each thing that is not as it was.

    Raises:
        ProfileError: the file is missing or malformed.
    """
    for line in doubts(profile, load_samples(profile)[1], fleet):
        progress.say(f"warning: {line}")
