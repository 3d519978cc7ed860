"""What each process of test_data_parallel.py runs.

    python data_parallel.py RANK WORLD_SIZE FOLDER BACKEND

Every scenario trains a tiny model for some steps under DistributedDataParallel with
`find_unused_parameters=False`, each rank on its own sequence. The results go to
FOLDER/rank<RANK>.pt.
"""

import contextlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from helpers import UNFUSED_FAMILIES, adapter_parameters, moe_lora, tiny_model, token_ids
from peft_moe_lora import keep_experts
from peft_moe_lora.layers.layer import MoELoraLayer
from peft_moe_lora.parallel.batches import sum_over_batches
from peft_moe_lora.stats.watch import RoutingWatch

# many experts for few tokens: on each rank most get no rows
NUM_EXPERTS, LENGTH, STEPS, LEARNING_RATE = 16, 5, 3, 0.1
ATTENTION = ["experts", "q_proj", "o_proj"]
SCENARIOS = {
    "plain": {},
    "with attention": {"target_modules": ATTENTION},
    "recompute": {"recompute": True},
    "gpt_oss": {"family": "gpt_oss"},
    "non-reentrant checkpointing": {"use_reentrant": False, "target_modules": ATTENTION},
    "reentrant checkpointing": {"use_reentrant": True, "target_modules": ATTENTION},
    "experts kept": {"use_reentrant": False, "keeps": True, "target_modules": ATTENTION},
    "accumulation": {"micro_batches": 2},
}
for family in UNFUSED_FAMILIES:
    SCENARIOS["unfused"] = {"family": family}


def build(device, family="qwen3_moe", use_reentrant=None, keeps=False, micro_batches=1, **config):
    """The model of a scenario, the same in every process."""
    experts = "num_experts" if family == "qwen3_moe" else "num_local_experts"
    backend = "triton" if device.type == "cuda" else "torch"
    model = (
        moe_lora(tiny_model(family, **{experts: NUM_EXPERTS}), backend=backend, **config)
        .to(device)
        .train()
    )
    if use_reentrant is not None:
        model.enable_input_require_grads()
        kwargs = {"use_reentrant": use_reentrant}
        if keeps:
            kwargs["context_fn"] = keep_experts
        model.gradient_checkpointing_enable(kwargs)
    return model


def batches(step, ranks, micro_batches=1):
    """The micro-batches of one step, [len(ranks), LENGTH] token ids each."""
    return [
        torch.cat([token_ids(1, LENGTH, seed=100 * step + 10 * micro + rank) for rank in ranks])
        for micro in range(micro_batches)
    ]


def loss_of(model, ids):
    """A mean over tokens, for a model with a head and for one that ends in a norm."""
    out = model(input_ids=ids, use_cache=False)
    hidden = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return (hidden * torch.linspace(0, 1, hidden.shape[-1], device=hidden.device)).square().mean()


def train(model, parameters, device, ranks, micro_batches=1, **_):
    """STEPS of SGD on the sequences of `ranks`; returns the first step's gradients by name."""
    optimizer = torch.optim.SGD(parameters.values(), lr=LEARNING_RATE)
    first = None
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = batches(step, ranks, micro_batches)
        for i, ids in enumerate(parts):
            last = i == len(parts) - 1
            with (
                contextlib.nullcontext()
                if last or not hasattr(model, "no_sync")
                else model.no_sync()
            ):
                (loss_of(model, ids.to(device)) / len(parts)).backward()
        if first is None:
            first = {
                name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()
            }
        optimizer.step()
    return first


def count_rows(model, counts):
    """Hooks that add up in `counts` {layer: [E]} the rows each expert gets."""

    def count(name):
        def hook(module, args, kwargs):
            index = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
            counts[name] = counts.get(name, 0) + index.flatten().cpu().bincount(
                minlength=NUM_EXPERTS
            )

        return hook

    for name, module in model.named_modules():
        if isinstance(module, MoELoraLayer):
            module.register_forward_pre_hook(count(name), with_kwargs=True)


def main(rank, world_size, folder, backend):
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    results = {}
    for name, scenario in SCENARIOS.items():
        model, counts = build(device, **scenario), {}
        count_rows(model, counts)
        watch = RoutingWatch(model)
        parallel = DistributedDataParallel(
            model, device_ids=[rank] if backend == "nccl" else None, find_unused_parameters=False
        )
        parameters = adapter_parameters(model)
        first = train(parallel, parameters, device, [rank], **scenario)
        load = watch.take(sum_over_batches(model))
        results[name] = {"gradients": first, "parameters": parameters, "rows": counts, "load": load}
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
