"""bitsandbytes' 8-bit AdamW trains an adapter; on a CPU it runs as plain PyTorch."""

import pytest
from peft import get_peft_model

from helpers import outputs, tiny_model, token_ids
from helpers.optimizers import trained_in_8bit
from peft_moe_lora import MoELoraConfig, quantize_experts


def loss_of(model):
    ids = token_ids()
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.mark.parametrize("experts", [None, "nf4"])
def test_an_adapter_is_trained_as_in_fp32(experts):
    base = tiny_model()
    if experts:
        quantize_experts(base, experts)
    # tensors of 2,048 elements, whose moments stay in fp32, and of 7,680 to 15,360
    config = MoELoraConfig(r=64, lora_alpha=64, target_modules=["experts", "q_proj"])
    model = get_peft_model(base, config).train()
    before = outputs(model)
    trained = trained_in_8bit(model, loss_of)
    assert (outputs(trained) - before).norm() > 0.1 * before.norm()
