"""Runs tiny models in llama.cpp on a CPU, with and without an adapter.

Nothing is stubbed. The cache of keys and values is fp32, so that logits can be compared to 1e-5.
llama-cpp-python 0.3.36 goes on with a null pointer where llama.cpp refuses an adapter; here the
adapter is loaded by its lower functions, and what llama.cpp says becomes an error.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import torch
from llama_cpp._logger import llama_log_callback

__all__ = ["logits"]

_F32 = 0


def logits(base: Path, ids: torch.Tensor, adapter: Path | None = None) -> torch.Tensor:
    """[length, vocabulary] logits of one sequence of ids [length].

    Raises:
        ValueError: if llama.cpp refuses the adapter, with its words.
    """
    # an adapter needs weights that are not mapped from the file
    model = llama_cpp.Llama(
        str(base),
        use_mmap=False,
        n_ctx=64,
        n_batch=64,
        n_threads=1,
        logits_all=True,
        type_k=_F32,
        type_v=_F32,
        verbose=False,
    )
    with contextlib.closing(model):
        if adapter is not None:
            _add(model, adapter)
        model.eval(ids.tolist())
        return torch.from_numpy(np.array(model.scores[: len(ids)]))


def _add(model: llama_cpp.Llama, adapter: Path) -> None:
    """Load an adapter; it is freed with the model."""
    with _said() as lines:
        loaded = llama_cpp.llama_adapter_lora_init(model.model, str(adapter).encode())
    if not loaded:
        raise ValueError("".join(lines))
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(loaded)
    scales = (ctypes.c_float * 1)(1.0)
    assert llama_cpp.llama_set_adapters_lora(model.ctx, adapters, 1, scales) == 0


@contextlib.contextmanager
def _said() -> Iterator[list[str]]:
    """What llama.cpp logs, at every level."""
    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def listen(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        lines.append(text.decode())

    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))
