"""Command lines from dataclasses, by transformers' HfArgumentParser."""

import argparse
from typing import TypeVar

from transformers import HfArgumentParser

Arguments = TypeVar("Arguments")


def parse(
    kind: type[Arguments], description: str, argv: list[str] | None
) -> tuple[HfArgumentParser, Arguments]:
    """Read a command line.

    Args:
        kind: the dataclass of the options; a field's metadata is what argparse is told of it.
        argv: None for the process's own.
    Returns: the parser, for its `error`, and the options.
    """
    parser = HfArgumentParser(
        kind, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    return parser, kind(**vars(parser.parse_args(argv)))


def fill(args: object, defaults: dict[str, object]) -> None:
    """Give the options that are None their defaults."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
