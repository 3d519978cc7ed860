"""Runs a script under FSDP or DeepSpeed on a CPU: python -m parallel.on_cpu SCRIPT ARGUMENTS."""

import os
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from transformers import TrainingArguments

from parallel.accelerated import deepspeed_on_cpu, fsdp_on_cpu


@contextmanager
def without_use_cpu():
    """Within this context a Trainer does not ask for the CPU, where accelerate drops DeepSpeed."""
    post_init = TrainingArguments.__post_init__

    def cleared(self):
        self.use_cpu = False
        post_init(self)

    with mock.patch.object(TrainingArguments, "__post_init__", cleared), deepspeed_on_cpu():
        yield


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    # as Python does for a script
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    engine = fsdp_on_cpu
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        engine = without_use_cpu
    with engine():
        runpy.run_path(sys.argv[0], run_name="__main__")
