"""A step on the meta device takes what the same step takes on a CPU, and what shapes say."""

import dataclasses

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from helpers import causal_families, tiny_model
from peft_moe_lora import MoELoraConfig, functional
from peft_moe_lora.functional.whole import Inputs
from peft_moe_lora.ops import table_memory
from peft_moe_lora.ops.quantize import FORMATS, quantize
from peft_moe_lora.planning import step
from peft_moe_lora.planning.stand_ins import NAME, attention_stand_in
from peft_moe_lora.planning.step import Batch, run_step
from peft_moe_lora.planning.trace import Trace
from peft_moe_lora.planning.work import _backward

E, H, INNER, TOP_K, VOCABULARY, RANK = 8, 64, 32, 2, 256, 4
T = 2 * 128
BATCH = Batch(sequences=2, length=128, checkpointing=False, liger=False, experts=None)
ROWS = T * TOP_K


def config(layers=2, **changes):
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": H,
        "moe_intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": E,
        "num_experts_per_tok": TOP_K,
        "tie_word_embeddings": False,
    }
    return Qwen3MoeConfig(**sizes | changes)


def adapter(r=RANK, targets=("experts",)):
    return MoELoraConfig(r=r, lora_alpha=2 * r, target_modules=list(targets))


def taken(batch=BATCH, layers=2, r=RANK, targets=("experts",), **changes):
    return run_step(config(layers, **changes), adapter(r, targets), batch)


@pytest.mark.parametrize("checkpointing", [False, True, "keep_experts"])
def test_memory_is_that_of_the_same_step_on_a_cpu(checkpointing, monkeypatch):
    """All bytes that forward keeps, and those at the end: the code is the same, but the kernels.

    On a CPU the twins of the kernels run, whose buffers are others, so peaks differ.
    """
    # the stand-in of attention computes nothing, so no second run repeats the first one
    monkeypatch.setattr(functional.checkpointing, "_check_same_experts", lambda *_: None)
    batch = dataclasses.replace(BATCH, checkpointing=bool(checkpointing))
    found = {}
    for device in ("meta", "cpu"):
        trace = Trace()
        with attention_stand_in(trace):
            with torch.device(device):
                base = AutoModelForCausalLM.from_config(
                    config(), dtype=torch.bfloat16, attn_implementation=NAME
                )
            model = get_peft_model(
                base.requires_grad_(False), adapter(targets=("experts", "q_proj"))
            )
            if checkpointing:
                step._enable_checkpointing(base, checkpointing == "keep_experts")
            base.enable_input_require_grads()
            windows = step._run(model.train(), batch, trace)
        found[device] = windows.kept, trace.gradients, trace.live
    assert found["meta"] == found["cpu"]
    kept, gradients, live = found["meta"]
    assert kept > 2 * T * H * 2
    assert live >= gradients > 0


def test_weights_pairs_and_optimizer_are_those_of_the_shapes():
    found = taken()
    attention = (4 * 16) * H * 2 + (2 * 16) * H * 2 + 2 * 16
    experts = E * (3 * INNER * H)
    layer = attention + experts + E * H + 2 * H
    weights = 2 * (2 * VOCABULARY * H + 2 * layer + H)
    pairs = 2 * RANK * E * (H + 2 * INNER + INNER + H)
    # buffers of the rotary embedding
    assert found.weights == pytest.approx(weights, abs=256)
    assert found.trainable == pairs
    assert (found.pairs, found.optimizer) == (4 * pairs, 8 * pairs)
    assert found.largest_layer == 2 * layer + 4 * pairs // 2


def test_a_checkpointed_layer_keeps_its_input_alone():
    checkpointed = dataclasses.replace(BATCH, checkpointing=True)
    three, four = (taken(checkpointed, layers=n) for n in (3, 4))
    assert four.activations - three.activations == T * H * 2


def test_experts_that_run_once_keep_rows_of_rank_r_and_the_routing():
    checkpointed = dataclasses.replace(BATCH, checkpointing=True)
    keeping = dataclasses.replace(checkpointed, keep_experts=True)
    differences = []
    for n in (3, 4):
        plain, kept = (taken(batch, layers=n) for batch in (checkpointed, keeping))
        differences.append(kept.activations - plain.activations)
        assert kept.seconds["H200"] < plain.seconds["H200"]
    # xa and ha in bf16, with 8 columns for rank 4 (`ops.ranks`)
    rows = 2 * ROWS * 8 * 2
    # expert_offsets, row_token, row_slot, slot_row in int32; top_k_index in int64; table of tiles
    routing = 4 * (E + 1 + 3 * ROWS) + 8 * ROWS
    routing += table_memory(torch.empty(T, TOP_K), E).nbytes
    assert differences[1] - differences[0] == rows + routing


