"""What the recipes of this folder share: their options, the model, and the data.

With --tiny both recipes run anywhere: a small random model learns to count by threes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from peft_moe_lora import MoELoraConfig

Block = dict[str, list[int]]


def parse(description: str) -> argparse.Namespace:
    """Read the command line; with --tiny, `model` is a folder that `make_tiny` fills."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="name or folder of a Mixture-of-Experts model")
    parser.add_argument("--data", type=Path, help='JSONL; each line has "text"')
    parser.add_argument("--tiny", action="store_true", help="a small random model, on any machine")
    parser.add_argument("--output", type=Path, default=Path("moe-lora-out"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8, help="blocks, over all processes")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a block")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--r", type=int, default=16, help="rank of the update of one expert")
    args = parser.parse_args()
    if args.tiny:
        args.model = str(args.output / "base")
        args.length = 32
        # a model this small wants a rate fifty times as high (the study in docs/choosing-rank.md)
        args.learning_rate = 1e-2
    elif not (args.model and args.data):
        parser.error("--model and --data are needed, or --tiny")
    return args


def make_tiny(folder: str) -> PreTrainedModel:
    """Save a random model of two layers, eight experts and 256 tokens."""
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        # about the root of 1 / hidden_size: every layer has a share in the output
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(folder)
    return model


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of from_pretrained."""
    if args.tiny:
        return {"dtype": torch.float32}
    return {"dtype": torch.bfloat16}


def adapter_config(args: argparse.Namespace) -> MoELoraConfig:
    """An adapter on every expert."""
    return MoELoraConfig(
        r=args.r, lora_alpha=2 * args.r, target_modules=["experts"], task_type="CAUSAL_LM"
    )


def blocks(args: argparse.Namespace) -> list[Block]:
    """The data, cut into blocks of equal length; enough of them for one step."""
    ids = _token_ids(args)
    starts = range(0, len(ids) - args.length + 1, args.length)
    cut = [ids[start : start + args.length] for start in starts]
    if len(cut) < args.batch_size:
        raise ValueError(
            f"the data give {len(cut)} blocks of {args.length} tokens, but a batch has "
            f"{args.batch_size}; give more text, or lower --length or --batch-size."
        )
    return [{"input_ids": block, "labels": block} for block in cut]


def _token_ids(args: argparse.Namespace) -> list[int]:
    if args.tiny:
        return [3 * i % 256 for i in range(8192)]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids: list[int] = []
    with args.data.open(encoding="utf-8") as lines:
        for line in lines:
            ids += tokenizer(json.loads(line)["text"])["input_ids"]
            ids.append(tokenizer.eos_token_id)
    return ids
