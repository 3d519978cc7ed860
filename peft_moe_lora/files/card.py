"""Writes the model card of an adapter: README.md, on what it is and how to load and serve it.

A `CardText` is the part of the card that describes the adapter's format. Each format has its own.
The text of this package's own format is in this file, because saving a model writes it too.
"""

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from .servers import SGLANG, VLLM, Server
from .tensor_file import FilePath
from .text import is_plain, shown, without_credentials

_BEGIN = "<!-- peft_moe_lora: begin -->"
_END = "<!-- peft_moe_lora: end -->"

# stands for the base model where its name is not known, or cannot stand in a command
_BASE = "BASE"
_LONGEST_LINE = 10_000

# for formats that no server reads: the adapter is converted first
_CONVERT = "peft-moe-lora convert ADAPTER ADAPTER-serving --to per_expert --base-config {base}"
_CONVERT_NOTE = (
    "vLLM takes gpt-oss, Qwen3-VL-MoE and Qwen3.5-MoE (the model with images) as `--to vllm_3d`; "
    "SGLang takes Mixtral and Nemotron-H as `--to sglang_3d`, and no LoRA on routers."
)
# for adapters that hold more than LoRA
_MERGE_NOTE = "vLLM and SGLang load LoRA alone, and this adapter holds more: serve it merged."


@dataclass(frozen=True)
class CardText:
    """The part of a model card that describes the adapter's format.

    Attributes:
        layout: how the tensors are named and ordered, in Markdown.
        loading: the lines on how to load it, in Markdown, with the field {base},
            a string of Python.
        served_by: the servers that read the format; empty if it has to be converted first.
        serving: the commands that serve it with a program of its own, with the field {base}; empty
            for formats of servers.
    """

    layout: str
    loading: tuple[str, ...]
    served_by: tuple[Server, ...] = ()
    serving: tuple[str, ...] = ()


def loading_with_peft(*imports: str) -> tuple[str, ...]:
    """The lines that load an adapter with PEFT, after some further imports."""
    return (
        "```python",
        *imports,
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained({base}, dtype="auto")',
        'model = PeftModel.from_pretrained(model, "ADAPTER")',
        "```",
    )


OUR_CARD = CardText(
    layout="`<experts>.lora_A.<projection>` `[r * E, K]` and `lora_B` `[N, r * E]`, "
    "**both expert-major**: rows, and columns, `e*r` up to `(e + 1)*r` belong to expert `e`.",
    loading=loading_with_peft("import peft_moe_lora  # registers the tuner"),
)


def write_card(
    folder: FilePath,
    card: CardText,
    config: Mapping[str, Any],
    notes: Iterable[str] = (),
    servers: Collection[Server] | None = None,
) -> None:
    """Write our section of the README in an adapter's folder, and keep the rest of the README.

    Args:
        folder: the adapter's folder.
        card: the text about the adapter's format.
        config: the adapter's configuration, as a dict.
        notes: sentences on what a conversion changed.
        servers: the servers that read this adapter; by default all that read its format.
    """
    path = Path(folder, "README.md")
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        text = _front_matter(config)
    head, _, rest = text.partition(_BEGIN)
    tail = rest.partition(_END)[2]
    section = f"{_BEGIN}\n{card_section(card, config, notes, servers)}\n{_END}"
    path.write_text(f"{head.rstrip()}\n\n{section}\n{tail.lstrip()}".lstrip(), encoding="utf-8")


def card_section(
    card: CardText,
    config: Mapping[str, Any],
    notes: Iterable[str] = (),
    servers: Collection[Server] | None = None,
) -> str:
    """Our section in Markdown: facts, notes, how to load the adapter, how to serve it.

    Args: as for `write_card`.
    """
    base = config.get("base_model_name_or_path") or _BASE
    argument = _as_argument(base)
    lines = ["## LoRA on the experts of a Mixture-of-Experts model", ""]
    lines += [f"- {name}: {fact}" for name, fact in _facts(card, config, base).items() if fact]
    lines += [f"- {shown(note, _LONGEST_LINE)}" for note in notes]
    literal = _python_string(argument)
    lines += ["", "### Load", "", *(line.format(base=literal) for line in card.loading)]
    if servers is None:
        servers = card.served_by
    lines += ["", "### Serve", "", *_serving(card, config, servers, shlex.quote(argument))]
    return "\n".join(lines)


