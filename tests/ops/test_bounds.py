"""No kernel reads or writes past an end of its tensors in the interpreter: that kills `guarded`."""

import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    Version(version("triton")) < Version("3.9") and Version(version("numpy")) >= Version("2.4"),
    reason="an older Triton's interpreter makes an int of an array of one, which numpy 2.4 refuses",
)


def run(mode):
    tests = str(HERE.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, HERE / "guarded.py", mode]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize("mode", ["end", pytest.param("front", marks=pytest.mark.long)])
def test_kernels_stay_within_their_tensors(mode):
    done = run(mode)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_row_too_far_is_found():
    assert run("broken").returncode == -signal.SIGSEGV
