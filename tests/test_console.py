"""What is said of the progress, where nobody can hear it."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from besteffort.cli.console import ConsoleProgress


@pytest.fixture(params=["nobody reads the pipe", "the disk is full", "it is closed"])
def broken(request: pytest.FixtureRequest) -> Iterator[IO[str]]:
    """Standard error as it must not be; pytest sets its own again before each test."""
    if request.param == "the disk is full":
        stream: IO[str] = Path("/dev/full").open("w")  # noqa: SIM115
    else:
        reader, writer = os.pipe()
        os.close(reader)
        stream = os.fdopen(writer, "w")
    if request.param == "it is closed":
        stream.close()
    yield stream
    try:
        stream.close()
    except OSError:
        assert request.param == "the disk is full"


def test_what_cannot_be_said_ends_nothing(broken: IO[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", broken)
    progress = ConsoleProgress()
    for _ in range(3):
        progress.say("a line" * 5000)
        with progress.bar("Starting", 2) as bar:
            bar.advance()
            bar.describe("half")


def test_standard_output_is_still_there_when_standard_error_is_not(
    broken: IO[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", broken)
    ConsoleProgress().say("a line")
    os.write(1, b"the result")
    assert capfd.readouterr().out == "the result"


def test_what_a_disk_with_room_takes_again_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        progress = ConsoleProgress()
        kept, full = os.dup(log.fileno()), os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, log.fileno())
        progress.say("lost or late")
        os.dup2(kept, log.fileno())
        progress.say("said")
        for descriptor in (kept, full):
            os.close(descriptor)
    assert (tmp_path / "log").read_text().endswith("said\n")
