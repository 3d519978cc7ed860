"""The command line of the examples, read from a dataclass by transformers' HfArgumentParser."""

import argparse
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

__all__ = ["REAL_RATE", "TINY_RATE", "Arguments", "parse"]

# the learning rate that docs/choosing-rank.md begins with
REAL_RATE = 2e-4
# a model as small as the tiny one wants a rate fifty times as high (the study in that page)
TINY_RATE = 1e-2


@dataclass
class Arguments:
    """What every example is told.

    The defaults of most options are an example's own: one for the tiny model, one for a real model.
    """

    model: str | None = field(
        default=None,
        metadata={"help": "name or folder of a model (without it: a tiny one, pretrained here)"},
    )
    config: Path | None = field(
        default=None,
        metadata={"help": "YAML file with any of these options; the command line overrides it"},
    )
    data: Path | None = field(
        default=None,
        metadata={"help": "JSONL to train on (without it: the standard library's source)"},
    )
    output: Path = field(default=Path("moe-lora"), metadata={"help": "folder for everything"})
    steps: int = field(
        default=0, metadata={"help": "optimizer steps; 0: once through the data", "metavar": "N"}
    )
    length: int = field(default=128, metadata={"help": "tokens per block", "metavar": "N"})
    batch_size: int = field(default=16, metadata={"help": "blocks per batch", "metavar": "N"})
    learning_rate: float = field(
        default=TINY_RATE, metadata={"help": "highest learning rate", "metavar": "RATE"}
    )
    r: int = field(
        default=16, metadata={"help": "rank of each update; lora_alpha is 2 r", "metavar": "N"}
    )
    liger: bool = field(
        default=False,
        metadata={"help": "Liger's norms, rope and chunked loss; needs a GPU and liger-kernel"},
    )
    pretrain_steps: int = field(
        default=300, metadata={"help": "steps that make the tiny model", "metavar": "N"}
    )

    @property
    def tiny(self) -> bool:
        """Whether the example makes its model."""
        return self.model is None

    @property
    def base(self) -> str:
        """Name or folder of the model to adapt."""
        return self.model or str(self.output / "base")


Kind = TypeVar("Kind", bound=Arguments)


def parse(
    kind: type[Kind],
    description: str,
    tiny: dict[str, Any],
    real: dict[str, Any],
    argv: list[str] | None = None,
) -> Kind:
    """Read the command line.

    Args:
        kind: the dataclass of the example's options.
        tiny, real: the example's defaults for the tiny model, and those that differ with --model.
        argv: None for the process's own.
    """
    real = tiny | real
    lines = [f"  --{name.replace('_', '-'):<16} {tiny[name]!s:<16} {real[name]}" for name in tiny]
    parser = HfArgumentParser(
        kind,
        description=description,
        epilog="\n".join(["defaults of the tiny model and of a real one:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = sys.argv[1:] if argv is None else argv
    file = parser.parse_args(words).config
    if file:
        # what stands later counts
        words = [*_from_file(parser, kind, file), *words]
    parser.set_defaults(**tiny)
    if parser.parse_args(words).model:
        parser.set_defaults(**real)
    args = kind(**vars(parser.parse_args(words)))
    if args.model and not args.data:
        parser.error("--model needs --data FILE.jsonl to train on")
    args.output = args.output.resolve()
    return args


def _from_file(parser: HfArgumentParser, kind: type[Arguments], path: Path) -> list[str]:
    """The options in a YAML file, as the words that would give them on the command line."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = [field.name for field in fields(kind) if field.name != "config"]
    if not isinstance(content, dict):
        parser.error(f"--config {path}: needs lines `option: value`; the options are {known}")
    found = {str(name).replace("-", "_"): value for name, value in content.items()}
    unknown = sorted(found.keys() - known)
    if unknown:
        parser.error(f"--config {path}: there are no options {unknown}; the options are {known}")
    several = {action.dest for action in parser._actions if action.nargs == "+"}
    words = []
    for name, value in found.items():
        if isinstance(value, dict) or (isinstance(value, list) and name not in several):
            parser.error(f"--config {path}: {name} takes one value, got {value}")
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
    return words
