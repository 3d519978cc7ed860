"""Whole models train as base + explicit delta does in plain PyTorch.

50 steps on CPython's documentation, one seed, the same batches and the same AdamW. Our route is
`get_peft_model`, as users call it. The other route calls the base model with
W + scaling * B[e] @ A[e] instead of every experts weight; A and B are its leaves, autograd does the
rest.
"""

import copy
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from families.off_interface import CONFIGS, deltas_of, off_interface_model, paths_of, with_deltas
from helpers import H, experts_adapter, experts_paths, moe_lora, tiny_families, tiny_model

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from texts import documentation

STEPS, VOCAB, SCALING = 50, 128, 2.0
FAMILIES = [*tiny_families(), *CONFIGS]
# a gate in the kernels; none; experts that are not on transformers' interface
COMPILED_FAMILIES = ["qwen3_moe", "nemotron_h", "llama4"]


@cache
def batches(size):
    """[STEPS, batch, length] ASCII codes of CPython's documentation."""
    text = "".join(documentation()).encode("ascii", "replace")
    return torch.tensor(list(text[: STEPS * size[0] * size[1]])).view(STEPS, *size)


def build(family):
    # with seed 0 two experts of jetmoe tie in all bits at step 40, and rounding decides
    if family in CONFIGS:
        return off_interface_model(family, vocab_size=VOCAB, seed=1)
    model = tiny_model(family, vocab_size=VOCAB, seed=1)
    # plain PyTorch, expert by expert: grouped_mm needs strides of 16 bytes
    model.set_experts_implementation("eager")
    return model


def loss_of(out, ids, readout):
    """Next-token loss; for a model without a head a fixed matrix is the head."""
    logits = out.logits if hasattr(out, "logits") else out.last_hidden_state @ readout
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def train(call, parameters, ids, dtype):
    """The loss of each step."""
    readout = torch.randn(H, VOCAB, generator=torch.Generator().manual_seed(6)) * H**-0.5
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
    for batch in ids:
        loss = loss_of(call(batch), batch, readout.to(ids.device, dtype))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


def curves(family, size, device="cpu", dtype=torch.float32, compiler=None, **config):
    """Losses of our route and the explicit one from the same A and B; `size` is batch, length.

    With a compiler, a backend of torch.compile, our route is compiled.
    """
    base = build(family).to(device, dtype)
    model = moe_lora(copy.deepcopy(base), randomize=False, target_modules=None, **config).train()
    paths = paths_of(base) if family in CONFIGS else experts_paths(base)
    pairs = {
        path: {
            p: tuple(t.detach().clone().requires_grad_() for t in pair) for p, pair in found.items()
        }
        for path in paths
        if (found := experts_adapter(model, path))
    }
    assert pairs.keys() == set(paths)
    base.requires_grad_(False).train()

    def explicit(ids):
        changed = {}
        for path, adapters in pairs.items():
            experts = base.get_submodule(path)
            num_experts = (
                next(iter(adapters.values()))[0].shape[0] // model.peft_config["default"].r
            )
            deltas = {p: d.to(dtype) for p, d in deltas_of(adapters, num_experts, SCALING).items()}
            changed |= {
                f"{path}.{name}": w for name, w in with_deltas(family, experts, deltas).items()
            }
        return functional_call(base, changed, kwargs={"input_ids": ids, "use_cache": False})

    leaves = [t for adapters in pairs.values() for pair in adapters.values() for t in pair]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(leaves)
    ids = batches(size).to(device)
    right = train(explicit, leaves, ids, dtype)
    if compiler is not None:
        torch.compiler.reset()
        model.compile(backend=compiler)
    ours = train(lambda batch: model(input_ids=batch, use_cache=False), trained, ids, dtype)
    return ours, right


def check(ours, right, tolerance):
    assert right[-5:].mean() < 0.85 * right[:5].mean(), (
        "the adapter learns nothing: equal curves would say nothing"
    )
    error = (ours - right).abs() / right
    assert error.max() <= tolerance, (
        f"the loss curves are {error.max():.1e} apart, at step {error.argmax()}"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_base_plus_delta(family):
    check(*curves(family, (4, 32)), 1e-4)


@pytest.mark.long
@pytest.mark.parametrize("family", COMPILED_FAMILIES)
def test_losses_of_a_compiled_model_are_those_of_base_plus_delta(family):
    check(*curves(family, (4, 32), compiler="aot_eager"), 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("family", COMPILED_FAMILIES)
def test_losses_compiled_on_the_kernels_are_those_of_base_plus_delta(family):
    check(*curves(family, (16, 64), "cuda", compiler="inductor", backend="triton"), 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_on_the_kernels_are_those_of_base_plus_delta(family, dtype, tolerance):
    # 1,024 tokens per step: in bf16 a few change experts, which the mean has to hide
    check(*curves(family, (16, 64), "cuda", dtype, backend="triton"), tolerance)
