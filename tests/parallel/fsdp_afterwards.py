"""What each process of test_fsdp_afterwards.py runs: adapters of a model that was sharded before.

Every scenario returns what FSDP2 gave beside what one process with whole parameters gives.
"""

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from helpers import fill_adapter, tiny_model, token_ids
from parallel.expert_parallel import configured
from parallel.fully_sharded import ROUTERS, logits, shard
from peft_moe_lora.parallel.sharding import path_without_wrappers, whole

STEPS = 3


def config_of(family="qwen3_moe", **changes):
    changes.setdefault("target_modules", ("experts", ROUTERS.get(family, "gate"), "o_proj"))
    return configured(family, **changes)


def base(family="qwen3_moe", dtype=torch.float64, **options):
    """fp64, because AdamW divides by the size of a gradient, which may be close to zero."""
    return tiny_model(family, dtype, **options)


def trainable(model):
    return {
        path_without_wrappers(name): p for name, p in model.named_parameters() if p.requires_grad
    }


def train(model, numbers, micro_batches=1):
    """Losses, norms, first gradients and parameters of STEPS steps of AdamW, clipped.

    Args:
        numbers: the sequences that this process trains on.
    """
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    losses = []
    norms = []
    first = None
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(micro_batches):
            for number in numbers:
                ids = token_ids(2, 11, seed=100 * step + 10 * micro + number)
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                (loss / len(numbers) / micro_batches).backward()
                losses.append(loss.detach())
        if first is None:
            first = {name: whole(p.grad).clone() for name, p in parameters.items()}
        norms.append(whole(torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)))
        optimizer.step()
    return {
        "losses": torch.stack(losses),
        "norms": torch.stack(norms),
        "gradients": first,
        "ends": {name: whole(p.detach()).clone() for name, p in parameters.items()},
    }


def compared(alone, divided, micro_batches=1):
    """What both models give in training, each process on a batch of its own."""
    world_size = dist.get_world_size()
    expected = train(alone.train(), range(world_size), micro_batches)
    found = train(divided.train(), [dist.get_rank()], micro_batches)
    # of all losses, those of this process's batches
    expected["losses"] = expected["losses"][dist.get_rank() :: world_size]
    return {"found": found, "expected": expected}


def copy_adapter(alone, divided, adapter_name="default"):
    state = get_peft_model_state_dict(alone, adapter_name=adapter_name)
    copied = {key: value.clone() for key, value in state.items()}
    set_peft_model_state_dict(divided, copied, adapter_name=adapter_name)


def pair(family="qwen3_moe", dtype=torch.float64, shards=shard, **changes):
    """A model that one process holds whole, and a sharded one, with the same random adapter."""
    config = config_of(family, **changes)
    bases = [base(family, dtype), base(family, dtype), shards(base(family, dtype))]
    alone = get_peft_model(bases[0], config)
    torch.manual_seed(3)
    again = get_peft_model(bases[1], config)
    # the first process has the seed of the process that is alone
    torch.manual_seed(3 + dist.get_rank())
    divided = get_peft_model(bases[2], config)
    starts = {name: whole(p.detach()).clone() for name, p in trainable(divided).items()}
    same = all(torch.equal(starts[name], p) for name, p in trainable(again).items())
    fill_adapter(alone)
    copy_adapter(alone, divided)
    return alone, divided, same


def trains(family, micro_batches=1, checkpointing=None, **changes):
    def scenario(rank, folder):
        alone, divided, same = pair(family, **changes)
        if checkpointing is not None:
            divided.enable_input_require_grads()
            divided.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        results = compared(alone, divided, micro_batches)
        out = folder / f"after_{family}_{micro_batches}_{checkpointing}_{len(changes)}"
        divided.save_pretrained(out)
        dist.barrier()
        loaded = PeftModel.from_pretrained(base(family), out).eval()
        return {**results, "same start": same, "loaded": (logits(loaded), logits(alone.eval()))}

    return scenario


def second_after_the_first(rank, folder):
    """The first adapter is sharded with the model, the second one comes later; both are trained."""
    second = {"target_modules": ("experts", "o_proj"), "expert_indices": {"experts": [0, 3]}}

    def build(shards):
        model = get_peft_model(base(), config_of())
        fill_adapter(model)
        model = shards(model)
        model.add_adapter("second", config_of(**second))
        model.base_model.set_adapter(["default", "second"])
        return model

    alone, divided = build(lambda model: model), build(shard)
    fill_adapter(alone, "second", seed=5)
    copy_adapter(alone, divided, "second")
    results = compared(alone, divided)
    divided.save_pretrained(folder / "second")
    dist.barrier()
    loaded = PeftModel.from_pretrained(base(), folder / "second/second").eval()
    alone.set_adapter("second")
    return {**results, "loaded": (logits(loaded), logits(alone.eval()))}