def _facts(card: CardText, config: Mapping[str, Any], base: str) -> dict[str, str]:
    """Name of a fact -> its text; empty for a fact that the card leaves out."""
    rank = str(config.get("r"))
    if config.get("rank_pattern"):
        rank += f", by name {shown(config['rank_pattern'], _LONGEST_LINE)}"
    root = "r"
    if config.get("use_rslora"):
        root = "sqrt(r)"
    targets = [*_listed(config.get("target_modules")), *_listed(config.get("target_parameters"))]
    experts = ""
    if config.get("expert_indices"):
        experts = (
            "only those that `expert_indices` in adapter_config.json names; "
            "the others are the base model's"
        )
    return {
        "base model": _code(base),
        "rank": rank,
        "scaling": f"lora_alpha / {root}, lora_alpha {config['lora_alpha']}",
        "targets": ", ".join(_code(target) for target in targets) or "every experts module",
        "experts": experts,
        "projections": _projections(config.get("target_projections")),
        "layout": card.layout,
    }


def _projections(targeted: Sequence[str] | Mapping[str, Sequence[str]] | None) -> str:
    """The adapted projections of all layers, or those of each layer."""
    if isinstance(targeted, Mapping):
        return f"by name {shown(targeted, _LONGEST_LINE)}, and both in the other layers"
    return ", ".join(targeted or ())


def _serving(
    card: CardText, config: Mapping[str, Any], servers: Collection[Server], base: str
) -> list[str]:
    """The commands that serve an adapter; if no server reads its format, convert it first.

    `base` is quoted for a shell.
    """
    if card.serving:
        return ["```sh", *(line.format(base=base) for line in card.serving), "```"]
    ranks = config.get("rank_pattern") or {}
    rank = max((config.get("r") or 1, *ranks.values()))
    commands = []
    adapter = "ADAPTER"
    note = ""
    if _holds_more_than_lora(config):
        servers = ()
        note = _MERGE_NOTE
    elif not card.served_by:
        commands.append(_CONVERT.format(base=base))
        servers = (VLLM, SGLANG)
        adapter = "ADAPTER-serving"
        note = _CONVERT_NOTE
    for server in servers:
        allocated = server.allocated(rank)
        if allocated is not None:
            commands.append(server.command.format(base=base, rank=allocated, adapter=adapter))
    commands.append(
        f"peft-moe-lora merge ADAPTER {base} MERGED  # or a full checkpoint, for any server"
    )
    lines = ["```sh", *commands, "```"]
    if note:
        lines += ["", note]
    return lines


def _holds_more_than_lora(config: Mapping[str, Any]) -> bool:
    """Whether PEFT saves more than LoRA with this configuration."""
    more = config.get("modules_to_save") or config.get("trainable_token_indices")
    return bool(more) or (config.get("bias") or "none") != "none"


def _as_argument(base: str) -> str:
    """The base's name as it stands in commands; a placeholder if it cannot stand there.

    A line break would end the command, and a leading dash would make the name an option. A name
    that holds a password or a token is not printed.
    """
    if not is_plain(base) or base.startswith("-") or without_credentials(base) != base:
        return _BASE
    return base


def _python_string(text: str) -> str:
    """A printable text as a string of Python."""
    if '"' in text or "\\" in text:
        return repr(text)
    return f'"{text}"'


def _code(text: str) -> str:
    """Text as code in Markdown, on one line."""
    text = shown(text)
    if "`" in text:
        return f"``` {text.replace('```', '` ` `')} ```"
    return f"`{text}`"


def _listed(value: str | Iterable[str] | None) -> list[str]:
    if isinstance(value, str):
        return [value]
    return sorted(value or ())


def _front_matter(config: Mapping[str, Any]) -> str:
    """The YAML block that the hub reads."""
    base = config.get("base_model_name_or_path")
    if base is not None and _as_argument(base) != base:
        base = None
    data = ModelCardData(
        base_model=base,
        library_name="peft",
        tags=["lora", "moe"],
    )
    return f"---\n{data.to_yaml()}\n---\n"
