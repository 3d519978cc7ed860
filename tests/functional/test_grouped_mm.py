"""PyTorch's product by expert is asked for what it supports: bf16 on a GPU, aligned to 16 bytes."""

import pytest
import torch
import torch.nn.functional as F

from peft_moe_lora.ops.grouped import _grouped_mm_runs, _is_aligned

E, M, N, K = 3, 5, 16, 24


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def rows(stride=K, offset=0, dtype=torch.bfloat16):
    """[M, K] of a row stride, `offset` elements into its memory."""
    memory = torch.zeros(offset + M * stride, dtype=dtype)
    return memory[offset:].view(M, stride)[:, :K].as_subclass(OnGpu)


def weight(*shape, dtype=torch.bfloat16):
    return torch.zeros(*shape, dtype=dtype)


CASES = {
    "rows and weight in order": (rows(), weight(E, K, N), True),
    "a weight behind a transpose": (rows(), weight(E, N, K).mT, True),
    "rows of a wider tensor": (rows(stride=K + 8), weight(E, K, N), True),
    "a row stride of no whole 16 bytes": (rows(stride=K + 4), weight(E, K, N), False),
    "an address of no whole 16 bytes": (rows(offset=4), weight(E, K, N), False),
    "a weight whose stride is no whole 16 bytes": (
        rows(),
        weight(E, K, N + 4)[:, :, :N],
        False,
    ),
    "a weight in order in neither direction": (
        rows(),
        weight(E, K, 8 * N)[:, :, ::8],
        False,
    ),
    "a weight in order from expert to expert": (
        rows(),
        weight(K, N, 8).permute(2, 0, 1)[:E],
        False,
    ),
    "results whose rows are no whole 16 bytes": (rows(), weight(E, 12, K).mT, False),
    "K of no whole 16 bytes": (rows()[:, :12], weight(E, 12, N), False),
    "fp32": (rows(dtype=torch.float32), weight(E, K, N, dtype=torch.float32), False),
    "fp16": (rows(dtype=torch.float16), weight(E, K, N, dtype=torch.float16), False),
    "a CPU": (rows().as_subclass(torch.Tensor), weight(E, K, N), False),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_asked_for_what_it_supports(case, monkeypatch):
    monkeypatch.setattr(F, "grouped_mm", None, raising=False)
    x, stack, supported = CASES[case]
    assert _grouped_mm_runs(x, stack) == supported
    monkeypatch.delattr(F, "grouped_mm")
    assert not _grouped_mm_runs(x, stack)


def test_a_stride_of_one_needs_no_alignment():
    assert _is_aligned(torch.zeros(8, 1, dtype=torch.bfloat16))
    assert not _is_aligned(torch.zeros(8, 2, dtype=torch.bfloat16))
    assert _is_aligned(torch.zeros(8, 4))
