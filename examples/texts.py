"""The texts of the examples: what every Python carries with it, or a JSONL file of your own."""

import json
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import PreTrainedTokenizerBase

__all__ = ["Block", "documentation", "hold_out", "pack", "read_jsonl", "standard_library"]

Block = dict[str, torch.Tensor]


def documentation() -> list[str]:
    """CPython's own documentation, one text a topic: 400,000 characters of English on Python.

    A topic that is a section of another one is left out: if one of the two were held out, its text
    would still be trained on.
    """
    texts = list(dict.fromkeys(topics[name] for name in sorted(topics)))

    def is_section(text: str) -> bool:
        # without its heading, which is underlined by its level
        _, _, body = text.partition("\n\n")
        return any(body.strip() in other for other in texts if other is not text)

    return [text for text in texts if not is_section(text)]


def standard_library() -> list[str]:
    """The source of the standard library, one text a module: 4,200,000 characters of Python."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))]


def read_jsonl(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """One text a line of a JSONL file.

    Args:
        path: every line is an object with "text", or with "messages" as chat templates take them.
        tokenizer: its chat template turns messages into text.
    Raises:
        ValueError: if a line is not JSON or has neither field, or if there are messages and the
            tokenizer has no chat template.
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


def pack(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[Block]:
    """The texts joined, an end-of-text token after each, and cut into blocks of `length` tokens.

    The tokens of the last, incomplete block are dropped.

    Returns: a dataset for the Trainer; in each block "input_ids" and "labels", [length] int64.
    Raises:
        ValueError: if the texts do not fill one block.
    """
    ids: list[int] = []
    for row in tokenizer(texts)["input_ids"]:
        ids += [*row, tokenizer.eos_token_id]
    if len(ids) < length:
        raise ValueError(
            f"{len(texts)} texts make {len(ids)} tokens, less than one block of {length}."
        )
    blocks = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return [{"input_ids": block, "labels": block} for block in blocks]
