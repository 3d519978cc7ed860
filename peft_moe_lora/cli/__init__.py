"""`peft-moe-lora`, the command line.

Exit codes:
    0  done
    1  verify found a difference
    2  wrong usage
    3  an adapter or checkpoint is damaged, unknown, or made for another model
    4  refused: the target program would not read the result, or the adapter is ambiguous
    5  the destination exists
`run` ends with the code of the program that it has started.

Results go to stdout. An error goes to stderr, as one line that begins with "error:".

Files of this room import other rooms inside of functions, so that help needs no torch.
"""

try:
    import rich as _rich  # noqa: F401
    import typer as _typer  # noqa: F401
except ImportError as error:
    raise SystemExit(
        f"error: the command line needs typer and rich ({error}): pip install 'peft-moe-lora[cli]'"
    ) from error

from .app import app, main
from .errors import BAD, DIFFERENT, EXISTS, REFUSED

__all__ = ["BAD", "DIFFERENT", "EXISTS", "REFUSED", "app", "main"]
