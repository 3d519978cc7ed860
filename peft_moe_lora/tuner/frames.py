"""The functions of PEFT and transformers that are running at this moment.

They hand the tuner less than it has to check, so it reads the rest from their local variables. A
release in which a variable has another name must not switch a check off in silence.
"""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any


def frames() -> Iterator[FrameType]:
    """Yield the frames of the functions that are running, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def local_of(frame: FrameType, name: str) -> Any:
    """A local variable of a running function.

    Raises:
        RuntimeError: if the function has no such variable.
    """
    if name not in frame.f_locals:
        module = frame.f_globals["__name__"]
        raise RuntimeError(
            f"{module}.{frame.f_code.co_name} of the installed release has no variable {name}, "
            "which peft_moe_lora reads to check an adapter before it is loaded or saved. Install "
            "a release of peft and transformers that this release of peft_moe_lora supports."
        )
    return frame.f_locals[name]
