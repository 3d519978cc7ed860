"""Runs a script in which accelerate shards on a CPU: python -m parallel.on_cpu SCRIPT ARGUMENTS."""

import runpy
import sys
from pathlib import Path

from parallel.accelerated import fsdp_on_cpu

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    # as Python does for a script
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    with fsdp_on_cpu():
        runpy.run_path(sys.argv[0], run_name="__main__")
