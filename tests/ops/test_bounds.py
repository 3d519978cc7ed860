"""No kernel reads or writes past an end of its tensors, in the interpreter: `guarded` dies of it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(mode):
    return subprocess.run([sys.executable, HERE / "guarded.py", mode], capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize("mode", ["end", "front"])
def test_kernels_stay_within_their_tensors(mode):
    done = run(mode)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_row_too_far_is_found():
    assert run("broken").returncode == -signal.SIGSEGV
