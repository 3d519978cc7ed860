"""What each process of test_fsdp_options.py runs: what FSDP2 offers, with an adapter.

Every scenario adds the adapter before the model is sharded, or afterwards.
"""

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from helpers import fill_adapter, token_ids
from parallel.fsdp_afterwards import base, compared, config_of, copy_adapter, trainable
from parallel.fully_sharded import logits, shard
from peft_moe_lora import quantize_experts
from peft_moe_lora.parallel.sharding import whole

TRAINED_ALONE = StateDictOptions(ignore_frozen_params=True, strict=False)
BESIDE = {
    "saved whole": {"modules_to_save": ["lm_head", "norm"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [3, 5]}},
    "embeddings": {"target_modules": ("experts", "embed_tokens", "lm_head")},
}


def models(when, built=base, shards=shard, **changes):
    """A model that one process holds whole, and a sharded one, with the same random adapter."""
    alone = get_peft_model(built(), config_of(**changes))
    fill_adapter(alone)
    if when == "first":
        divided = get_peft_model(built(), config_of(**changes))
        fill_adapter(divided)
        return alone, shards(divided)
    divided = get_peft_model(shards(built()), config_of(**changes))
    copy_adapter(alone, divided)
    return alone, divided


def trains(when, **options):
    def scenario(rank, folder):
        return compared(*models(when, **options))

    return scenario


def life(when, changes):
    """Trained, saved, loaded by one process and into shards, merged, unmerged, unloaded."""

    def scenario(rank, folder):
        # merged experts run transformers' own products, which take no fp64
        def built():
            return base(dtype=torch.float32)

        alone, divided = models(when, built, **changes)
        for model in (alone, divided):
            with torch.no_grad():
                for name, p in trainable(model).items():
                    if ".lora_" not in name:
                        p.mul_(1.5)
        expected = logits(alone.eval())
        with alone.disable_adapter():
            share = logits(alone)
        out = folder / f"life_{when}_{'_'.join(changes)}"
        divided.save_pretrained(out)
        dist.barrier()
        found = {"sharded": logits(divided.eval())}
        found["loaded by one"] = logits(PeftModel.from_pretrained(built(), out).eval())
        fresh = models(when, built, **changes)[1]
        fresh.load_adapter(out, "default")
        found["loaded"] = logits(fresh.eval())
        divided.merge_adapter()
        found["merged"] = logits(divided)
        divided.unmerge_adapter()
        found["unmerged"] = logits(divided)
        state = {k: whole(v) for k, v in divided.merge_and_unload().state_dict().items()}
        plain = built()
        plain.load_state_dict(state)
        found["unloaded"] = logits(plain.eval())
        return {**{what: (tensor, expected) for what, tensor in found.items()}, "share": share}

    return scenario


def narrow(model, with_adapter):
    """Cast parameters to bf16, but not buffers, as a policy of FSDP2 does in a forward."""
    for name, parameter in model.named_parameters():
        if with_adapter or ".lora_" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)


def mixed_precision(when, **changes):
    """Gradients under a policy of bf16, and the mean of those of each batch in one process."""

    def scenario(rank, folder):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

        def built():
            return base(dtype=torch.float32)

        def shards(model):
            return shard(model, mp_policy=policy)

        alone, divided = models(when, built, shards, **changes)
        # A and B that come afterwards are not managed by FSDP2, and stay in fp32
        narrow(alone, with_adapter=when == "first")
        expected = gradients(alone, range(dist.get_world_size()))
        found = gradients(divided, [dist.get_rank()])
        return {"found": {"gradients": found}, "expected": {"gradients": expected}}

    return scenario


def gradients(model, numbers):
    """The mean over batches of the gradients, each batch's in fp32."""
    total = {}
    for number in numbers:
        model.zero_grad()
        ids = token_ids(2, 11, seed=number)
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for name, p in trainable(model).items():
            total[name] = total.get(name, 0) + whole(p.grad).float() / len(numbers)
    return total


