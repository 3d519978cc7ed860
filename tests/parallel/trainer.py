"""The Trainer under FSDP, and the same work in one process with batches of two sequences."""

import torch
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, Trainer

from helpers import adapter_parameters, fill_adapter, moe_lora, tiny_model, token_ids
from helpers.models import training_arguments
from parallel.accelerated import launched, sharding
from parallel.fully_sharded import ROUTERS
from peft_moe_lora.parallel.sharding import path_without_wrappers, whole

SEQUENCES = 8
STEPS = 4
# the worse of two models is the best one here: that of the second step, which is saved then
KEEPS_THE_SECOND = {
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,
}


class InOrder(Trainer):
    """Takes the sequences in their order, so that processes and one process share each batch."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def adapted(family, base):
    """The model with its adapter; the first process fills it where the others load nothing."""
    targets = ["experts", ROUTERS.get(family, "gate"), "o_proj"]
    model = moe_lora(base, randomize=False, target_modules=targets)
    if not any(parameter.is_meta for parameter in model.parameters()):
        fill_adapter(model)
    return model


def trainer_of(model, folder, batch_size, **arguments):
    rows = token_ids(SEQUENCES, seed=11).tolist()
    data = [{"input_ids": row, "labels": row} for row in rows]
    settings = training_arguments(
        folder,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        max_grad_norm=1.0,
        **arguments,
    )
    return InOrder(model, settings, train_dataset=data, eval_dataset=data[:4])


def losses_of(trainer):
    return torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line])


def adapter_of(model):
    """Name of a parameter, without wrappers -> the whole parameter."""
    return {
        path_without_wrappers(name): whole(parameter.detach()).clone()
        for name, parameter in adapter_parameters(model).items()
    }


def alone(family, folder):
    """What one process gives."""
    return _lives(lambda: adapted(family, tiny_model(family)), folder, 2)


def _lives(build, folder, batch_size):
    """Train, go back to the second step, which was the best, and go on from its checkpoint.

    Returns: the losses and the adapter of both runs.
    """
    first = trainer_of(build(), folder, batch_size, **KEEPS_THE_SECOND)
    first.train()
    first.save_model(str(folder / "model"))
    first.model.save_pretrained(folder / "adapter")
    again = trainer_of(build(), folder / "again", batch_size)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return {
        "losses": losses_of(first),
        "second": adapter_of(first.model),
        "resumed": losses_of(again),
        "last": adapter_of(again.model),
        "class": type(first.model).__name__,
    }


def lives(family, name, **settings):
    """A scenario; `name` is that of the folder, and begins with the kind of checkpoints."""

    def scenario(rank, folder):
        base = folder / f"base_{family}"
        if rank == 0 and not base.exists():
            tiny_model(family).save_pretrained(base)
        torch.distributed.barrier()

        def build():
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            return adapted(family, model)

        with launched(**sharding(family, name.split(",")[0]), **settings):
            return _lives(build, folder / f"{family} {name}", 1)

    return scenario


def trains_under_the_first_fsdp(rank, folder):
    settings = {**sharding("qwen3_moe", "FULL_STATE_DICT"), "version": 1, "use_orig_params": True}
    with launched(**settings):
        trainer_of(adapted("qwen3_moe", tiny_model("qwen3_moe")), folder / "first", 1).train()
