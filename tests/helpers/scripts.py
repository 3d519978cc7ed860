"""Scripts and notebooks run as their users run them: from a shell, without a GPU or a network."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(command, ok=True, variables=None, **options):
    """What `command` printed and returned; it must succeed, or fail if `ok` is False.

    Args:
        command: the arguments of Python.
        ok: whether it must succeed.
        variables: further variables of the environment.
        options: of subprocess.run.
    """
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
        **(variables or {}),
    }
    # these are meant for the pytest that runs this test, not for one that it starts
    env = {name: value for name, value in env.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=500, check=False, **options
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def run_example(script, *arguments, ok=True):
    return run([EXAMPLES / script, *arguments], ok)
