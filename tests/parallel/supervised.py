"""TRL's SFTTrainer, which adds the adapter itself, under FSDP2 and in one process."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from helpers import VOCAB, R, tiny_model, token_ids
from parallel.accelerated import launched, sharding
from parallel.trainer import SEQUENCES, STEPS, adapter_of, losses_of
from peft_moe_lora import MoELoraConfig


class InOrder(SFTTrainer):
    """Takes the sequences in their order, so that processes and one process share each batch."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def tokenizer():
    words = {f"w{i}": i for i in range(VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", eos_token="w2")


def sft(folder, batch_size):
    """Train an adapter that SFTTrainer adds, and save it. Returns: the losses and the adapter."""
    rows = [{"input_ids": row} for row in token_ids(SEQUENCES, seed=11).tolist()]
    arguments = SFTConfig(
        str(folder),
        per_device_train_batch_size=batch_size,
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        # its aux loss over all sequences is not the mean of those of each process
        router_aux_loss_coef=0.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    # without the first values of PEFT, B is random too
    config = MoELoraConfig(
        r=R, lora_alpha=2 * R, target_modules=["experts", "o_proj"], init_lora_weights=False
    )
    torch.manual_seed(0)
    trainer = InOrder(
        tiny_model(),
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=config,
    )
    trainer.train()
    trainer.save_model(str(folder / "model"))
    return {"losses": losses_of(trainer), "adapter": adapter_of(trainer.model)}


def under_fsdp(rank, folder):
    with launched(**sharding("qwen3_moe", "FULL_STATE_DICT")):
        return sft(folder / "sft", 1)
