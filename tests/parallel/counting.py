"""Scenarios of test_statistics.py: where tokens go, counted in models of several processes."""

import torch
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers.trainer_callback import TrainerState

from helpers import fill_adapter, tiny_model, token_ids
from parallel.expert_parallel import MODES, base, configured
from parallel.fully_sharded import shard
from peft_moe_lora.stats.callback import ExpertLoadCallback
from peft_moe_lora.stats.load import expert_load
from peft_moe_lora.stats.select import select_experts

# a mode's keys are the arguments of DistributedConfig; a process's batches have its own lengths
DIVIDED = {**MODES, "tensor parallel": {"tp_size": 2}}


def batches_of(number):
    return [token_ids(2, 7 + 3 * number, seed=50 + number), token_ids(1, 5, seed=60 + number)]


def counted(model, batches):
    """Everything that counts, for batches of this process."""
    callback = ExpertLoadCallback()
    # no process reports anything
    state = TrainerState(is_world_process_zero=False)
    callback.on_train_begin(None, state, None, model=model.train())
    for ids in batches:
        model(input_ids=ids, use_cache=False)
    callback.on_train_end(None, state, None)
    return {"callback": callback.total.counts, **evaluated(model.eval(), batches)}


def evaluated(model, batches):
    return {
        "expert_load": expert_load(model, batches).counts,
        "tokens": select_experts(model, batches, score="tokens", top=2),
        "gates": select_experts(model, batches, score="gates", threshold=0.6),
    }


def of_one_process(model, number_of_batches):
    batches = [ids for number in range(number_of_batches) for ids in batches_of(number)]
    return evaluated(model.eval(), batches)


def counts(mode, adapter):
    def scenario(rank, folder):
        models = [
            base("qwen3_moe", folder, torch.float32),
            base("qwen3_moe", folder, torch.float32, **mode),
        ]
        if adapter:
            config = configured("qwen3_moe", target_modules="with router")
            models = [get_peft_model(model, config) for model in models]
        number = rank // mode.get("tp_size", 1)
        return {
            "found": counted(models[1], batches_of(number)),
            "expected": of_one_process(models[0], mode.get("fsdp_size", 1)),
        }

    return scenario


def counts_under(wrap):
    def scenario(rank, folder):
        models = [tiny_model("qwen3_moe") for _ in range(2)]
        models = [get_peft_model(model, configured("qwen3_moe")) for model in models]
        for model in models:
            fill_adapter(model)
        return {
            "found": counted(wrap(models[1]), batches_of(rank)),
            "expected": of_one_process(models[0], 2),
        }

    return scenario


SCENARIOS = {"FSDP2": counts_under(shard), "DDP": counts_under(DistributedDataParallel)}
for name, mode in DIVIDED.items():
    SCENARIOS[name] = counts(mode, adapter=True)
    SCENARIOS[f"{name}, no adapter"] = counts(mode, adapter=False)
