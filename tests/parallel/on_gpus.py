"""What each process of test_on_gpus.py runs: every engine, one GPU for each process, over NCCL.

Every scenario returns what the engine gave beside what one GPU gives that sees all batches: in the
same dtype, and in fp32 on the same weights.
"""

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from helpers import adapter_parameters, fill_adapter, tiny_model, token_ids
from peft_moe_lora import MoELoraConfig
from peft_moe_lora.parallel.sharding import whole

STEPS, R = 3, 8
# widths that the kernels' tiles fit
SIZES = {
    "hidden_size": 128,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_experts": 8,
    "moe_intermediate_size": 64,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def device():
    return torch.device("cuda", dist.get_rank())


def base(folder, dtype, **parallelism):
    """A tiny model on this process's GPU; with `parallelism`, divided among the processes."""
    path = folder / "base"
    if dist.get_rank() == 0 and not path.exists():
        tiny_model("qwen3_moe", **SIZES).save_pretrained(path)
    dist.barrier()
    options = {"dtype": dtype}
    if dtype == torch.bfloat16:
        # every expert gets every token: rounding cannot route a token to another expert
        options["num_experts_per_tok"] = SIZES["num_experts"]
    if parallelism:
        divided = DistributedConfig(**parallelism)
        return AutoModelForCausalLM.from_pretrained(path, distributed_config=divided, **options)
    return AutoModelForCausalLM.from_pretrained(path, **options).to(device())


def configured(**changes):
    return MoELoraConfig(r=R, lora_alpha=2 * R, target_modules=["experts", "gate"], **changes)


def one_gpu(folder, dtype, in_fp32=False):
    model = base(folder, dtype)
    if in_fp32:
        model.float()
    model = get_peft_model(model, configured()).train()
    fill_adapter(model)
    return model


def batch(step, number):
    return token_ids(2, 40, seed=100 * step + number).to(device())


def train(model, batches, optimized=None):
    """Losses, first gradients and parameters of STEPS steps of AdamW, the loss a mean of batches.

    Args:
        model: called with token ids.
        batches: numbers of the batches of this process.
        optimized: the model without a wrapper around it, if `model` is one.
    """
    parameters = adapter_parameters(optimized or model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    losses = []
    first = None
    for step in range(STEPS):
        optimizer.zero_grad()
        total = torch.zeros((), device=device())
        for number in batches:
            ids = batch(step, number)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss / len(batches)
            loss.backward()
            total += loss.detach()
        losses.append(total)
        if first is None:
            first = {name: whole(p.grad).clone() for name, p in parameters.items()}
        optimizer.step()
    ends = {name: whole(p.detach()).clone() for name, p in parameters.items()}
    return {"losses": torch.stack(losses), "gradients": first, "ends": ends}


def on_ddp(folder, dtype):
    model = one_gpu(folder, dtype)
    return model, torch.nn.parallel.DistributedDataParallel(model, device_ids=[device().index])


def on_fsdp2(folder, dtype, **options):
    model = one_gpu(folder, dtype)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, **options)
    return model, fully_shard(model, **options)


def on_hsdp(folder, dtype):
    sizes = (2, dist.get_world_size() // 2)
    mesh = init_device_mesh("cuda", sizes, mesh_dim_names=("replicate", "shard"))
    return on_fsdp2(folder, dtype, mesh=mesh)


def on_transformers(**parallelism):
    def build(folder, dtype):
        state = get_peft_model_state_dict(one_gpu(folder, dtype))
        number = dist.get_world_size()
        sizes = {name: number if size == "all" else size for name, size in parallelism.items()}
        model = get_peft_model(base(folder, dtype, **sizes), configured()).train()
        set_peft_model_state_dict(model, {key: value.clone() for key, value in state.items()})
        return model, model

    return build


# name -> (how the model is made, whether every process has its own batch)
ENGINES = {
    "DDP": (on_ddp, True),
    "FSDP2": (on_fsdp2, True),
    "EP all_reduce": (
        on_transformers(tp_size="all", ep_size="all", ep_implementation="all_reduce"),
        False,
    ),
    "EP all_to_all": (
        on_transformers(tp_size="all", ep_size="all", ep_implementation="all_to_all"),
        False,
    ),
    "EP over FSDP2": (on_transformers(fsdp_size="all", ep_size="all"), True),
    "TP": (on_transformers(tp_size="all"), False),
}
OF_FOUR = {"HSDP": (on_hsdp, True)}


def logits(model):
    with torch.no_grad():
        return whole(model(input_ids=token_ids().to(device()), use_cache=False).logits)


def trains(name, engine, own_batches, dtype):
    def scenario(rank, folder):
        model, called = engine(folder, dtype)
        alone = one_gpu(folder, dtype)
        number = dist.get_world_size() if own_batches else 1
        found = train(called, [rank if own_batches else 0], model)
        dist.all_reduce(found["losses"])
        found["losses"] /= dist.get_world_size()
        expected = train(one_gpu(folder, dtype, in_fp32=True), list(range(number)))
        out = folder / f"saved by {name}"
        # under DDP every process has the whole adapter
        if rank == 0 or called is model:
            model.save_pretrained(out)
        dist.barrier()
        loaded = PeftModel.from_pretrained(base(folder, dtype), out).eval()
        return {
            "found": on_cpu(found),
            "alone": on_cpu(train(alone, list(range(number)))),
            "expected": on_cpu(expected),
            "loaded": (logits(loaded).cpu(), logits(model.eval()).cpu()),
        }

    return scenario


def on_cpu(results):
    if isinstance(results, dict):
        return {name: on_cpu(value) for name, value in results.items()}
    return results.cpu()


def different_numbers_of_tokens(**parallelism):
    """Every process has another number of tokens, and one of them hardly any."""

    def scenario(rank, folder):
        number = dist.get_world_size()
        sizes = dict.fromkeys(parallelism, number)
        model = get_peft_model(base(folder, torch.bfloat16, **sizes), configured()).train()
        for step in range(STEPS):
            length = 2 if rank == step % number else 30 + 7 * rank
            ids = token_ids(1, length, seed=step).to(device())
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients = [whole(p.grad) for p in adapter_parameters(model).values()]
        return {"finite": all(bool(torch.isfinite(g).all()) for g in gradients)}

    return scenario


def scenarios(engines):
    return {
        f"{name}, {dtype_name}": trains(f"{name} {dtype_name}", *engine, dtype)
        for name, engine in engines.items()
        for dtype_name, dtype in DTYPES.items()
    }


SCENARIOS = scenarios(ENGINES)
SCENARIOS["tokens differ, EP"] = different_numbers_of_tokens(fsdp_size=2, ep_size=2)
