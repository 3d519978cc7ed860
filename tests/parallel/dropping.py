"""Scenarios of test_tensor_parallel.py: dropout in models that transformers has divided.

The masks of divided experts are those of one process that draws the first process's seeds. A
process that has other columns than the others has a mask of its own for them: the model in one
process takes these masks side by side.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from helpers import I, adapter_parameters, fill_adapter
from parallel.expert_parallel import MODES, base, batch, configured
from peft_moe_lora.layers.factor import SharedDropout
from peft_moe_lora.layers.layer import MoELoraLayer
from peft_moe_lora.ops import reference
from peft_moe_lora.ops.dropout import Dropout, dropout_mask
from peft_moe_lora.parallel.sharding import whole
from peft_moe_lora.parallel.share import own_seeds

P = 0.4
TENSOR_PARALLEL = {"tp_size": 2}
EXPERTS = ("experts",)
ATTENTION = ("gate", "q_proj", "o_proj")


def masks_side_by_side(dropout, row_slot, width):
    """The masks of two processes that have half of the columns each."""
    halves = [
        dropout_mask(Dropout(dropout.p, own_seeds(dropout.seed, rank)), row_slot, width // 2)
        for rank in range(2)
    ]
    return torch.cat(halves, dim=1)


class SideBySide(SharedDropout):
    def forward(self, x):
        seed = torch.randint(2**31 - 1, (1,))
        rows = torch.arange(x.shape[:-1].numel())
        mask = masks_side_by_side(Dropout(self.p, seed), rows, x.shape[-1])
        return x * mask.to(x.dtype).view_as(x)


def _mask_of_features(dropout, row_slot, width):
    # I columns go into down, and each process has half of them
    of_width = masks_side_by_side if width == I else dropout_mask
    return of_width(dropout, row_slot, width)


@contextmanager
def drops_as_divided(model, mode):
    """The model in one process drops what the processes of a mode drop."""
    for path, layer in model.named_modules():
        if not hasattr(layer, "lora_dropout") or isinstance(layer, MoELoraLayer):
            continue
        kind = SideBySide if path.endswith("o_proj") else SharedDropout
        layer.lora_dropout["default"] = kind(P)
    of_features = _mask_of_features if mode == TENSOR_PARALLEL else dropout_mask
    with patch.object(reference, "dropout_mask", of_features):
        yield


def losses_and_gradients(model, rank=0, number=0, steps=2):
    losses = []
    for step in range(steps):
        # the seeds of the first process count
        torch.manual_seed(7 + step + 100 * rank)
        ids = batch(step, number)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    gradients = {name: whole(p.grad) for name, p in adapter_parameters(model).items()}
    return {"losses": torch.stack(losses), "gradients": gradients}


def two_models(folder, target_modules, mode, **changes):
    """An adapted model in one process, and one that is divided, with the same A and B."""
    config = configured("qwen3_moe", target_modules, lora_dropout=P, **changes)
    models = [base("qwen3_moe", folder), base("qwen3_moe", folder, **mode)]
    alone, divided = (get_peft_model(model, config).train() for model in models)
    fill_adapter(alone)
    set_peft_model_state_dict(divided, get_peft_model_state_dict(alone))
    return alone, divided


def drops_as_one_process(target_modules, mode, checkpointing=False, **changes):
    def scenario(rank, folder):
        alone, divided = two_models(folder, target_modules, mode, **changes)
        if checkpointing:
            divided.gradient_checkpointing_enable()
        undropped = losses_and_gradients(alone.eval())["losses"]
        alone.train()
        alone.zero_grad()
        with drops_as_divided(alone, mode):
            expected = losses_and_gradients(alone)
        found = losses_and_gradients(divided, rank)
        return {"found": found, "expected": expected, "undropped": undropped}

    return scenario


def repeats_under_checkpointing(rank, folder):
    """Under all_to_all a process has rows of its own, whose masks no other process knows."""
    mode = MODES["all_to_all"]
    alone, divided = two_models(folder, (*EXPERTS, *ATTENTION), mode)
    undropped = losses_and_gradients(alone.eval())["losses"]
    expected = losses_and_gradients(divided)
    divided.zero_grad()
    divided.gradient_checkpointing_enable()
    found = losses_and_gradients(divided)
    layer = next(module for module in divided.modules() if isinstance(module, MoELoraLayer))
    seeds = layer.share.seeds(torch.ones(2, 2, dtype=torch.long))
    others = [torch.empty_like(seeds) for _ in range(2)]
    dist.all_gather(others, seeds)
    return {
        "found": found,
        "expected": expected,
        "undropped": undropped,
        "own masks": not torch.equal(*others),
    }


ALL_REDUCE = MODES["all_reduce"]
AS_ONE_PROCESS = {
    "all_reduce": drops_as_one_process(EXPERTS, ALL_REDUCE),
    "all_reduce, checkpointing": drops_as_one_process(EXPERTS, ALL_REDUCE, checkpointing=True),
    "all_reduce, attention": drops_as_one_process((*EXPERTS, *ATTENTION), ALL_REDUCE),
    "tensor parallel": drops_as_one_process(EXPERTS, TENSOR_PARALLEL),
    "tensor parallel, recompute": drops_as_one_process(EXPERTS, TENSOR_PARALLEL, recompute=True),
    "tensor parallel, checkpointing": drops_as_one_process(
        EXPERTS, TENSOR_PARALLEL, checkpointing=True
    ),
    "tensor parallel, attention": drops_as_one_process((*EXPERTS, *ATTENTION), TENSOR_PARALLEL),
}
