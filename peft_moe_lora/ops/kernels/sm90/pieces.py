"""Pieces that several Gluon kernels share: functions of Gluon, shared-memory layouts, chunk_of.

Gluon renamed some functions. Here each has one name for all versions of Triton.
"""

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

# load_rows: cp.async by the calling threads. load_box: a TMA copy by tensor descriptor.
# barrier: for all threads of the block or, in a warp-specialized kernel, of the partition
# triton 3.6: other names; drop when the floor is 3.9
if hasattr(async_copy, "async_load"):
    load_rows = async_copy.async_load
else:
    load_rows = async_copy.async_copy_global_to_shared
if hasattr(tma, "async_load"):
    load_box = tma.async_load
else:
    load_box = tma.async_copy_global_to_shared
if hasattr(gl, "barrier"):
    barrier = gl.barrier
else:
    barrier = gl.thread_barrier

# the largest rank of kernels that keep sums [.., rank] in registers
MAX_RANKS = 32
# shared-memory layout of wgmma's operands with rows of 64 elements or more
WIDE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))


@constexpr_function
def narrow(RANKS):
    """The shared-memory layout of wgmma's operands with rows of RANKS elements, 16 or 32."""
    return gl.NVMMASharedLayout(swizzle_byte_width=2 * RANKS, element_bitwidth=16, rank=2)


def ranks_for(r: int) -> int:
    """RANKS, the columns of a tile that holds r ranks, at most MAX_RANKS."""
    return 16 if r <= 16 else MAX_RANKS


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def chunk_of(
    chunk, expert_offsets_ptr, E, CHUNK: gl.constexpr, E_PADDED: gl.constexpr,
    BY_EXPERTS: gl.constexpr,
):  # fmt: skip
    """`tiles.chunks.chunk_of` in Gluon: (expert e of a chunk, index among the chunks of e).

    e is E if there is no such chunk.
    """
    e = chunk
    index = 0
    if chunk >= E:
        experts = gl.arange(0, E_PADDED, BY_EXPERTS)
        start = gl.load(expert_offsets_ptr + experts, mask=experts < E, other=0)
        end = gl.load(expert_offsets_ptr + experts + 1, mask=experts < E, other=0)
        further_end = gl.associative_scan(gl.maximum(end - start - 1, 0) // CHUNK, 0, _add)
        passed = further_end <= chunk - E
        e = gl.minimum(gl.sum(passed.to(gl.int32), 0), E)
        index = chunk - E - gl.max(gl.where(passed, further_end, 0), 0) + 1
    return e, index
