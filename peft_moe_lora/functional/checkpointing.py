"""Gradient checkpointing under which the experts of a layer run once, not twice.

    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": keep_experts})

PyTorch runs a checkpointed function again in backward, for the tensors that its backward needs.
Those of an experts layer are its inputs, rows of rank r, and the routing. The first run keeps the
last two, which are small. The second run takes them from there, and it ends as soon as it has the
inputs. Backward computes the pre-activation from them, as with `recompute=True`.

Where the model computes something behind the experts that keeps tensors of its own, the second run
needs their output too. It computes it once, and from the next step on the first run keeps it.

Legend:
    region: one call of a checkpointed function, such as the forward of a decoder layer
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ..ops import Activation

if TYPE_CHECKING:
    from .whole import Inputs, Plan, Results, Selected

_REMEDY = (
    "Use gradient checkpointing without keep_experts, or make what runs before the router "
    "repeatable (preserve_rng_state=True)."
)
# the shapes of experts whose output a second run has needed
_output_needed: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
_this_thread = threading.local()


def keep_experts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The `context_fn` of `torch.utils.checkpoint.checkpoint` under which experts run once.

    It needs `use_reentrant=False`; with True, PyTorch refuses any `context_fn`. It has an effect on
    experts with an `Activation`. All other experts, and linear layers, run twice.
    Under torch.compile, experts run once if their layers have `recompute=True`.

    Returns: the contexts of the first and of the second run.
    """
    if torch.compiler.is_compiling():
        return create_selective_checkpoint_contexts(_policy)
    calls: list[Kept] = []
    return _Run(calls, is_second=False), _Run(calls, is_second=True)


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What torch.compile keeps: the results of experts without their pre-activation."""
    if operator is torch.ops.peft_moe_lora.experts.default:
        names = [argument.name for argument in operator._schema.arguments]
        if args[names.index("recompute")]:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


class Kept(NamedTuple):
    """What a region keeps of one call of an experts layer.

    Attributes:
        results: the results without their output.
        out: [T, H], the output; None if it is not kept.
        version: counts the changes in place that `out` had seen when it was kept.
        top_k_index: [T, top_k] integer.
        seed: as in `Inputs`.
        facts: what is the same in a second run.
    """

    results: "Results"
    out: torch.Tensor | None
    version: int
    top_k_index: torch.Tensor
    seed: torch.Tensor | None
    facts: tuple[Any, ...]

    def unchanged_out(self) -> torch.Tensor | None:
        """The output, unless it is not kept, or the model has changed it in place."""
        if self.out is None or self.out._version != self.version:
            return None
        return self.out.detach()


class _Run:
    """One run of a region, as a context.

    Args:
        calls: what the region keeps, in the order of the calls of experts.
        is_second: whether backward asks for this run. It may ask more than once.
    """

    def __init__(self, calls: list[Kept], is_second: bool) -> None:
        self.calls = calls
        self.is_second = is_second
        self._taken = 0
        self._outer: _Run | None = None

    def __enter__(self) -> None:
        self._taken = 0
        self._outer = current_run()
        _this_thread.run = self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _this_thread.run = self._outer

    def call(
        self,
        function: Callable[..., torch.Tensor],
        compute: Callable[..., "Results"],
        inputs: "Inputs",
        selected: "Selected",
        activation: Activation,
        plan: "Plan",
    ) -> torch.Tensor:
        """The output of an experts layer within this run.

        Args:
            function: takes the other arguments and `compute`, and has gradients.
            compute: computes the results.
            inputs, selected, activation, plan: the groups of `functional.whole`.
        Raises:
            RuntimeError: if this is the second run, and it does not repeat the first one.
        """
        groups = (inputs, selected, activation, plan._replace(recompute=True))
        if self.is_second:
            return self._call_again(function, compute, *groups)

        def computed(*groups: Any) -> "Results":
            results = compute(*groups)
            self.calls.append(_kept(results, *groups))
            return results

        return function(*groups, compute=computed)

    def _call_again(
        self,
        function: Callable[..., torch.Tensor],
        compute: Callable[..., "Results"],
        inputs: "Inputs",
        *others: Any,
    ) -> torch.Tensor:
        kept = self._next(inputs, *others)
        # the masks of dropout belong to the rows of rank r that were kept
        inputs = inputs._replace(seed=kept.seed)
        out = kept.unchanged_out()
        is_kept = out is not None
        if out is None:
            out = torch.empty_like(inputs.x)
        results = kept.results._replace(out=out)
        out = function(inputs, *others, compute=lambda *_: results)
        # PyTorch ends the run within `function` unless something behind the experts is needed
        if not is_kept:
            _output_needed.add(_shapes(inputs))
            *settings, plan = others
            with torch.no_grad():
                out.copy_(compute(inputs, *settings, plan._replace(keeps=False)).out)
        return out

    def _next(self, inputs: "Inputs", *others: Any) -> Kept:
        """What the first run kept of the call that is repeated."""
        if self._taken == len(self.calls):
            raise RuntimeError(
                "keep_experts: the second run of a checkpointed function calls experts more than "
                f"the {len(self.calls)} times of its first run. {_REMEDY}"
            )
        kept = self.calls[self._taken]
        self._taken += 1
        facts = _facts(inputs, *others)
        if facts != kept.facts:
            raise RuntimeError(
                "keep_experts: the second run of a checkpointed function calls other experts, or "
                f"calls them otherwise, than its first run: {facts} after {kept.facts}. {_REMEDY}"
            )
        _check_same_experts(kept.top_k_index, others[0].top_k_index)
        return kept


def current_run() -> _Run | None:
    """The run that this call is a part of; None outside of `keep_experts`."""
    if torch.compiler.is_compiling():
        return None
    return getattr(_this_thread, "run", None)


def _kept(results: "Results", inputs: "Inputs", *others: Any) -> Kept:
    """What the first run keeps."""
    out = None
    version = 0
    if _shapes(inputs) in _output_needed:
        # not the output itself, which will refer to the graph that keeps this
        out = results.out.detach()
        version = out._version
    top_k_index = others[0].top_k_index
    facts = _facts(inputs, *others)
    # an empty output, because one of [T, H] would be kept
    results = results._replace(out=results.out.new_empty(0))
    return Kept(results, out, version, top_k_index, inputs.seed, facts)


def _facts(
    inputs: "Inputs", selected: "Selected", activation: Activation, plan: "Plan"
) -> tuple[Any, ...]:
    rows = tuple(inputs.x.shape), tuple(selected.top_k_index.shape)
    return *rows, *_shapes(inputs), activation, plan


def _shapes(inputs: "Inputs") -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(inputs.up.shape), tuple(inputs.down.shape)


def _check_same_experts(first: torch.Tensor, second: torch.Tensor) -> None:
    """Refuse a second run whose router selects other experts.

    What was kept is in the order of the first selection, and gradients of the second selection's
    weights would be those of other experts.
    """
    message = (
        "keep_experts: the router selected other experts when a checkpointed function ran again, "
        f"so what was kept belongs to other rows. {_REMEDY}"
    )
    if first.is_meta:
        return
    if first.is_cuda:
        # reading it here would wait for the device
        torch._assert_async((first == second).all(), message)
    elif not torch.equal(first, second):
        raise RuntimeError(message)
