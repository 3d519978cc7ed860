"""TRL's KTO, GRPO and Reward trainers with `peft_config=MoELoraConfig(...)`.

SFT and DPO are in test_trl.py. GRPO sends merged weights to vLLM; what it sends is compared with
the rules by which vLLM 0.33 reads experts, written here a second time.
"""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import Qwen3MoeForSequenceClassification
from trl import GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.generation.vllm_generation import VLLMGeneration

from helpers import (
    R,
    adapter_parameters,
    causal_families,
    fill_adapter,
    moe_lora,
    outputs,
    tiny_model,
)
from peft_moe_lora import MoELoraConfig
from test_trl import arguments, base_model, config_for, losses, say, tokenizer  # noqa: F401

# trl reads its own deprecated arguments
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def assert_only_the_adapter_changed(trainer, before):
    """Every A and B was trained, and every parameter of the base has its bits."""
    trained = adapter_parameters(trainer.model)
    assert trained
    assert all(p.abs().max() > 0 for p in trained.values())
    unloaded = trainer.model.unload().state_dict()
    assert all(torch.equal(unloaded[name], tensor) for name, tensor in before.items())


def copies(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---- KTO, GRPO, Reward ---------------------------------------------------------------------------


def test_kto_trains_the_adapter(tokenizer, tmp_path):  # noqa: F811
    rows = [
        {
            "prompt": say("user", f"{i}?"),
            "completion": say("assistant", f"{'abc' if i % 2 else 'xyz'} {i}"),
            "label": bool(i % 2),
        }
        for i in range(16)
    ]
    base = base_model("cpu")
    before = copies(base)
    settings = {"max_steps": 6, "learning_rate": 5e-3, "router_aux_loss_coef": 0.0}
    trainer = KTOTrainer(
        model=base,
        args=arguments(KTOConfig, "cpu", tmp_path, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=config_for("cpu"),
    )
    trainer.train()
    # policy and reference are the same at first: 1 - sigmoid(0)
    assert losses(trainer)[0] == pytest.approx(0.5, abs=1e-4)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert_only_the_adapter_changed(trainer, before)


def test_grpo_trains_the_adapter_towards_its_reward(tokenizer, tmp_path):  # noqa: F811
    base = base_model("cpu")
    before = copies(base)

    def share_of_a(completions, **kwargs):
        texts = [completion[0]["content"] for completion in completions]
        return [sum(ord(c) < 128 for c in text) / max(len(text), 1) for text in texts]

    trainer = GRPOTrainer(
        model=base,
        args=arguments(
            GRPOConfig,
            "cpu",
            tmp_path,
            max_steps=4,
            num_generations=4,
            max_completion_length=8,
            beta=0.1,
            learning_rate=2e-2,
        ),
        reward_funcs=share_of_a,
        train_dataset=Dataset.from_list([{"prompt": say("user", f"{i}?")} for i in range(16)]),
        processing_class=tokenizer,
        peft_config=config_for("cpu"),
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "kl" in entry]
    # before the first step the policy is its reference, to the bit
    assert entries[0]["kl"] == pytest.approx(0.0, abs=1e-7)
    assert entries[-1]["kl"] > 0
    assert_only_the_adapter_changed(trainer, before)


def test_reward_trainer_trains_the_adapter_and_the_head(tokenizer, tmp_path):  # noqa: F811
    config = base_model("cpu").config
    config.num_labels = 1
    base = Qwen3MoeForSequenceClassification(config)
    before = copies(base)
    rows = [
        {
            "prompt": say("user", f"{i}?"),
            "chosen": say("assistant", f"abc {i}"),
            "rejected": say("assistant", f"xyz {i}"),
        }
        for i in range(16)
    ]
    trainer = RewardTrainer(
        model=base,
        args=arguments(RewardConfig, "cpu", tmp_path, max_steps=10),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=MoELoraConfig(r=R, lora_alpha=2 * R, task_type="SEQ_CLS"),
    )
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0], losses(trainer)
    named = dict(trainer.model.named_parameters())
    (head,) = [n for n in named if "score.modules_to_save" in n]
    assert not torch.equal(named[head].detach(), before["score.weight"])
    assert all(p.abs().max() > 0 for n, p in named.items() if ".lora_" in n)


# ---- what GRPO sends to vLLM ---------------------------------------------------------------------


def sent(model):
    """What TRL's own loop sends: name -> tensor."""
    generation = object.__new__(VLLMGeneration)
    generation.model = model
    generation.accelerator = SimpleNamespace(device=torch.device("cpu"))
    generation._dist = SimpleNamespace(
        gather_params=lambda parameters: torch.no_grad(), is_fsdp=False, is_zero3=False
    )
    # TRL's names, as they are while the weights are merged
    return {name: tensor.clone() for name, tensor in generation._iter_named_params()}


def read_by_vllm(received):
    """What vLLM keeps of a Qwen3-MoE's experts: path -> (w13 [E, 2I, H], w2 [E, H, I]).

    A 3-D tensor `...mlp.experts.gate_up_proj` is [E, 2I, H], gate rows first: each half is split
    off, and its E entries are copied into w13. `...mlp.experts.down_proj` is [E, H, I].
    """
    stacks = {}
    for name, tensor in received.items():
        path, dot, stack = name.rpartition(".mlp.experts.")
        if not dot:
            continue
        assert stack in ("gate_up_proj", "down_proj"), f"vLLM knows no parameter {name}"
        assert tensor.ndim == 3
        stacks.setdefault(path, {})[stack] = tensor
    found = {}
    for path, both in stacks.items():
        gate, up = both["gate_up_proj"].chunk(2, dim=1)
        E, rows, columns = gate.shape
        w13 = gate.new_zeros(E, 2 * rows, columns)
        for e in range(E):
            w13[e, :rows] = gate[e]
            w13[e, rows:] = up[e]
        assert both["down_proj"].shape == (E, columns, rows)
        found[path] = (w13, both["down_proj"])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grpo_sends_merged_experts_as_vllm_reads_them_and_restores_the_base(dtype):
    base = tiny_model(dtype=dtype)
    before = copies(base)
    model = moe_lora(base, target_modules=["experts", "gate"])
    merged = moe_lora(
        tiny_model(dtype=dtype), target_modules=["experts", "gate"]
    ).merge_and_unload()
    expected = merged.state_dict()
    received = sent(model)
    assert received.keys() == before.keys()
    for name, tensor in received.items():
        assert torch.equal(tensor, expected[name]), name
    changed = [name for name in before if not torch.equal(received[name], before[name])]
    assert len(changed) == 2 * 3
    found = read_by_vllm(received)
    assert len(found) == 2
    for path, (w13, w2) in found.items():
        experts = merged.get_submodule(f"{path}.mlp.experts")
        assert torch.equal(w13, experts.gate_up_proj)
        assert torch.equal(w2, experts.down_proj)
    restored = copies(model.unload())
    assert all(torch.equal(restored[name], before[name]) for name in before)


@pytest.mark.parametrize("family", causal_families())
def test_grpo_sends_the_names_and_shapes_of_the_base(family):
    """vLLM reads a checkpoint of the base; what it is sent has to look like one."""
    base = tiny_model(family, dtype=torch.bfloat16)
    before = {name: (p.shape, p.dtype) for name, p in base.named_parameters()}
    received = sent(moe_lora(base))
    assert {name: (t.shape, t.dtype) for name, t in received.items()} == before


def test_fifty_synchronizations_leave_the_base_as_it_was():
    """A training with GRPO merges and unmerges in every step: rounding would add up."""
    base = tiny_model(dtype=torch.bfloat16)
    before = copies(base)
    model = moe_lora(base, target_modules=["experts", "gate", "q_proj", "v_proj", "embed_tokens"])
    plain = outputs(model)
    for step in range(50):
        fill_adapter(model, seed=step)
        sent(model)
    fill_adapter(model)
    assert torch.equal(outputs(model), plain)
    restored = model.unload().state_dict()
    assert all(torch.equal(restored[name], before[name]) for name in before)
