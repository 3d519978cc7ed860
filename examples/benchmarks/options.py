"""Command lines from dataclasses, by transformers' HfArgumentParser."""

import argparse
from collections.abc import Callable
from typing import Any, TypeVar

from transformers import HfArgumentParser

Arguments = TypeVar("Arguments")


def no_other_defaults(args: object) -> dict[str, Any]:
    """The defaults of the dataclass hold whatever the options are."""
    return {}


def parse(
    kind: type[Arguments],
    description: str,
    argv: list[str] | None,
    other_defaults: Callable[[Arguments], dict[str, Any]] = no_other_defaults,
) -> tuple[HfArgumentParser, Arguments]:
    """Read a command line.

    Args:
        kind: the dataclass of the options; a field's metadata is what argparse is told of it.
        argv: None for the process's own.
        other_defaults: is given the options, and returns defaults that hold because of them.
    Returns: the parser, for its `error`, and the options.
    """
    parser = HfArgumentParser(
        kind, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    args = kind(**vars(parser.parse_args(argv)))
    parser.set_defaults(**other_defaults(args))
    return parser, kind(**vars(parser.parse_args(argv)))
