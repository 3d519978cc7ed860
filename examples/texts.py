"""The texts of the examples: what every Python carries with it, or a JSONL file of your own."""

import json
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import torch

__all__ = ["documentation", "hold_out", "pack", "read_jsonl", "standard_library"]


def documentation() -> list[str]:
    """CPython's own documentation, one text a topic: 400,000 characters of English on Python.

    Some topics are whole sections of others: left out, or held-out text would be among the text to train on.
    """
    texts = list(dict.fromkeys(topics[name] for name in sorted(topics)))
    bodies = [
        text.partition("\n\n")[2].strip() for text in texts
    ]  # the heading is underlined by its level
    contained = [
        any(body in other for other in texts if other is not text)
        for text, body in zip(texts, bodies, strict=True)
    ]
    return [text for text, inside in zip(texts, contained, strict=True) if not inside]


def standard_library() -> list[str]:
    """The source of the standard library, one text a module: 4,200,000 characters of Python."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))]


def read_jsonl(path, tokenizer) -> list[str]:
    """One text a line of a JSONL file.

    Args:
        path: every line is an object with a "text", or with "messages" as chat templates take them.
        tokenizer: its chat template writes the messages out.
    Raises:
        ValueError: if a line is not JSON or has neither field, or if messages meet a tokenizer without a template.
    """
    texts = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not JSON ({error}); every line must be one object."
            ) from error
        if "text" in row:
            texts.append(row["text"])
        elif "messages" in row:
            texts.append(tokenizer.apply_chat_template(row["messages"], tokenize=False))
        else:
            raise ValueError(
                f'{path}, line {number}: has {sorted(row)}; it needs "text" or "messages".'
            )
    return texts


def hold_out(texts: list[str], every: int = 10) -> tuple[list[str], list[str]]:
    """Texts to train on, and one text of every ten, whole, that training never sees."""
    return [text for i, text in enumerate(texts) if i % every], texts[::every]


def pack(texts: list[str], tokenizer, length: int) -> list[dict[str, torch.Tensor]]:
    """The texts end to end, an end-of-text token after each, cut into blocks of `length` tokens; the rest is dropped.

    Returns: a dataset for the Trainer, "input_ids" and "labels" of shape [length].
    Raises:
        ValueError: if the texts do not fill one block.
    """
    ids = [
        token for row in tokenizer(texts)["input_ids"] for token in [*row, tokenizer.eos_token_id]
    ]
    if len(ids) < length:
        raise ValueError(
            f"{len(texts)} texts make {len(ids)} tokens, less than one block of {length}."
        )
    blocks = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return [{"input_ids": block, "labels": block} for block in blocks]
