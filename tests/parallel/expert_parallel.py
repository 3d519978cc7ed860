"""What each process of test_expert_parallel.py runs: experts that transformers has divided.

Every scenario returns what the processes gave beside what one process with all experts gives.
"""

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, Llama4TextConfig
from transformers.distributed import DistributedConfig

from helpers import adapter_parameters, fill_adapter, tiny_model, token_ids
from peft_moe_lora import MoELoraConfig, quantize_experts
from peft_moe_lora.layers.layer import MoELoraLayer
from peft_moe_lora.parallel.sharding import whole

STEPS, R = 3, 4
NUMBER_OF_EXPERTS = {
    "qwen3_moe": "num_experts",
    "gpt_oss": "num_local_experts",
    "mixtral": "num_local_experts",
    "deepseek_v3": "n_routed_experts",
    "nemotron_h": "n_routed_experts",
}
ROUTERS = {"gpt_oss": "router"}
ATTENTION = {"deepseek_v3": ("q_a_proj", "q_b_proj", "kv_b_proj", "o_proj")}
MODES = {
    "all_reduce": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
    "all_to_all": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
    "over fsdp": {"fsdp_size": 2, "ep_size": 2},
}
ADAPTERS = {
    "experts": {},
    "router": {"target_modules": "with router"},
    # the second process holds none of these
    "some experts": {"expert_indices": {"experts": [1, 2]}},
    "recompute": {"recompute": True},
    "attention": {"target_modules": "with attention"},
}


def base(family, folder, dtype=torch.float64, **parallelism):
    """A tiny model of eight experts; with `parallelism`, divided among the processes.

    fp64, because AdamW divides by the size of a gradient: where that is close to zero, a rounding
    error of fp32 becomes a whole step.
    """
    path = folder / f"base_{family}"
    if dist.get_rank() == 0 and not path.exists():
        tiny_model(family, **{NUMBER_OF_EXPERTS[family]: 8}).save_pretrained(path)
    dist.barrier()
    options = {}
    if parallelism:
        options["distributed_config"] = DistributedConfig(**parallelism)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)


def configured(family, target_modules=("experts",), **changes):
    router = ROUTERS.get(family, "gate")
    if target_modules == "with router":
        target_modules = ("experts", router)
    if target_modules == "with attention":
        target_modules = ("experts", router, *ATTENTION.get(family, ("q_proj", "v_proj", "o_proj")))
    if not isinstance(target_modules, str):
        target_modules = list(target_modules)
    return MoELoraConfig(r=R, lora_alpha=2 * R, target_modules=target_modules, **changes)


def batch(step, number):
    return token_ids(2, 11, seed=100 * step + number)


def train(model, batches, average=1):
    """Losses, first gradients and parameters of STEPS steps of AdamW with clipped gradients."""
    parameters = adapter_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    losses = []
    norms = []
    first = None
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for number in batches:
            ids = batch(step, number)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss / len(batches)
            loss.backward()
            total += loss.detach()
        if average > 1:
            dist.all_reduce(total)
            total /= average
        losses.append(total)
        if first is None:
            first = {name: whole(p.grad).clone() for name, p in parameters.items()}
        norms.append(whole(torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)))
        optimizer.step()
    ends = {name: whole(p.detach()).clone() for name, p in parameters.items()}
    return {
        "losses": torch.stack(losses),
        "norms": torch.stack(norms),
        "gradients": first,
        "ends": ends,
    }


