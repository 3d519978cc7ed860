"""A training loop of accelerate's own under FSDP2, and the same loop in one process."""

import torch
from accelerate import Accelerator

from helpers import tiny_model, token_ids
from parallel.accelerated import launched, sharding
from parallel.trainer import adapted, adapter_of

STEPS = 2


def steps(model, optimizer, accelerator, first, rank):
    """STEPS steps of AdamW. Returns: the loss of each, over all processes."""
    size = accelerator.num_processes
    losses = []
    for step in range(first, first + STEPS):
        ids = token_ids(2, seed=step).chunk(size)[rank]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean"))
    return torch.stack(losses)


def loop(folder, rank=0):
    """Two steps, a saved state, two more steps; then the last two once more from the state.

    Returns: the losses and the adapter, of each time.
    """
    accelerator = Accelerator(cpu=True)

    def prepared():
        model = adapted("qwen3_moe", tiny_model("qwen3_moe")).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-2))

    model, optimizer = prepared()
    losses = [steps(model, optimizer, accelerator, 0, rank)]
    accelerator.save_state(folder / "state")
    results = {"saved": adapter_of(model)}
    losses.append(steps(model, optimizer, accelerator, STEPS, rank))
    results |= {"losses": torch.cat(losses), "adapter": adapter_of(model)}
    state = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(
        folder / "adapter", state_dict=state, is_main_process=accelerator.is_main_process
    )
    accelerator.free_memory()

    model, optimizer = prepared()
    accelerator.load_state(folder / "state")
    results["losses again"] = steps(model, optimizer, accelerator, STEPS, rank)
    results["adapter again"] = adapter_of(model)
    return results


def under_fsdp(state_dict_type, **settings):
    def scenario(rank, folder):
        with launched(**sharding("qwen3_moe", state_dict_type), **settings):
            return loop(folder / f"loop {state_dict_type}", rank)

    return scenario
