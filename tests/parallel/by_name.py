"""What each process of test_by_name.py runs: frozen experts that are divided among processes.

The model has no adapter on its experts; its config names this package's implementation.
"""

import torch
from torch.distributed.fsdp import fully_shard

from helpers import grads_of, tiny_model, token_ids
from parallel.expert_parallel import MODES as EXPERT_PARALLEL
from parallel.expert_parallel import base
from peft_moe_lora.layers import own

NAME = "moe_lora"
FAMILIES = ("qwen3_moe", "gpt_oss")
MODES = {**EXPERT_PARALLEL, "features": {"tp_size": 2}}


def compared(alone, divided):
    """The logits of a divided model and of one process.

    The count shows that this package computed the experts.
    """
    alone.set_experts_implementation("eager")
    divided.set_experts_implementation(NAME)
    calls = []
    compute = own.compute

    def counted(module, *args, **options):
        calls.append(module)
        return compute(module, *args, **options)

    own.compute = counted
    try:
        with torch.no_grad():
            found = divided.requires_grad_(False)(input_ids=token_ids(), use_cache=False).logits
    finally:
        own.compute = compute
    with torch.no_grad():
        expected = alone(input_ids=token_ids(), use_cache=False).logits
    return {"logits": (found, expected), "calls": len(calls)}


def by_name(family, mode):
    def scenario(rank, folder):
        alone = base(family, folder, torch.float32).eval()
        return compared(alone, base(family, folder, torch.float32, **mode).eval())

    return scenario


def fully_sharded(family, before):
    """Named before or after the model is sharded; gradients pass through the experts."""

    def scenario(rank, folder):
        alone = tiny_model(family)
        divided = tiny_model(family)
        if before:
            divided.set_experts_implementation(NAME)
        for block in divided.model.layers:
            fully_shard(block)
        fully_shard(divided)
        found = compared(alone, divided)
        embedded = alone.get_input_embeddings()(token_ids()).detach()
        wanted = []
        for model in (divided, alone.requires_grad_(False)):
            x = embedded.clone().requires_grad_()
            _, (dx,) = grads_of(
                lambda m=model, x=x: m(inputs_embeds=x, use_cache=False).logits, [x]
            )
            wanted.append(dx)
        found["gradient"] = tuple(wanted)
        return found

    return scenario


SCENARIOS = {
    **{
        f"{family} {name}": by_name(family, mode)
        for family in FAMILIES
        for name, mode in MODES.items()
    },
    **{
        f"{family} fsdp, named {when}": fully_sharded(family, when == "before")
        for family in FAMILIES
        for when in ("before", "after")
    },
}
