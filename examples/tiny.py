"""A tiny Mixture-of-Experts model, pretrained on Python's documentation in half a minute."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)

from texts import documentation, hold_out, pack

__all__ = ["make_base", "make_model", "make_tokenizer", "pretrain"]


def make_base(folder: Path, steps: int) -> None:
    """Pretrain the tiny model into a folder, and say so."""
    # on tensors this small a second thread only waits, on a busy machine for minutes
    torch.set_num_threads(1)
    print(f"Pretraining a tiny model on CPython's documentation, {steps} steps")
    pretrain(folder, steps)


def make_tokenizer(texts: list[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens, trained on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def make_model(vocab_size: int = 512) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE of 2 layers with 8 experts each, 2 of them per token: 260,000 parameters."""
    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Qwen3MoeForCausalLM(config)


def pretrain(folder: Path, steps: int, length: int = 128) -> None:
    """Train the tiny model on the documentation, and save it with its tokenizer."""
    texts, _ = hold_out(documentation())
    tokenizer = make_tokenizer(texts)
    model = make_model(len(tokenizer))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=4e-3,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        weight_decay=0.01,
        logging_steps=100,
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    Trainer(model, arguments, train_dataset=pack(texts, tokenizer, length)).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
