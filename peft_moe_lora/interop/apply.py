"""`apply_to_peft`: PEFT's `LoraConfig(target_parameters=...)` on experts, computed by our kernels.

One method of PEFT is replaced, `ParamWrapper.forward`, and one is added for torch.compile.
Parameters, their names, files and merging stay PEFT's. A call that `read_call` leaves to PEFT runs
PEFT's own method.
"""

import functools
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from peft.tuners.lora.layer import ParamWrapper

from . import counting
from .left import LeftToPeft, NotAtWork
from .tracing import moe_lora_prepare
from .wrappers import read_call

logger = logging.getLogger(__name__)

# torch.compile looks the method up by the name of its function
_PREPARE = moe_lora_prepare.__name__

Forward = Callable[..., torch.Tensor]


class _InForce(NamedTuple):
    """PEFT's own method, and the one in its place."""

    own: Forward
    ours: Forward


_in_force: _InForce | None = None


class AppliedToPeft:
    """What `apply_to_peft` returns.

    At the end of a `with` block it restores what was in force before the call: it removes nothing
    if an earlier call had applied it.
    """

    def __init__(self, is_first: bool) -> None:
        self._is_first = is_first

    def remove(self) -> None:
        """Give PEFT its own method back, whichever call applied ours; a second call does nothing.

        Raises:
            RuntimeError: if other code has replaced the method since.
        """
        global _in_force
        if _in_force is None or not is_applied():
            return
        installed = _installed()
        if installed is not _in_force.ours:
            raise RuntimeError(
                "peft's ParamWrapper.forward was replaced again after apply_to_peft(), by "
                f"{installed!r}, so it cannot be restored; undo that first, then call remove()."
            )
        ParamWrapper.forward = _in_force.own  # type: ignore[method-assign]
        delattr(ParamWrapper, _PREPARE)
        _in_force = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_first:
            self.remove()


def apply_to_peft() -> AppliedToPeft:
    """Compute the experts of PEFT's own `target_parameters` with this package's kernels.

    It holds for every model of this process, also for those made before. Calling it again changes
    nothing. On a GPU the Triton kernels run, elsewhere the same formula in PyTorch. What they
    cannot compute runs PEFT's own code, and the log says why, once for each reason.

    Returns: a handle; `.remove()` undoes it. It is a context manager too.
    """
    global _in_force
    counting.start_if_asked()
    if is_applied():
        return AppliedToPeft(is_first=False)
    own = _installed()
    ours = _replacing(own)
    ParamWrapper.forward = ours  # type: ignore[method-assign]
    setattr(ParamWrapper, _PREPARE, moe_lora_prepare)
    _in_force = _InForce(own, ours)
    return AppliedToPeft(is_first=True)


def is_applied() -> bool:
    """Whether an `apply_to_peft` is in force."""
    return _in_force is not None and _installed() is not _in_force.own


def _installed() -> Forward:
    return vars(ParamWrapper)["forward"]


def _replacing(own: Forward) -> Forward:
    """The method that stands in for `own`, PEFT's `ParamWrapper.forward`."""

    @functools.wraps(own)
    def forward(self: ParamWrapper, *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            return read_call(self, *args, **kwargs).run(*args)
        except LeftToPeft as left:
            chosen = own
            if not torch.compiler.is_compiling():
                log_once(str(left), left.level)
            elif not isinstance(left, NotAtWork):
                chosen = outside
        return chosen(self, *args, **kwargs)

    outside = torch.compiler.disable(
        forward, reason="PEFT's own code computes these experts, or this call is counted"
    )
    return forward


@functools.cache
def log_once(reason: str, level: int) -> None:
    """Log, once in a process, why PEFT's own code computes experts."""
    if level != logging.NOTSET:
        logger.log(level, "apply_to_peft: PEFT's own code runs, because %s.", reason)
