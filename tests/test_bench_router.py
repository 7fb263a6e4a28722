"""`make bench-router` in its short form: it runs to its end, and its table has every row."""

import re
import subprocess
import sys

from tests.conftest import ROOT

OURS = (
    "no router",
    "besteffort",
    "with its decision log",
    "besteffort, round robin",
    "the same behind uvicorn",
)


def test_the_benchmark_of_routers_ends_with_a_figure_in_every_place() -> None:
    options = ["--rounds", "1", "--seconds", "0.3", "--no-install"]
    command = [sys.executable, "-m", "tests.benchmarks.router", *options]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stderr
    rows = {line[:24].strip(): line[24:].split() for line in ended.stdout.splitlines()}
    assert rows.keys() >= {*OURS}
    width = len(re.findall(r"\S+", "requests/s ratio p50 p99 CPU ratio ttft token failed"))
    for name, figures in rows.items():
        if name:  # else the head
            assert len(figures) == width, name
            assert float(figures[0]) > 0, name
            assert figures[-1] == "0", name
