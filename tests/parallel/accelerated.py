"""accelerate with FSDP in the processes of a gloo group, on a CPU, as `accelerate launch` sets it.

accelerate leaves FSDP out where it finds no accelerator, without a word. So it is told here that
there is one, after it has chosen the CPU as its device.
"""

import os
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

from helpers import tiny_model
from parallel.fully_sharded import is_block


@contextmanager
def fsdp_on_cpu():
    """Within this context accelerate does not leave FSDP out on a CPU."""
    init = PartialState.__init__

    def with_accelerator(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU
            # FSDP1 does not take a CPU with an index
            self.device = torch.device("cpu")

    with mock.patch.object(PartialState, "__init__", with_accelerator):
        yield


@contextmanager
def deepspeed_on_cpu():
    """Within this context accelerate counts the processes of DeepSpeed on a CPU, too."""
    backend = ("gloo", DistributedType.MULTI_CPU)
    with mock.patch.object(PartialState, "_prepare_backend", return_value=backend):
        yield


@contextmanager
def launched(**settings):
    """Within this context the environment is that of `accelerate launch`.

    Args:
        settings: of FSDP, as in a configuration file of accelerate without the prefix "fsdp_";
            none for a launch without FSDP.
    """
    environment = {
        "RANK": str(dist.get_rank()),
        "LOCAL_RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
        "LOCAL_WORLD_SIZE": str(dist.get_world_size()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "ACCELERATE_USE_CPU": "true",
    }
    if settings:
        environment["ACCELERATE_USE_FSDP"] = "true"
        # where it is not set, accelerate and transformers have different defaults
        settings.setdefault("cpu_ram_efficient_loading", False)
    for name, value in settings.items():
        environment[f"FSDP_{name.upper()}"] = str(value)
    with mock.patch.dict(os.environ, environment), fsdp_on_cpu():
        _forget()
        yield
        _forget()


def sharding(family, state_dict_type):
    """The settings of a configuration file of accelerate that shards every block by FSDP2."""
    blocks = {type(block).__name__ for block in tiny_model(family).modules() if is_block(block)}
    return {
        "version": 2,
        "state_dict_type": state_dict_type,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_cls_to_wrap": ",".join(sorted(blocks)),
    }


def _forget():
    """Forget the settings of an earlier Accelerator of this process; the group stays."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
