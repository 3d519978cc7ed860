"""bitsandbytes' 8-bit AdamW trains an experts layer on a CUDA device.

It writes A and B through their addresses, so PyTorch does not see that they changed. What is kept
between calls (recorded launches, CUDA graphs) must not hold their old numbers.
"""

import copy

import pytest
import torch

from gpu.layers import adapted, inputs
from helpers import QWEN3_MOE
from helpers.optimizers import trained_in_8bit
from peft_moe_lora import quantize_experts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("experts", [None, "nf4"])
# few rows take other kernels than many
@pytest.mark.parametrize("tokens", [40, 2048])
def test_a_layer_is_trained_as_in_fp32_and_computes_what_was_written(experts, tokens):
    models = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        model, _ = adapted(*QWEN3_MOE, torch.bfloat16, backend=backend)
        if experts:
            quantize_experts(model, experts)
        models.append(model)
    model, plain = models
    args = inputs(torch.bfloat16, tokens)

    def loss_of(model):
        return model(*args).float().square().mean()

    trained = trained_in_8bit(model, loss_of, plain)
    # the same numbers at other addresses, of which nothing was recorded
    fresh = copy.deepcopy(model)
    pairs = zip(fresh.parameters(), trained.parameters(), strict=True)
    with torch.no_grad():
        for parameter, written in pairs:
            if parameter.requires_grad:
                parameter.copy_(written)
        assert torch.equal(trained(*args), fresh(*args))
        assert not torch.equal(trained(*args), model(*args))
