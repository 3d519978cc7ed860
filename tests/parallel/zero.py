"""What each process of test_zero.py runs: adapters of models that DeepSpeed's ZeRO-2 or 3 trains.

Every scenario returns what DeepSpeed gave beside what one process gives with all batches.
"""

import os

# before deepspeed is imported: these scenarios run on a CPU, also beside a GPU
os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from helpers import adapter_parameters, moe_lora, tiny_model, token_ids
from peft_moe_lora import consolidate_checkpoint, quantize_experts

STEPS = 3
WEIGHTS = "adapter_model.safetensors"
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
    # DeepSpeed asks for what its launcher would set
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    path = folder / f"base_{family}"
    # transformers makes and loads models in parts as long as a configuration lives, this one or an
    # earlier Trainer's
    kept = None
    unset_hf_deepspeed_config()
    if dist.get_rank() == 0 and not path.exists():
        tiny_model(family).save_pretrained(path)
    dist.barrier()
    if partitioned is not None:
        kept = HfDeepSpeedConfig(partitioned)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    # PEFT asks for it when the model gets an adapter
    model.kept = kept
    return model


def adapted(model, family, checkpointing=False, quantized=False, **config):
    if quantized:
        quantize_experts(model)
    config.setdefault("target_modules", ["experts", ROUTERS.get(family, "gate"), "o_proj"])
    model = moe_lora(model, **config).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def optimizer_of(model):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2)


def started(model, config):
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
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPED_TO))
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
    """Training, and saving in every process."""

    def scenario(rank, folder):
        partitioned = settings(3) if loaded_in_parts else None
        alone = adapted(base(family, folder), family, **config)
        expected = train_alone(alone)
        model = adapted(base(family, folder, partitioned), family, **config)
        engine = started(model, settings(stage))
        found = train(engine, rank)
        out = folder / f"saved_{family}_{stage}_{loaded_in_parts}_{'_'.join(config)}"
        model.save_pretrained(out)
        dist.barrier()
        whole = base(family, folder, partitioned)
        if config.get("quantized"):
            quantize_experts(whole)
        loaded = PeftModel.from_pretrained(whole, out, is_trainable=True)
        if loaded_in_parts:
            # its parts are gathered by hooks, which this sets
            loaded = started(loaded, settings(stage))
        return {
            "found": found,
            "expected": expected,
            "evaluated": (logits(engine), logits(alone)),
            "loaded": (logits(loaded), logits(alone)),
        }

    return scenario


def loads_and_trains_on(stage):
    """Tensors loaded into a model that DeepSpeed trains already reach its optimizer."""

    def scenario(rank, folder):
        alone = adapted(base("qwen3_moe", folder), "qwen3_moe")
        state = {k: v.clone() for k, v in get_peft_model_state_dict(alone).items()}
        expected = train_alone(alone)
        model = adapted(base("qwen3_moe", folder), "qwen3_moe", randomize=False)
        engine = started(model, settings(stage))
        set_peft_model_state_dict(model, state)
        return {"found": train(engine, rank), "expected": expected}

    return scenario


def resumes(stage):
    """A checkpoint of DeepSpeed after two steps, loaded for the third."""

    def scenario(rank, folder):
        trained = adapted(base("qwen3_moe", folder), "qwen3_moe")
        engine = started(trained, settings(stage))
        train(engine, rank, range(2))
        out = folder / f"checkpoint_{stage}"
        engine.save_checkpoint(out, exclude_frozen_parameters=True)
        whole = folder / f"adapter_{stage}"
        trained.save_pretrained(whole)
        expected = train(engine, rank, range(2, 3))
        model = adapted(base("qwen3_moe", folder), "qwen3_moe", randomize=False)
        again = started(model, settings(stage))
        again.load_checkpoint(out, load_module_strict=False)
        results = {"found": train(again, rank, range(2, 3)), "expected": expected}
        if rank == 0:
            consolidated = folder / f"consolidated_{stage}"
            consolidate_checkpoint(out, consolidated, config=whole)
            results["consolidated"] = [load_file(path / WEIGHTS) for path in (consolidated, whole)]
        return results

    return scenario


