"""What each process of test_fully_sharded.py runs: adapters of models that FSDP2 has sharded.

Every scenario returns what FSDP2 gave beside what one process with whole parameters gives.
"""

import copy

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from helpers import adapter_parameters, fill_adapter, moe_lora, tiny_model, token_ids
from peft_moe_lora import MoELoraConfig, keep_experts
from peft_moe_lora.parallel.sharding import whole

# five experts on two processes: three on the first, two on the second
FAMILIES = ("qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3", "nemotron_h")
ROUTERS = {"gpt_oss": "router"}


def is_block(module):
    return type(module).__name__.endswith(("DecoderLayer", "NemotronHBlock"))


def shard(model, **options):
    for block in [module for module in model.modules() if is_block(module)]:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def adapted(family, **config):
    config.setdefault("target_modules", ["experts", ROUTERS.get(family, "gate"), "o_proj"])
    return moe_lora(tiny_model(family), **config).eval()


def logits(model):
    with torch.no_grad():
        return whole(model(input_ids=token_ids(), use_cache=False).logits)


def saves(family):
    def scenario(rank, folder):
        model = adapted(family)
        expected = logits(model)
        out = folder / f"saved_{family}"
        shard(model).save_pretrained(out)
        torch.distributed.barrier()
        loaded = PeftModel.from_pretrained(tiny_model(family), out).eval()
        same = all(
            torch.equal(tensor, load_file(out / "adapter_model.safetensors")[key])
            for key, tensor in _tensors(adapted(family)).items()
        )
        return {"found": logits(loaded), "expected": expected, "same bits": same}

    return scenario


def _tensors(model):
    return {
        key.replace(".default", ""): tensor
        for key, tensor in model.state_dict().items()
        if "lora_" in key
    }


def loads(family):
    def scenario(rank, folder):
        model = adapted(family)
        state = {key: value.clone() for key, value in _tensors(model).items()}
        empty = shard(adapted(family, randomize=False))
        set_peft_model_state_dict(empty, state)
        return {"found": logits(empty), "expected": logits(model)}

    return scenario


def merges(family, **options):
    def scenario(rank, folder):
        model = adapted(family)
        with_adapter = logits(model)
        with model.disable_adapter():
            base = logits(model)
        shard(model, **options)
        # FSDP2 keeps the weights of the root, and all weights with reshard_after_forward=False
        logits(model)
        model.merge_adapter()
        merged = logits(model)
        try:
            with model.disable_adapter():
                logits(model)
            refused = "nothing"
        except ValueError as error:
            refused = str(error)
        model.unmerge_adapter()
        with model.disable_adapter():
            unmerged = logits(model)
        state = {key: whole(value) for key, value in model.merge_and_unload().state_dict().items()}
        alone = tiny_model(family)
        alone.load_state_dict(state)
        unloaded = logits(alone.eval())
        return {
            "merged": (merged, with_adapter),
            "unmerged": (unmerged, base),
            "unloaded": (unloaded, with_adapter),
            "share": (base, with_adapter),
            "refused": refused,
        }

    return scenario


def merges_some_experts(rank, folder):
    model = adapted("qwen3_moe", target_modules=["experts"], expert_indices={"experts": [1, 4]})
    expected = logits(model)
    shard(model).merge_adapter(safe_merge=True)
    return {"found": logits(model), "expected": expected}


def safe_merge_finds_infinity_of_one_process(rank, folder):
    model = adapted("qwen3_moe", target_modules=["experts"])
    layer = model.base_model.model.model.layers[1].mlp.experts
    with torch.no_grad():
        # the last expert belongs to the second process
        layer.lora_B["default"]["down"][:, -1] = torch.inf
    before = copy.deepcopy(layer.base_layer.down_proj.data)
    shard(model)
    try:
        layer.merge(safe_merge=True)
    except ValueError as error:
        after = layer.base_layer.down_proj.full_tensor()
        return {"error": str(error), "unchanged": torch.equal(after, before)}
    return {"error": "none"}


def first_fsdp(rank, folder):
    model = adapted("qwen3_moe").train()
    blocks = ModuleWrapPolicy({type(module) for module in model.modules() if is_block(module)})
    # without use_orig_params FSDP1 itself refuses frozen and trained parameters in one block
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=blocks, use_orig_params=True, device_id=torch.device("cpu")
    )
    wrapped(input_ids=token_ids(), use_cache=False)


def checkpoint_wrappers(rank, folder):
    model = adapted("qwen3_moe")
    expected = logits(model)
    apply_activation_checkpointing(model, check_fn=is_block)
    out = folder / "checkpoint_wrappers"
    shard(model).save_pretrained(out)
    torch.distributed.barrier()
    loaded = PeftModel.from_pretrained(tiny_model("qwen3_moe"), out).eval()
    return {"found": logits(loaded), "expected": expected}


def safe_merge_of_a_whole_model(rank, folder):
    model = adapted("qwen3_moe")
    expected = logits(model)
    shard(model).merge_adapter(safe_merge=True)
    return {"found": logits(model), "expected": expected}


def safe_merge_finds_infinity_of_a_linear_layer(rank, folder):
    model = adapted("qwen3_moe")
    with model.disable_adapter():
        base = logits(model)
    layer = model.base_model.model.model.layers[1].self_attn.o_proj
    with torch.no_grad():
        # the last row of the weight belongs to the second process
        layer.lora_B["default"].weight[-1] = torch.inf
    shard(model)
    try:
        model.merge_adapter(safe_merge=True)
    except ValueError as error:
        with model.disable_adapter():
            return {"error": str(error), "found": logits(model), "expected": base}
    return {"error": "none"}


def two_adapters(rank, folder):
    def build():
        model = adapted("qwen3_moe", target_modules=["experts"])
        second = MoELoraConfig(r=2, target_modules=["experts"], expert_indices={"experts": [0, 3]})
        model.add_adapter("second", second)
        fill_adapter(model, "second", seed=5)
        model.base_model.set_adapter(["default", "second"])
        return model

    model = build()
    expected = logits(model)
    shard(model)
    together = logits(model)
    model.merge_adapter()
    return {"together": (together, expected), "merged": (logits(model), expected)}


def keeps_experts(rank, folder):
    """Gradients of a batch that both processes share, checkpointed and not."""

    def gradients(model):
        model(input_ids=token_ids(), use_cache=False).logits.square().mean().backward()
        return {name: whole(p.grad) for name, p in adapter_parameters(model).items()}

    # shared experts, for which the second step keeps the output of the others
    model = adapted("deepseek_v3", target_modules=["experts"], lora_dropout=0.0).train()
    sharded = copy.deepcopy(model)
    expected = gradients(model)
    sharded.enable_input_require_grads()
    sharded.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": keep_experts})
    shard(sharded)
    found = []
    for _ in range(2):
        sharded.zero_grad()
        found.append(gradients(sharded))
    return {"found": found, "expected": expected}


SCENARIOS = {
    **{f"saves {family}": saves(family) for family in FAMILIES},
    **{f"loads {family}": loads(family) for family in FAMILIES},
    **{f"merges {family}": merges(family) for family in FAMILIES},
    "merges gathered": merges("qwen3_moe", reshard_after_forward=False),
    "some experts": merges_some_experts,
    "safe merge": safe_merge_finds_infinity_of_one_process,
    "safe merge of a model": safe_merge_of_a_whole_model,
    "safe merge of a linear layer": safe_merge_finds_infinity_of_a_linear_layer,
    "FSDP1": first_fsdp,
    "wrappers": checkpoint_wrappers,
    "two adapters": two_adapters,
    "keeps experts": keeps_experts,
}