def steps(model, optimizer, numbers, ranks):
    """Train on the batches that the processes `ranks` have in the steps `numbers`."""
    model.train()
    for number in numbers:
        for rank in ranks:
            ids = token_ids(2, 11, seed=10 * number + rank)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            (loss / len(ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()


def started(when):
    """A sharded model, or one that this process holds whole, and its optimizer."""
    alone, divided = models("first" if when == "alone" else when)
    model = alone if when == "alone" else divided
    return model, torch.optim.AdamW(trainable(model).values(), lr=1e-2)


def ends_of(model):
    return {name: whole(p.detach()).clone() for name, p in trainable(model).items()}


def checkpointed(when, then):
    """Two steps, a checkpoint, two more; the last two again from the checkpoint."""

    def scenario(rank, folder):
        model, optimizer = started(when)
        steps(model, optimizer, (0, 1), [rank])
        out = folder / f"checkpoint_{when}_{then}"
        save(state_of(model, optimizer), checkpoint_id=out)
        steps(model, optimizer, (2, 3), [rank])
        expected = ends_of(model)
        again, optimizer = started(then)
        restore(again, optimizer, out, no_dist=then == "alone")
        steps(again, optimizer, (2, 3), range(dist.get_world_size()) if then == "alone" else [rank])
        return {"found": {"ends": ends_of(again)}, "expected": {"ends": expected}}

    return scenario


def checkpoint_of_two_processes(rank, folder):
    """Two processes save it, and four go on: the second pair trains on the batches of the first.

    So the mean over four processes is the mean over two.
    """
    model, optimizer = started("first")
    steps(model, optimizer, (0, 1), [rank % 2])
    two = folder / "two"
    if dist.get_world_size() == 2:
        save(state_of(model, optimizer), checkpoint_id=two)
        return {"saved": True}
    steps(model, optimizer, (2, 3), [rank % 2])
    again, optimizer = started("afterwards")
    restore(again, optimizer, two)
    steps(again, optimizer, (2, 3), [rank % 2])
    return {"found": {"ends": ends_of(again)}, "expected": {"ends": ends_of(model)}}


def state_of(model, optimizer):
    return {
        "model": get_model_state_dict(model, options=TRAINED_ALONE),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=TRAINED_ALONE),
    }


def restore(model, optimizer, path, no_dist=False):
    state = state_of(model, optimizer)
    load(state, checkpoint_id=path, no_dist=no_dist)
    set_model_state_dict(model, state["model"], options=TRAINED_ALONE)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=TRAINED_ALONE)


def hsdp(copies, shards):
    def sharded(model):
        sizes = (copies, shards)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("copies", "shards"))
        return shard(model, mesh=mesh)

    return sharded


def over_named_mesh(model):
    return shard(model, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("data",)))


def offloaded(model):
    return shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def quantized():
    return quantize_experts(base(dtype=torch.float32), "nf4")


def compiles(when):
    def scenario(rank, folder):
        alone, divided = models(when)
        torch._dynamo.reset()
        graphs = torch._dynamo.utils.counters["stats"]
        before = graphs["unique_graphs"]
        results = compared(alone, torch.compile(divided, backend="aot_eager"))
        assert graphs["unique_graphs"] > before, "nothing was compiled"
        return results

    return scenario


def refuses(when, **options):
    """Merging raises an error, and the model stays as it is."""

    def scenario(rank, folder):
        model = models(when, **options)[1]
        before = logits(model.eval())
        try:
            model.merge_adapter()
        finally:
            assert torch.equal(logits(model), before), "the model has changed"

    return scenario


OTHER = {
    "copies": {"shards": hsdp(2, 1)},
    "named mesh": {"shards": over_named_mesh},
    "offloaded": {"shards": offloaded},
    "quantized": {"built": quantized},
    "saved whole": BESIDE["saved whole"],
    "embeddings": BESIDE["embeddings"],
}
LIVES = ("saved whole", "embeddings")
SCENARIOS = {
    "first, tokens": trains("first", **BESIDE["tokens"]),
    "afterwards, tokens": trains("afterwards", **BESIDE["tokens"]),
    "checkpoint, the other way": checkpointed("first", "afterwards"),
    "checkpoint, alone": checkpointed("afterwards", "alone"),
    "checkpoint of two": checkpoint_of_two_processes,
    "merges tokens": refuses("first", **BESIDE["tokens"]),
}
for when in ("first", "afterwards"):
    SCENARIOS |= {
        f"{when}": trains(when),
        f"{when}, mixed": mixed_precision(when),
        f"{when}, mixed, saved whole": mixed_precision(when, **BESIDE["saved whole"]),
        f"{when}, checkpoint": checkpointed(when, when),
        f"{when}, merges quantized": refuses(when, built=quantized),
    }
    for name, options in OTHER.items():
        SCENARIOS[f"{when}, {name}"] = trains(when, **options)
    for name in LIVES:
        SCENARIOS[f"{when}, {name}, life"] = life(when, BESIDE[name])
