"""Runs one implementation of a computation both in eager mode and under torch.compile.

In eager mode the computation is plain Python inside one `torch.autograd.Function`. Under
torch.compile and torch.jit.trace it is one custom operator, and so one node of the graph. On the
meta device the operator gives shapes. Both run without autocast, in backward too.

Legend:
    group: arguments that are passed together. Operators and autograd take flat arguments, which
        `arguments` converts.
    absent: an operator can return only tensors. For a result that is None it returns an empty
        tensor of three dimensions. No other result has three dimensions.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from ..ops import QuantizedWeight
from .arguments import Arguments, flatten, holds_tensors, unflatten

# placeholder for a tensor that autograd saves, in the list of a context's other values
_HELD_BY_AUTOGRAD = object()


class Gradient(NamedTuple):
    """The first group of every backward: the gradient of forward's first result."""

    gradient: torch.Tensor


def is_differentiated(tensors: Iterable[torch.Tensor | QuantizedWeight | None]) -> bool:
    """Whether a call with these tensors may be differentiated.

    It is, if autograd may ask for a gradient. A transform of torch.func and forward-mode
    differentiation count too: an autograd function refuses both, and a direct call would not see
    them. So does torch.jit.trace, whose graph may be run with gradients.
    """
    if torch.is_grad_enabled():
        # not any(...), which takes the host half as long again
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return True
    return forward_ad._current_level >= 0


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """function.apply(*arguments), in half the host's time.

    What else `Function.apply` does is for torch.func and for keyword arguments.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def without_autocast(device_type: str) -> AbstractContextManager:
    """Disable autocast: operations choose their own dtypes; autocast would round inside them."""
    if not _is_autocast_on(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


@contextmanager
def without_autocast_of(module: nn.Module) -> Iterator[None]:
    """The same on the devices of a module's parameters."""
    with ExitStack() as stack:
        for device_type in {parameter.device.type for parameter in module.parameters()}:
            stack.enter_context(without_autocast(device_type))
        yield


def is_autocast_enabled(x: torch.Tensor) -> bool:
    """Whether autocast is on for the device of a tensor."""
    # most steps have no autocast, and to ask for a device's takes the host ten times as long
    return torch._C._is_any_autocast_enabled() and _is_autocast_on(x.device.type)


def _is_autocast_on(device_type: str) -> bool:
    # PyTorch has no autocast for the meta device
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _exactly(run: Callable[..., Any]) -> Callable[..., Any]:
    """The computation of an operator, with autocast disabled while it runs.

    PyTorch runs a backward with the autocast of the place where `backward()` is called.
    """

    @wraps(run)
    def exactly(*groups: Any) -> Any:
        first = groups[0][0]
        # an empty context takes the host a microsecond
        if not is_autocast_enabled(first):
            return run(*groups)
        with torch.autocast(first.device.type, enabled=False):
            return run(*groups)

    return exactly