def trains(family, mode, dtype=torch.float64, checkpointing=False, **adapter):
    def scenario(rank, folder):
        config = configured(family, **adapter)
        models = [base(family, folder, dtype), base(family, folder, dtype, **mode)]
        torch.manual_seed(3)
        alone = get_peft_model(models[0], config).train()
        # the first process has the seed of the process that is alone
        torch.manual_seed(3 + rank)
        divided = get_peft_model(models[1], config).train()
        if checkpointing:
            divided.gradient_checkpointing_enable()
        started = {name: p.detach() for name, p in adapter_parameters(alone).items()}
        found = adapter_parameters(divided)
        # all of them, because every process must gather the same tensors
        starts = {name: whole(p.detach()) for name, p in found.items()}
        same_start = all(torch.equal(starts[name], p) for name, p in started.items())
        fill_adapter(alone)
        state = get_peft_model_state_dict(alone)
        set_peft_model_state_dict(divided, {key: value.clone() for key, value in state.items()})
        layer = next(m for m in divided.modules() if isinstance(m, MoELoraLayer))
        A, B = layer.pair("default", layer.adapted_projections("default")[0])
        number = mode.get("fsdp_size", 1) * mode.get("dp_replicate_size", 1)
        mine = [rank // mode.get("tp_size", 1)]
        # every loss is summed over all processes, so a batch that processes share counts as often
        results = train(divided, mine, dist.get_world_size())
        expected = train(alone, list(range(number)))
        out = folder / f"saved_{family}_{'_'.join(map(str, mode.values()))}_{dtype}_{len(adapter)}"
        divided.save_pretrained(out)
        dist.barrier()
        loaded = PeftModel.from_pretrained(base(family, folder, dtype), out).eval()
        with torch.no_grad():
            logits = loaded(input_ids=token_ids(), use_cache=False).logits
            wanted = alone.eval()(input_ids=token_ids(), use_cache=False).logits
        return {
            "found": results,
            "expected": expected,
            "same start": same_start,
            "loaded": (logits, wanted),
            "held": (A.to_local().shape[0], B.to_local().shape[1]),
        }

    return scenario


def merges(mode):
    def scenario(rank, folder):
        config = configured("qwen3_moe", target_modules="with router")
        # merged experts run transformers' own products, which take no fp64
        alone = get_peft_model(base("qwen3_moe", folder, torch.float32), config).eval()
        divided = get_peft_model(base("qwen3_moe", folder, torch.float32, **mode), config).eval()
        fill_adapter(alone)
        state = get_peft_model_state_dict(alone)
        set_peft_model_state_dict(divided, {key: value.clone() for key, value in state.items()})
        ids = token_ids()
        out = folder / f"of_one_process_{'_'.join(map(str, mode.values()))}"
        if rank == 0:
            alone.save_pretrained(out)
        dist.barrier()
        loaded = base("qwen3_moe", folder, torch.float32, **mode)
        loaded = PeftModel.from_pretrained(loaded, out).eval()
        with torch.no_grad():
            wanted = alone(input_ids=ids, use_cache=False).logits
            from_file = whole(loaded(input_ids=ids, use_cache=False).logits)
            divided.merge_adapter(safe_merge=True)
            merged = whole(divided(input_ids=ids, use_cache=False).logits)
            with alone.disable_adapter():
                unadapted = alone(input_ids=ids, use_cache=False).logits
            divided.unmerge_adapter()
            with divided.disable_adapter():
                unmerged = whole(divided(input_ids=ids, use_cache=False).logits)
        return {
            "loaded": (from_file, wanted),
            "merged": (merged, wanted),
            "unmerged": (unmerged, unadapted),
        }

    return scenario


def refuses(**changes):
    def scenario(rank, folder):
        config = configured("qwen3_moe", **changes)
        get_peft_model(base("qwen3_moe", folder, **MODES["all_reduce"]), config)

    return scenario


def refuses_undivided_experts(rank, folder):
    """A plan of transformers may leave out a layer."""
    model = base("qwen3_moe", folder, **MODES["all_reduce"])
    model.model.layers[1].mlp.experts._is_expert_parallel = False
    before = list(model.named_modules())
    try:
        get_peft_model(model, configured("qwen3_moe"))
    finally:
        assert list(model.named_modules()) == before


def refuses_off_the_interface(rank, folder):
    path = folder / "base_llama4"
    if rank == 0:
        config = Llama4TextConfig(
            hidden_size=32,
            intermediate_size=16,
            intermediate_size_mlp=16,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=4,
            vocab_size=64,
            pad_token_id=0,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    dist.barrier()
    experts = "model.layers.*.feed_forward.experts"
    plan = {experts: "ep_dispatch_experts"}
    for name in ("gate_up_proj", "down_proj"):
        plan[f"{experts}.{name}"] = "grouped_gemm"
    divided = DistributedConfig(**MODES["all_reduce"], ep_plan=plan)
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=divided)
    get_peft_model(model, MoELoraConfig(target_modules=["experts"]))


def refuses_to_quantize(rank, folder):
    quantize_experts(base("qwen3_moe", folder, torch.float32, **MODES["all_reduce"]))


def refuses_quantized_experts(rank, folder):
    model = base("qwen3_moe", folder, torch.float32, **MODES["all_reduce"])
    alone = quantize_experts(base("qwen3_moe", folder, torch.float32))
    model.model.layers[1].mlp.experts = alone.model.layers[1].mlp.experts
    get_peft_model(model, configured("qwen3_moe"))


def optimizer_of(mode):
    """Bytes of A, B and AdamW's state in each process, and in one process."""

    def scenario(rank, folder):
        sizes = []
        for divided in ({}, mode):
            model = get_peft_model(base("qwen3_moe", folder, **divided), configured("qwen3_moe"))
            parameters = list(adapter_parameters(model).values())
            optimizer = torch.optim.AdamW(parameters)
            model.train()(input_ids=batch(0, 0), labels=batch(0, 0)).loss.backward()
            optimizer.step()
            state = [value for entry in optimizer.state.values() for value in entry.values()]
            held = [t for t in (*parameters, *state) if t.ndim > 0]
            sizes.append(sum(getattr(t, "_local_tensor", t).nbytes for t in held))
        return {"bytes": sizes}

    return scenario


REFUSED = {
    "backend": {"backend": "materialize"},
    "target_modules": {"target_modules": "all-linear"},
    "modules_to_save": {"modules_to_save": ["norm"]},
}
SCENARIOS = {}
for family in NUMBER_OF_EXPERTS:
    for name, mode in MODES.items():
        SCENARIOS[f"{family} {name}"] = trains(family, mode)
for name, adapter in ADAPTERS.items():
    for mode_name, mode in MODES.items():
        SCENARIOS[f"qwen3_moe {mode_name}, {name}"] = trains("qwen3_moe", mode, **adapter)
for name, mode in MODES.items():
    SCENARIOS[f"fp32 {name}"] = trains("qwen3_moe", mode, torch.float32)
for name, mode in MODES.items():
    SCENARIOS[f"merges {name}"] = merges(mode)
for name, mode in MODES.items():
    SCENARIOS[f"optimizer {name}"] = optimizer_of(mode)
SCENARIOS["quantizing"] = refuses_to_quantize
SCENARIOS["quantized"] = refuses_quantized_experts
SCENARIOS["undivided"] = refuses_undivided_experts
SCENARIOS["off the interface"] = refuses_off_the_interface
for name, changes in REFUSED.items():
    SCENARIOS[f"refuses {name}"] = refuses(**changes)