def test_a_backward_that_computes_the_pre_activation_takes_one_product_more():
    with torch.device("meta"):
        sizes = ((T, H), (T, TOP_K), None, None, None, None, (E, 2 * INNER, H), None, (E, H, INNER))
        inputs = Inputs(*(s and torch.empty(s, dtype=torch.bfloat16) for s in sizes), None, None)
    kept, computed = (_backward(inputs, computes_pre=computes) for computes in (False, True))
    assert computed.flops - kept.flops == 2 * ROWS * 2 * INNER * H
    assert computed.nbytes - kept.nbytes == computed.weights - kept.weights == 2 * E * 2 * INNER * H


def test_a_layer_keeps_two_rank_r_rows_more_with_twice_the_rank():
    """xa and ha, [M, r] in bf16; the loss is the peak, so all activations are counted.

    Ranks are multiples of 16, which rows of rank r are stored with.
    """
    lower, higher = (taken(r=r, vocab_size=4096) for r in (16, 32))
    assert lower.loss > 0
    assert higher.activations - lower.activations == 2 * 2 * ROWS * 16 * 2


def test_no_matrix_of_length_by_length_is_kept():
    once, twice = (taken(dataclasses.replace(BATCH, length=n), vocab_size=4096) for n in (256, 512))
    assert twice.activations == pytest.approx(2 * once.activations, rel=0.01)


def test_liger_forms_no_logits_and_keeps_less():
    plain = taken(vocab_size=8192)
    liger = taken(dataclasses.replace(BATCH, liger=True), vocab_size=8192)
    assert plain.loss >= T * 8192 * (4 + 4)
    assert liger.loss < plain.loss / 8
    assert liger.activations < plain.activations


def test_a_peak_in_backward_has_gradients_and_the_layer_that_runs():
    found = taken(dataclasses.replace(BATCH, checkpointing=True, liger=True), layers=4, r=32)
    assert found.loss == 0
    assert found.pairs >= found.gradients > found.pairs / 2
    assert found.transient >= 0
    parts = found.weights + found.pairs + found.optimizer + found.gradients + found.activations
    assert found.peak == parts + found.transient


@pytest.mark.parametrize("experts", FORMATS)
def test_quantized_experts_take_the_bytes_that_they_are_stored_in(experts, monkeypatch):
    monkeypatch.setattr(step, "DECODED", 1)
    dense = taken()
    found = taken(dataclasses.replace(BATCH, experts=experts))
    saved = 0
    for shape in ((E, 2 * INNER, H), (E, H, INNER)):
        stack = torch.ones(shape, dtype=torch.bfloat16)
        saved += 2 * (stack.nbytes - quantize(stack, experts).nbytes)
    assert dense.weights - found.weights == pytest.approx(saved, rel=1e-3)
    assert found.seconds["H200"] >= dense.seconds["H200"]


def test_decoding_takes_memory_while_a_layer_runs(monkeypatch):
    quantized = dataclasses.replace(BATCH, experts="nf4", checkpointing=True, liger=True)
    monkeypatch.setattr(step, "DECODED", 1)
    least = taken(quantized)
    assert 2 * INNER * H * 2 <= least.transient
    monkeypatch.setattr(step, "DECODED", 2**30)
    more = taken(quantized)
    assert more.transient - least.transient == (E - 1) * 2 * INNER * H * 2


@pytest.mark.parametrize("family", causal_families())
def test_every_family_runs_on_the_meta_device(family):
    found = run_step(tiny_model(family).config, adapter(), BATCH)
    assert found.peak > found.weights + found.pairs + found.optimizer
    assert found.trainable > 0


def test_what_has_no_experts_or_cannot_run_is_refused_with_the_reason():
    from transformers import LlamaConfig, T5Config

    with pytest.raises(ValueError, match=r"model_type='llama' .* no experts modules.*on the GPU"):
        run_step(LlamaConfig(hidden_size=64, num_hidden_layers=1), adapter(), BATCH)
    with pytest.raises(ValueError, match="model_type='t5'"):
        run_step(T5Config(), adapter(), BATCH)
    with pytest.raises(ValueError, match="nothing_like_this"):
        taken(targets=("nothing_like_this",))
    # the stand-in is gone, also after an error
    with pytest.raises(ValueError, match=NAME):
        AutoModelForCausalLM.from_config(config(), attn_implementation=NAME)
