"""What each process of test_zero.py runs: adapters of models that DeepSpeed's ZeRO-2 or 3 trains.

Every scenario returns what DeepSpeed gave beside what one process gives with all batches.
"""

import os

# before deepspeed is imported: these scenarios run on a CPU, also beside a GPU
os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from helpers import adapter_parameters, fill_adapter, moe_lora, tiny_model, token_ids

STEPS = 3
# a norm below that of the first gradients, so that they are clipped
CLIPPED_TO = 0.5
ROUTERS = {"gpt_oss": "router"}


def settings(stage, **changes):
    """A configuration of DeepSpeed that splits even the smallest parameters."""
    zero = {
        "stage": stage,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "gradient_clipping": CLIPPED_TO,
        "zero_optimization": zero,
        **changes,
    }


def base(family, folder, partitioned=None, dtype=torch.float32):
    """A tiny model; with the settings of ZeRO-3 in `partitioned`, loaded in parts."""
    path = folder / f"base_{family}"
    if dist.get_rank() == 0 and not path.exists():
        tiny_model(family).save_pretrained(path)
    dist.barrier()
    # transformers loads in parts as long as this object lives
    kept = None
    if partitioned is not None:
        kept = HfDeepSpeedConfig(partitioned)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    del kept
    return model


def adapted(model, family, **config):
    config.setdefault("target_modules", ["experts", ROUTERS.get(family, "gate"), "o_proj"])
    return moe_lora(model, **config).train()


def optimizer_of(model):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2)


def started(model, config):
    # DeepSpeed asks for what its launcher would set
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)
    return engine


def batch(step, number):
    return token_ids(2, 11, seed=100 * step + number)


def loss_of(model, step, number):
    ids = batch(step, number)
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def values(parameters):
    """Copies of the whole values, of parameters that may be split."""
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: p.detach().float().clone() for name, p in parameters.items()}


def train(engine, rank, steps=range(STEPS)):
    parameters = adapter_parameters(engine.module)
    losses = []
    norms = []
    first = None
    for step in steps:
        loss = loss_of(engine, step, rank)
        engine.backward(loss)
        if first is None:
            first = {name: safe_get_full_grad(p).clone() for name, p in parameters.items()}
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
        mean = loss.detach().float()
        dist.all_reduce(mean)
        losses.append(mean / dist.get_world_size())
    return {
        "losses": torch.stack(losses),
        "norms": torch.tensor(norms),
        "gradients": first,
        "ends": values(parameters),
    }


def train_alone(model, steps=range(STEPS)):
    parameters = adapter_parameters(model)
    optimizer = optimizer_of(model)
    losses = []
    norms = []
    first = None
    for step in steps:
        optimizer.zero_grad()
        numbers = range(dist.get_world_size())
        loss = sum(loss_of(model, step, number) for number in numbers) / len(numbers)
        loss.backward()
        if first is None:
            first = {name: p.grad.clone() for name, p in parameters.items()}
        norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), CLIPPED_TO))
        optimizer.step()
        losses.append(loss.detach())
    ends = {name: p.detach().clone() for name, p in parameters.items()}
    return {
        "losses": torch.stack(losses),
        "norms": torch.stack(norms),
        "gradients": first,
        "ends": ends,
    }


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=token_ids(), use_cache=False).logits


def trains(family, stage, loaded_in_parts=False, **config):
    def scenario(rank, folder):
        partitioned = settings(3) if loaded_in_parts else None
        alone = adapted(base(family, folder), family, **config)
        expected = train_alone(alone)
        model = adapted(base(family, folder, partitioned), family, **config)
        engine = started(model, settings(stage))
        found = train(engine, rank)
        out = folder / f"saved_{family}_{stage}_{loaded_in_parts}_{len(config)}"
        model.save_pretrained(out)
        dist.barrier()
        loaded = PeftModel.from_pretrained(base(family, folder), out)
        return {
            "found": found,
            "expected": expected,
            "loaded": (logits(loaded), logits(alone)),
            "evaluated": (logits(engine), logits(alone)),
        }

    return scenario


SCENARIOS = {
    "qwen3_moe ZeRO-2": trains("qwen3_moe", 2),
}
