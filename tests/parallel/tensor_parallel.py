"""What each process of test_tensor_parallel.py runs: experts of which it holds some features.

Every scenario returns what the processes gave beside what one process with whole experts gives.
"""

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from helpers import fill_adapter, token_ids
from parallel.dropping import AS_ONE_PROCESS, repeats_under_checkpointing
from parallel.expert_parallel import base, configured, trains
from peft_moe_lora.parallel.sharding import whole

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "nemotron_h")
MODE = {"tp_size": 2}
ADAPTERS = {
    "router": {"target_modules": "with router"},
    "some experts": {"expert_indices": {"experts": [1, 2]}},
    "recompute": {"recompute": True},
    "up alone": {"target_projections": ["gate_up"]},
    "checkpointing": {"checkpointing": True},
    # q, k, v and o are divided as well
    "attention": {"target_modules": "with attention"},
}


def logits(model):
    with torch.no_grad():
        return whole(model(input_ids=token_ids(), use_cache=False).logits)


def pair_of_models(family, folder, **mode):
    """A model in one process and one that is divided, with the same random adapters."""
    config = configured(family, target_modules="with attention")
    second = configured(family, expert_indices={"experts": [0, 3]})
    # merged experts run transformers' own products, which take no fp64
    models = [base(family, folder, torch.float32), base(family, folder, torch.float32, **mode)]
    models = [get_peft_model(model, config).eval() for model in models]
    for model in models:
        model.add_adapter("second", second)
    alone, divided = models
    for name, seed in {"default": 1, "second": 5}.items():
        fill_adapter(alone, name, seed=seed)
        state = get_peft_model_state_dict(alone, adapter_name=name)
        set_peft_model_state_dict(divided, state, adapter_name=name)
    return alone, divided


def merges(family):
    def scenario(rank, folder):
        alone, divided = pair_of_models(family, folder, **MODE)
        with alone.disable_adapter():
            unadapted = logits(alone)
        wanted = logits(alone)
        found = {"adapted": (logits(divided), wanted), "share": (unadapted, wanted)}
        divided.merge_adapter()
        found["merged"] = (logits(divided), wanted)
        divided.unmerge_adapter()
        found["unmerged"] = (logits(divided), wanted)
        for model in (alone, divided):
            model.base_model.set_adapter(["default", "second"])
        wanted = logits(alone)
        found["two adapters"] = (logits(divided), wanted)
        divided.merge_adapter(safe_merge=True)
        found["two merged"] = (logits(divided), wanted)
        with divided.disable_adapter():
            found["disabled"] = (logits(divided), unadapted)
        unloaded = divided.merge_and_unload()
        found["unloaded"] = (logits(unloaded), wanted)
        state = {key: whole(tensor) for key, tensor in unloaded.state_dict().items()}
        again = base(family, folder, torch.float32)
        again.load_state_dict(state)
        found["in one process"] = (logits(again.eval()), wanted)
        return found

    return scenario


def loads(family):
    def scenario(rank, folder):
        alone, _ = pair_of_models(family, folder, **MODE)
        out = folder / f"of_one_process_{family}"
        if rank == 0:
            alone.save_pretrained(out)
        dist.barrier()
        divided = base(family, folder, torch.float32, **MODE)
        loaded = PeftModel.from_pretrained(divided, out).eval()
        loaded.load_adapter(out / "second", adapter_name="second")
        found = {"default": (logits(loaded), logits(alone))}
        for model in (alone, loaded):
            model.set_adapter("second")
        found["second"] = (logits(loaded), logits(alone))
        return found

    return scenario


def refuses_a_bias(rank, folder):
    """A plan of the user's own: transformers has none for gpt_oss."""
    experts = "model.layers.*.mlp.experts"
    plan = {
        f"{experts}.gate_up_proj": "colwise",
        f"{experts}.down_proj": "colwise",
        experts: "moe_tp_experts",
    }
    model = base("gpt_oss", folder, tp_size=2, tp_plan=plan)
    get_peft_model(model, configured("gpt_oss"))


def refuses_other_rows(rank, folder):
    """Halves of gate_up that are not those of the columns of down."""
    plan = {"model.layers.*.mlp.experts.gate_up_proj": "colwise"}
    model = base("qwen3_moe", folder, tp_size=2, tp_plan=plan)
    get_peft_model(model, configured("qwen3_moe"))


def refuses_an_embedding(rank, folder):
    config = configured("qwen3_moe", target_modules=["experts", "embed_tokens"])
    get_peft_model(base("qwen3_moe", folder, **MODE), config)


def refuses_setting(**changes):
    def scenario(rank, folder):
        get_peft_model(base("qwen3_moe", folder, **MODE), configured("qwen3_moe", **changes))

    return scenario


REFUSED = {
    "backend": {"backend": "materialize"},
    "target_modules": {"target_modules": "all-linear"},
}
SCENARIOS = {family: trains(family, MODE) for family in FAMILIES}
for name, adapter in ADAPTERS.items():
    SCENARIOS[name] = trains("qwen3_moe", MODE, **adapter)
# its attention is left whole
SCENARIOS["whole attention"] = trains("deepseek_v3", MODE, target_modules="with attention")
SCENARIOS["fp32"] = trains("qwen3_moe", MODE, torch.float32)
for family in FAMILIES:
    SCENARIOS[f"merges {family}"] = merges(family)
    SCENARIOS[f"loads {family}"] = loads(family)
SCENARIOS["refuses a bias"] = refuses_a_bias
SCENARIOS["refuses other rows"] = refuses_other_rows
SCENARIOS["refuses an embedding"] = refuses_an_embedding
for name, changes in REFUSED.items():
    SCENARIOS[f"refuses {name}"] = refuses_setting(**changes)
for name, scenario in AS_ONE_PROCESS.items():
    SCENARIOS[f"drops, {name}"] = scenario
SCENARIOS["drops, all_to_all"] = repeats_under_checkpointing