class Operator:
    """One computation, as an operator under torch.compile and as a plain call elsewhere.

    Args:
        name: name of the operator in the namespace `peft_moe_lora`.
        groups: the class of each argument; the first field of the first one is a tensor.
        results: the class of the result, a named tuple of tensors, any of which may be None.
        run: takes the groups and returns `results`.
        fake: takes the groups and returns `results` with empty tensors of the right shapes and
            dtypes.
    """

    def __init__(
        self,
        name: str,
        groups: tuple[type[Any], ...],
        results: type[Any],
        run: Callable[..., Any],
        fake: Callable[..., Any],
    ):
        self.qualified_name = f"peft_moe_lora::{name}"
        self.groups = groups
        self.results = results
        self.arguments = Arguments(groups)
        exactly = _exactly(run)
        self.run = exactly
        # where Dynamo gives up on a caller, it must not go on within: it cannot trace launches
        self.run_untraced = torch.compiler.disable(exactly)
        self._num_returned = len(results.__match_args__)
        returned = ", ".join(["Tensor"] * self._num_returned)
        torch.library.define(self.qualified_name, f"({self.arguments.schema}) -> ({returned})")
        torch.library.impl(self.qualified_name, "default", self._as_operator(exactly))
        torch.library.register_fake(self.qualified_name, self._as_operator(fake))
        self.operator = getattr(torch.ops.peft_moe_lora, name)

    def compiled(self, *groups: Any) -> Any:
        """Call the operator, and return the results."""
        returned = self.operator(*self.arguments.of(groups))
        if self._num_returned == 1:
            returned = (returned,)
        return self.results(*_none_where_absent(returned))

    def __call__(self, *groups: Any) -> Any:
        """Compute the results, without gradients."""
        if torch.compiler.is_compiling() or torch._C._is_tracing() or groups[0][0].is_meta:
            return self.compiled(*groups)
        # Dynamo traces what this thread calls only where it has set a callback
        if get_eval_frame_callback() is None:
            return self.run(*groups)
        return self.run_untraced(*groups)

    def _as_operator(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with flat arguments, which returns a tensor for each result."""

        def flat(*arguments: Any) -> Any:
            groups = self.arguments.groups(arguments)
            results = function(*groups)
            absent = torch.empty(0, 0, 0, device=groups[0][0].device)
            tensors = tuple(absent.clone() if r is None else r for r in results)
            return tensors[0] if self._num_returned == 1 else tensors

        return flat


def _none_where_absent(results: Iterable[Any]) -> list[Any]:
    found = list(results)
    for i, result in enumerate(found):
        if isinstance(result, torch.Tensor) and result.ndim == 3 and not result.numel():
            found[i] = None
    return found


def differentiable(
    forward_operator: Operator,
    backward_operator: Operator,
    keep: Callable[..., tuple],
    gradients: Callable[..., Any],
) -> Callable[..., torch.Tensor]:
    """Make a function that runs a forward operator, with gradients from a backward operator.

    Args:
        forward_operator: its first group holds every tensor that may get a gradient.
        backward_operator: its first group is `Gradient`. Its groups with tensors come before all
            other groups.
        keep: takes forward's groups and results; returns the groups that backward needs.
        gradients: called as gradients(call, gradient, needs, *kept groups). It returns the
            gradients of forward's first arguments. `call` runs `backward_operator`. `needs` is a
            first group of booleans: whether each field requires a gradient.
    Returns: a function that takes forward's groups and returns its first result. In an eager call
        it may also take `compute`, which computes the results in place of the operator.
    """
    differentiated = forward_operator.groups[0]
    num_inputs = len(differentiated.__match_args__)
    holding = [holds_tensors(kind) for kind in backward_operator.groups]
    assert holding == sorted(holding, reverse=True), "groups with tensors come first"
    # the number of kept groups with tensors; `Gradient` is not kept
    num_held = sum(holding) - 1

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        returned = output if isinstance(output, tuple) else (output,)
        results = forward_operator.results(*_none_where_absent(returned))
        _save(ctx, keep(*forward_operator.arguments.groups(inputs), results), num_held)
        ctx.without_gradients = forward_operator.arguments.without_gradients(inputs)

    def input_gradients(call: Callable[..., Any], ctx: Any, gradient: torch.Tensor) -> tuple:
        needs = differentiated(*ctx.needs_input_grad[:num_inputs])
        return gradients(call, gradient.contiguous(), needs, *_saved(ctx))

    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple:
        found = input_gradients(backward_operator.compiled, ctx, gradient)
        return *found, *ctx.without_gradients[len(found) :]

    torch.library.register_autograd(
        forward_operator.qualified_name, backward, setup_context=setup_context
    )

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *values: Any) -> torch.Tensor:
            # the other groups are one argument, which autograd passes on unchanged
            *inputs, others, compute = values
            groups = (differentiated(*inputs), *others)
            results = compute(*groups)
            _save(ctx, keep(*groups, results), num_held)
            return results[0]

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
            found = input_gradients(backward_operator, ctx, gradient)
            return *found, *[None] * (num_inputs + 2 - len(found))

    # the name that autograd graphs show
    Eager.__name__ = forward_operator.qualified_name.rpartition(":")[2]

    def call(
        inputs: Any, *others: Any, compute: Callable[..., Any] = forward_operator
    ) -> torch.Tensor:
        # torch.jit.trace would record what was done for the experts of the example, and no launch
        # of a kernel; this is no function of its own, which Dynamo may trace where it gives up on
        # its caller
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            return forward_operator.compiled(inputs, *others)[0]
        # an autograd function costs the host more than a replay of few rows
        if is_differentiated(inputs):
            return applied(Eager, *inputs, others, compute)
        return compute(inputs, *others)[0]

    return call


def _save(ctx: Any, groups: tuple, num_held: int) -> None:
    """Keep groups for backward.

    Args:
        ctx: the context of autograd.
        groups: the groups; those with tensors come first.
        num_held: number of groups with tensors. Autograd saves their tensors, and the context keeps
            all other values.
    """
    others = flatten(groups[:num_held])
    tensors = []
    for i, value in enumerate(others):
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            others[i] = _HELD_BY_AUTOGRAD
    ctx.plain = groups[num_held:]
    ctx.kinds = [type(group) for group in groups[:num_held]]
    ctx.others = others
    ctx.save_for_backward(*tensors)


def _saved(ctx: Any) -> list[Any]:
    """The groups that `_save` kept."""
    # read once: under checkpointing each access unpacks the tensors, and may recompute them
    tensors = iter(ctx.saved_tensors)
    values = [next(tensors) if other is _HELD_BY_AUTOGRAD else other for other in ctx.others]
    return [*unflatten(ctx.kinds, values), *ctx.plain]


def as_stored(
    gradient: torch.Tensor | None, like: torch.Tensor | QuantizedWeight | None
) -> torch.Tensor | None:
    """A gradient in the dtype of the tensor that it belongs to; None if one of the two is None."""
    if gradient is None or like is None:
        return None
    if gradient.dtype == like.dtype:
        return gradient
    return gradient.to(like.dtype)
