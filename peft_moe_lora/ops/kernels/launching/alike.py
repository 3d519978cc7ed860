"""A quick test of whether tensors are like others: of the same dtypes, shapes, strides and devices.

PyTorch has such a test for the guards of torch.compile, in C++: `TensorGuards`. It takes the host a
microsecond for a dozen tensors; to read the same from Python takes six (2026-11-30). The class is
not public. So it is tried first on tensors that are known, and not used if an answer is wrong.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch._C._dynamo import guards

# True: the tensors, one argument each, are like those of which the test was made. False says
# nothing: it also compares classes, requires_grad, and what dispatch depends on
Test = Callable[..., bool]


def test_of(tensors: Sequence[torch.Tensor]) -> Test | None:
    """A test of whether other tensors are like these; None where PyTorch has none that works."""
    if not _answers_right():
        return None
    return _test_of(tensors)


def _test_of(tensors: Sequence[torch.Tensor]) -> Test:
    # sizes that are None would not be compared
    shapes = [list(tensor.shape) for tensor in tensors]
    strides = [list(tensor.stride()) for tensor in tensors]
    made = guards.TensorGuards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides)
    return made.check


@cache
def _answers_right() -> bool:
    tensor = torch.zeros(2, 4)
    others = [
        torch.zeros(3, 4),
        torch.zeros(2, 5),
        torch.zeros(4, 2).mT,
        torch.zeros(2, 8)[:, :4],
        torch.zeros(2, 4, 1),
        tensor.half(),
        tensor.to("meta"),
    ]
    try:
        for test, place in ((_test_of([tensor]), 0), (_test_of([others[0], tensor]), 1)):
            before = others[:place]
            if not test(*before, torch.ones(2, 4)) or any(test(*before, t) for t in others):
                return False
    except (AttributeError, TypeError, RuntimeError):
        return False
    return True
