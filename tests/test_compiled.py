"""Machine code on disk must never outlive the sources it was made from."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from besteffort.simulator import compiled

CALLEE = """
from folder.compiled import compiled
@compiled
def callee(x):
    return x + 1
"""
CALLER = """
from folder.compiled import compiled
from folder.callee import callee
@compiled
def caller(x):
    return 10 * callee(x)
"""
CALL = "from folder.caller import caller; print(caller(1), caller._cache_hits[caller.signatures[0]])"


def _call(root: Path) -> list[str]:
    """What the caller returns in a new process, and whether its machine code was on disk."""
    # Python's own files on disk are not what this is about.
    command = [sys.executable, "-B", "-c", CALL]
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.split()


def test_machine_code_is_kept_and_made_anew_after_a_change_in_another_file(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(compiled.__file__, folder / "compiled.py")
    (folder / "caller.py").write_text(CALLER)
    callee = folder / "callee.py"
    callee.write_text(CALLEE)
    assert _call(tmp_path) == ["20", "0"]
    assert _call(tmp_path) == ["20", "1"]
    # As an upgrade may do it: neither size nor time stamp tell.
    before = callee.stat()
    callee.write_text(CALLEE.replace("x + 1", "x + 2"))
    os.utime(callee, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert _call(tmp_path) == ["30", "0"]
