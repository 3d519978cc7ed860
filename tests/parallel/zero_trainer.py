"""The Trainer under DeepSpeed's ZeRO-2 and ZeRO-3; trainer.py has the numbers of one process."""

import os
from contextlib import contextmanager
from unittest import mock

import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from helpers import adapter_parameters
from parallel.accelerated import deepspeed_on_cpu
from parallel.trainer import KEEPS_THE_SECOND, adapted, losses_of, trainer_of
from parallel.zero import base, settings, values


def config_of(stage, **zero):
    """A configuration that takes from the Trainer's arguments what they say."""
    config = settings(stage, gradient_clipping="auto", train_micro_batch_size_per_gpu="auto")
    config["zero_optimization"] |= zero
    return config


def lives(family, stage, loaded_in_parts=False):
    """Train, go back to the second step, which was the best, and go on from its checkpoint."""

    def scenario(rank, folder):
        partitioned = settings(3) if loaded_in_parts else None
        out = folder / f"trainer_{family}_{stage}_{loaded_in_parts}"

        def trainer(folder, **arguments):
            model = adapted(family, base(family, folder.parent, partitioned))
            return trainer_of(
                model, folder, 1, use_cpu=False, deepspeed=config_of(stage), **arguments
            )

        with launched():
            first = trainer(out, **KEEPS_THE_SECOND)
            first.train()
            first.save_model(str(out / "model"))
            first.model.save_pretrained(out / "adapter")
            second = values(adapter_parameters(first.model))
            saved = {name: tensors_of(out / name) for name in ("model", "adapter", "checkpoint-2")}
            again = trainer(out.with_name(f"{out.name}_again"))
            again.train(resume_from_checkpoint=str(out / "checkpoint-2"))
        return {
            "losses": losses_of(first),
            "second": second,
            "saved": saved,
            "resumed": losses_of(again),
            "last": values(adapter_parameters(again.model)),
        }

    return scenario


def tensors_of(folder):
    """The tensors of an adapter file; keys as in a model."""
    dist.barrier()
    tensors = load_file(folder / "adapter_model.safetensors")
    return {_with_name(key): tensor for key, tensor in tensors.items()}


def _with_name(key):
    """A key with the adapter's name, second to last."""
    start, _, end = key.rpartition(".")
    return f"{start}.default.{end}"


@contextmanager
def launched():
    """Within this context the environment is that of a launcher."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    environment = {
        "RANK": str(dist.get_rank()),
        "LOCAL_RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
        "LOCAL_WORLD_SIZE": str(dist.get_world_size()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    with mock.patch.dict(os.environ, environment), deepspeed_on_cpu():
        yield
