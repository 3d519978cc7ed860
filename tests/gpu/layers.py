"""One experts layer of order-one numbers on a CUDA device, and one step of it."""

from contextlib import contextmanager

import torch

from helpers import FUSED_KINDS, Holder, build_experts
from peft_moe_lora import MoELoraConfig

E, H, I, R, TOP_K, T = 8, 256, 128, 16, 2, 300  # noqa: E741 I is the glossary's letter
# and gelu, which the kernels have too
FAMILIES = [*FUSED_KINDS, ("gemma4", "Gemma4TextExperts")]
# rounding where the plain path happens to be exact, relative to the largest value
ATOL = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def adapted(family, name, dtype, **config):
    """An experts module on the GPU with a random adapter that changes much of its output."""
    from peft import get_peft_model

    experts = build_experts(family, name, H, I, E).to("cuda", dtype)
    settings = {"r": R, "lora_alpha": R, "target_modules": ["experts"], **config}
    model = get_peft_model(Holder(experts), MoELoraConfig(**settings))
    layer = model.base_model.model.experts
    with torch.no_grad():
        for side, pairs in (("A", layer.lora_A), ("B", layer.lora_B)):
            for p in pairs["default"].values():
                fan_in = p.shape[1] if side == "A" else R
                p.copy_(torch.randn_like(p) * fan_in**-0.5)
    return model, layer


def inputs(dtype, tokens=T, weights_dtype=torch.float32):
    x = torch.randn(tokens, H, device="cuda", dtype=dtype)
    index = torch.rand(tokens, E, device="cuda").topk(TOP_K).indices
    return x, index, torch.rand(tokens, TOP_K, device="cuda", dtype=weights_dtype)


def step(model, layer, x, index, weights):
    """Output and gradients of one forward and backward, by name."""
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    layer.zero_grad()
    out = model(x, index, weights)
    torch.manual_seed(7)
    out.backward(torch.randn_like(out))
    found = {"output": out.detach(), "x": x.grad, "top_k_weights": weights.grad}
    return found | {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}


@contextmanager
def no_wait_for_the_device():
    """An operation that waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