def merges(family, stage):
    def scenario(rank, folder):
        alone = adapted(base(family, folder), family)
        with_adapter = logits(alone)
        with alone.disable_adapter():
            without = logits(alone)
        model = adapted(base(family, folder), family)
        engine = started(model, settings(stage))
        logits(engine)
        model.merge_adapter(safe_merge=stage == 3)
        merged = logits(engine)
        refused = None
        if stage == 3:
            with (
                pytest.raises(ValueError, match="are merged into") as error,
                model.disable_adapter(),
            ):
                pass
            refused = str(error.value)
        model.unmerge_adapter()
        with model.disable_adapter():
            unmerged = logits(engine)
        unloaded = model.merge_and_unload()
        state = values(dict(unloaded.named_parameters()))
        plain = base(family, folder)
        assert state.keys() == dict(plain.named_parameters()).keys()
        # beside parameters there are buffers, which nothing changes
        plain.load_state_dict({**plain.state_dict(), **state})
        return {
            "merged": (merged, with_adapter),
            "unmerged": (unmerged, without),
            "unloaded": (logits(plain), with_adapter),
            "share": (without, with_adapter),
            "refused": refused,
        }

    return scenario


def saves_a_state_dict_of_the_first_process(rank, folder):
    """As accelerate and Trainer do: the other processes hand over nothing, or do not save."""
    engine = started(adapted(base("qwen3_moe", folder), "qwen3_moe"), settings(3))
    expected = logits(engine)
    state = engine._zero3_consolidated_16bit_state_dict()
    engine.module.save_pretrained(
        folder / "by_accelerate", is_main_process=rank == 0, state_dict=state
    )
    if rank == 0:
        engine.module.save_pretrained(folder / "by_trainer", state_dict=state)
    dist.barrier()
    found = {}
    for name in ("by_accelerate", "by_trainer"):
        loaded = PeftModel.from_pretrained(base("qwen3_moe", folder), folder / name)
        found[name] = (logits(loaded), expected)
    if rank == 0:
        with pytest.raises(ValueError, match="is missing") as error:
            engine.module.save_pretrained(folder / "by_trainer", state_dict={})
        found["refused"] = str(error.value)
    return found


def loses_gradients(rank, folder):
    """The experts alone: the input of the first block needs no gradient."""
    model = adapted(base("qwen3_moe", folder), "qwen3_moe", target_modules=["experts"])
    loss_of(started(model, settings(3)), 0, rank)


def trains_experts_alone(rank, folder):
    alone = adapted(base("qwen3_moe", folder), "qwen3_moe", target_modules=["experts"])
    expected = train_alone(alone)
    model = adapted(base("qwen3_moe", folder), "qwen3_moe", target_modules=["experts"])
    model.enable_input_require_grads()
    return {"found": train(started(model, settings(3)), rank), "expected": expected}


def trains_in_bf16(stage):
    """DeepSpeed casts A and B to bf16, and trains copies in fp32."""

    def scenario(rank, folder):
        expected = train_alone(adapted(base("qwen3_moe", folder), "qwen3_moe"))
        model = adapted(base("qwen3_moe", folder, dtype=torch.bfloat16), "qwen3_moe")
        engine = started(model, settings(stage, bf16={"enabled": True}))
        found = train(engine, rank)
        out = folder / f"bf16_{stage}"
        model.save_pretrained(out)
        dist.barrier()
        loaded = PeftModel.from_pretrained(base("qwen3_moe", folder), out)
        return {
            "found": found,
            "expected": expected,
            "saved": (values(adapter_parameters(loaded)), found["ends"]),
        }

    return scenario


def adapts_a_trained_model(stage):
    def scenario(rank, folder):
        model = adapted(base("qwen3_moe", folder), "qwen3_moe")
        started(model, settings(stage))
        model.add_adapter("second", model.peft_config["default"])

    return scenario