def loads(low_cpu_mem_usage):
    def scenario(rank, folder):
        alone = get_peft_model(base(), config_of())
        fill_adapter(alone)
        out = folder / f"loads_{low_cpu_mem_usage}"
        if rank == 0:
            alone.save_pretrained(out)
        dist.barrier()
        options = {"is_trainable": True, "low_cpu_mem_usage": low_cpu_mem_usage}
        divided = PeftModel.from_pretrained(shard(base()), out, **options)
        divided.load_adapter(out, "again", low_cpu_mem_usage=low_cpu_mem_usage)
        divided.set_adapter("again")
        again = (logits(divided.eval()), logits(alone.eval()))
        divided.set_adapter("default")
        return {**compared(alone, divided), "again": again}

    return scenario


def merges(**changes):
    def scenario(rank, folder):
        # merged experts run transformers' own products, which take no fp64
        alone, divided, _ = pair(dtype=torch.float32, **changes)
        with_adapter = logits(alone.eval())
        with alone.disable_adapter():
            without = logits(alone)
        divided.eval()
        logits(divided)
        divided.merge_adapter()
        merged = logits(divided)
        divided.unmerge_adapter()
        with divided.disable_adapter():
            unmerged = logits(divided)
        state = {k: whole(v) for k, v in divided.merge_and_unload().state_dict().items()}
        plain = base(dtype=torch.float32)
        plain.load_state_dict(state)
        return {
            "merged": (merged, with_adapter),
            "unmerged": (unmerged, without),
            "unloaded": (logits(plain.eval()), with_adapter),
        }

    return scenario


def loads_over_gathered(rank, folder):
    """FSDP2 keeps weights gathered after a forward; what is loaded must reach the shards."""
    alone = get_peft_model(base(), config_of(target_modules=("experts", "lm_head")))
    divided = get_peft_model(base(), config_of(target_modules=("experts", "lm_head")))
    shard(divided, reshard_after_forward=False)
    logits(divided)
    fill_adapter(alone)
    copy_adapter(alone, divided)
    return {"logits": (logits(divided), logits(alone))}


def half_precision(rank, folder):
    """A base of bf16, which an adapter in fp32 joins."""
    alone, divided, _ = pair(dtype=torch.bfloat16)
    dtypes = {whole(p.detach()).dtype for p in trainable(divided).values()}
    return {
        "fp32": dtypes == {torch.float32},
        "logits": (logits(divided.eval()), logits(alone.eval())),
    }


def only_layers(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return model


def two_meshes(model):
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    return fully_shard(
        model, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "shards"))
    )


def by_first_fsdp(model):
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = FullyShardedDataParallel(
            layer, use_orig_params=True, device_id=torch.device("cpu")
        )
    return model


def head_alone(model):
    fully_shard(model.lm_head)
    return shard(model)


def refuses(shards, **changes):
    def scenario(rank, folder):
        model = shards(base())
        before = dict(model.named_modules())
        try:
            get_peft_model(model, config_of(**changes))
        finally:
            assert dict(model.named_modules()) == before, "the model has changed"

    return scenario


def by_transformers(rank, folder):
    """The model is sharded by transformers while it is loaded."""
    path = folder / "base"
    if rank == 0:
        base().save_pretrained(path)
    dist.barrier()

    def sharded(model):
        config = DistributedConfig(fsdp_size=2)
        return AutoModelForCausalLM.from_pretrained(
            path, distributed_config=config, dtype=torch.float64
        )

    alone, divided, same = pair(shards=sharded)
    return {**compared(alone, divided), "same start": same}


TRAINED = {
    "qwen3_moe": trains("qwen3_moe"),
    "gpt_oss": trains("gpt_oss"),
    "reentrant": trains("qwen3_moe", checkpointing=True),
    "not reentrant": trains("qwen3_moe", checkpointing=False),
    "accumulation": trains("qwen3_moe", micro_batches=2),
    "some experts": trains("qwen3_moe", expert_indices={"experts": [1, 4]}),
    "embeddings": trains("qwen3_moe", target_modules=("experts", "embed_tokens", "lm_head")),
    "saved whole": trains("qwen3_moe", modules_to_save=["lm_head", "norm"]),
    "second": second_after_the_first,
    "from file": loads(False),
    "from file through meta": loads(True),
    "by transformers": by_transformers,
}
REFUSED = {
    "only layers": (refuses(only_layers), "has sharded a part of the model, but not model.embed"),
    "head alone": (refuses(head_alone, modules_to_save=["lm_head"]), "modules_to_save: lm_head"),
    "FSDP1": (refuses(by_first_fsdp), "FSDP1 has sharded the model"),
    "two meshes": (refuses(two_meshes), "needs one mesh"),
}
SCENARIOS = {
    **TRAINED,
    "merges": merges(),
    "gathered": loads_over_gathered,
    "half precision": half_precision,
    **{name: scenario for name, (scenario, _) in REFUSED.items()},
}
