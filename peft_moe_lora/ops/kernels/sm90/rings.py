"""Places in shared memory that warps of one role fill and warps of another empty, in turn, in Gluon.

A place has two barriers: one side waits for it to be filled, the other for it to be empty again. Each side counts for
itself, from 0: its count says where it stands, and in which phase of a barrier, 0 or 1 by turns, it waits there. The
number of places is a power of two, so that both are bits of the count.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

# tiles ahead of which the consumers are told
MESSAGES = gl.constexpr(2)


@gluon.jit
def place(count, SLOTS: gl.constexpr):
    """Where a side stands."""
    gl.static_assert(SLOTS & (SLOTS - 1) == 0, "a ring of a power of two")
    return count & (SLOTS - 1)


@gluon.jit
def wait_full(full, count, SLOTS: gl.constexpr):
    """Until the place is filled."""
    mbarrier.wait(full.index(place(count, SLOTS)), ((count & SLOTS) != 0).to(gl.int32))


@gluon.jit
def wait_empty(empty, count, SLOTS: gl.constexpr):
    """Until the place is empty, as it is at first."""
    mbarrier.wait(empty.index(place(count, SLOTS)), ((count & SLOTS) == 0).to(gl.int32))


@gluon.jit
def barriers(SLOTS: gl.constexpr, FILLING: gl.constexpr, EMPTYING: gl.constexpr):
    """(full, empty) [SLOTS] of a ring, each for so many arrivals."""
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=FILLING)
        mbarrier.init(empty.index(i), count=EMPTYING)
    return full, empty


@gluon.jit
def message_ring(CONSUMERS: gl.constexpr):
    """A ring of messages: [4 * MESSAGES, 1] numbers and their barriers."""
    numbers = gl.allocate_shared_memory(
        gl.int32, [4 * MESSAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    told, heard = barriers(MESSAGES, 1, CONSUMERS)
    return numbers, told, heard


@gluon.jit
def tell(ring, count, a, b, c, d, WARPS: gl.constexpr):
    """Write a message of four numbers once every consumer has read what stood there."""
    numbers, told, heard = ring
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    slot = place(count, MESSAGES)
    wait_empty(heard, count, MESSAGES)
    numbers.index(4 * slot).store(gl.full([1], a, gl.int32, layout))
    numbers.index(4 * slot + 1).store(gl.full([1], b, gl.int32, layout))
    numbers.index(4 * slot + 2).store(gl.full([1], c, gl.int32, layout))
    numbers.index(4 * slot + 3).store(gl.full([1], d, gl.int32, layout))
    mbarrier.arrive(told.index(slot))


@gluon.jit
def hear(ring, count):
    """The four numbers of a message, by a consumer of four warps."""
    numbers, told, heard = ring
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slot = place(count, MESSAGES)
    wait_full(told, count, MESSAGES)
    a = gl.max(numbers.index(4 * slot).load(layout), 0)
    b = gl.max(numbers.index(4 * slot + 1).load(layout), 0)
    c = gl.max(numbers.index(4 * slot + 2).load(layout), 0)
    d = gl.max(numbers.index(4 * slot + 3).load(layout), 0)
    mbarrier.arrive(heard.index(slot))
    return a, b, c, d
