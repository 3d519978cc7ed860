"""What a run of fine-tuning ends with: checks, a sample of text, a picture, the next command."""

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from texts import Block

__all__ = ["Check", "continuation", "next_command", "plot_losses", "print_checks", "print_losses"]

PROMPT_TOKENS = 24
SAMPLE_TOKENS = 48


@dataclass(frozen=True)
class Check:
    """One statement about a run.

    Attributes:
        what: the statement, with its numbers.
        passed: whether it holds.
    """

    what: str
    passed: bool


@torch.random.fork_rng()
@torch.no_grad()
def continuation(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, block: Block
) -> tuple[str, str]:
    """The start of a block, and how the model goes on, each on one line."""
    model.eval()
    torch.manual_seed(0)
    prompt = block["input_ids"][None, :PROMPT_TOKENS].to(model.device)
    ids = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=SAMPLE_TOKENS,
        # a tiny model repeats one word if it always takes the most likely
        do_sample=True,
        top_k=20,
        pad_token_id=tokenizer.eos_token_id,
    )
    texts = (tokenizer.decode(part) for part in (prompt[0], ids[0, PROMPT_TOKENS:]))
    start, rest = (repr(text)[1:-1] for text in texts)
    return start, rest


def print_losses(before: dict[str, float], after: dict[str, float]) -> None:
    """A table of held-out losses in nats per token, by text."""
    print(f"\n{'held-out loss, nats per token':<32} before   after")
    for name in before:
        print(f"{name:<32} {before[name]:6.3f}  {after[name]:6.3f}")


def print_checks(checks: list[Check]) -> None:
    """A line for each check, and the verdict.

    Raises:
        SystemExit: if a check failed.
    """
    print()
    for check in checks:
        word = "PASS"
        if not check.passed:
            word = "FAIL"
        print(f"{word}  {check.what}")
    failed = sum(not check.passed for check in checks)
    if failed:
        raise SystemExit(f"\nVerdict: FAIL, {failed} of {len(checks)} checks failed.")
    print(f"\nVerdict: PASS, all {len(checks)} checks hold.")


def plot_losses(history: list[dict[str, Any]], path: Path) -> bool:
    """Plot the training loss that a Trainer logged.

    Args:
        history: `trainer.state.log_history`.
        path: the picture.
    Returns: whether there is a picture; without matplotlib there is none.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    logged = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*logged, strict=True), marker=".")
    axes.set(xlabel="step", ylabel="training loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return True


def next_command(output: Path, base: str) -> str:
    """The command that converts the adapter for servers, to be run in this folder."""
    python = os.path.relpath(sys.executable)
    if python.startswith(".."):
        python = sys.executable
    words = [python, "-m", "peft_moe_lora", "convert"]
    words += [os.path.relpath(output / name) for name in ("adapter", "adapter-serving")]
    if Path(base).is_dir():
        base = os.path.relpath(base)
    return shlex.join([*words, "--base-config", base])
