"""What each process of test_across.py runs: an adapter goes from every engine to every engine."""

import os
from functools import partial

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from helpers import fill_adapter, token_ids
from parallel.expert_parallel import MODES, base, configured
from parallel.fully_sharded import shard
from parallel.zero import settings, started
from peft_moe_lora.parallel.sharding import whole


def on_one(folder, load):
    return load(base("qwen3_moe", folder, torch.float32))


def on_ddp(folder, load):
    model = on_one(folder, load)
    DistributedDataParallel(model)
    return model


def on_fsdp2(folder, load):
    return shard(on_one(folder, load))


def on_fsdp2_afterwards(folder, load):
    return load(shard(base("qwen3_moe", folder, torch.float32)))


def on_zero3(folder, load):
    # DeepSpeed asks for what its launcher would set
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    model = on_one(folder, load)
    model.enable_input_require_grads()
    started(model, settings(3))
    return model


def divided(**sizes):
    return lambda folder, load: load(base("qwen3_moe", folder, torch.float32, **sizes))


ENGINES = {
    "one process": on_one,
    "DDP": on_ddp,
    "FSDP2": on_fsdp2,
    "FSDP2, attached afterwards": on_fsdp2_afterwards,
    "ZeRO-3": on_zero3,
    "expert parallelism": divided(**MODES["all_reduce"]),
    "expert parallelism over FSDP2": divided(**MODES["over fsdp"]),
    "tensor parallelism": divided(tp_size=2),
}
# every process has the whole adapter, and the first one alone writes
WHOLE = ("one process", "DDP")


def wanted(folder, seed):
    """An adapter in one process, with random A and B."""
    model = get_peft_model(base("qwen3_moe", folder, torch.float32), config()).eval()
    fill_adapter(model, seed=seed)
    return model


def config():
    return configured("qwen3_moe", target_modules="with router")


def filled(seed, folder):
    state = get_peft_model_state_dict(wanted(folder, seed))

    def load(model):
        model = get_peft_model(model, config())
        set_peft_model_state_dict(model, {key: value.clone() for key, value in state.items()})
        return model

    return load


def saved_in(folder, name):
    return folder / f"saved by {name}"


def logits(model):
    with torch.no_grad():
        return whole(model(input_ids=token_ids(), use_cache=False).logits)


def saves(name, seed):
    def scenario(rank, folder):
        model = ENGINES[name](folder, filled(seed, folder)).eval()
        if rank == 0 or name not in WHOLE:
            model.save_pretrained(saved_in(folder, name))
        dist.barrier()
        return {"found": logits(model), "expected": logits(wanted(folder, seed))}

    return scenario


def loads(name):
    """What the adapters of all engines give on this one."""

    def scenario(rank, folder):
        outcomes = {}
        for seed, other in enumerate(ENGINES):
            load = partial(
                PeftModel.from_pretrained, model_id=saved_in(folder, other), is_trainable=True
            )
            found = logits(ENGINES[name](folder, load).eval())
            outcomes[other] = (found, logits(wanted(folder, seed)))
        return outcomes

    return scenario


SCENARIOS = {
    **{f"{name} saves": saves(name, seed) for seed, name in enumerate(ENGINES)},
    **{f"{name} loads": loads(name) for name in ENGINES},
}
