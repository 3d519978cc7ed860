"""Places in shared memory that warps of one role fill and warps of another empty, in turn, in Gluon.

A place has two barriers: one side waits for it to be filled, the other for it to be empty again. Each side counts for
itself: `slot` is where it stands, `phase` what the barriers there are waited for in, 0 or 1, changed with every turn;
the side that fills begins in phase 1, since every place is empty at first.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

# tiles ahead of which the consumers are told
MESSAGES = gl.constexpr(2)


@gluon.jit
def after(slot, phase, SLOTS: gl.constexpr):
    """The next slot of a ring, and its phase."""
    last = slot == SLOTS - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def before(slot, SLOTS: gl.constexpr):
    """The previous slot of a ring."""
    return gl.where(slot == 0, SLOTS - 1, slot - 1)


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
    numbers = gl.allocate_shared_memory(gl.int32, [4 * MESSAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    told, heard = barriers(MESSAGES, 1, CONSUMERS)
    return numbers, told, heard


@gluon.jit
def tell(ring, slot, phase, a, b, c, d, WARPS: gl.constexpr):
    """Write a message of four numbers once every consumer has read what stood there; the next slot and its phase."""
    numbers, told, heard = ring
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    mbarrier.wait(heard.index(slot), phase)
    numbers.index(4 * slot).store(gl.full([1], a, gl.int32, layout))
    numbers.index(4 * slot + 1).store(gl.full([1], b, gl.int32, layout))
    numbers.index(4 * slot + 2).store(gl.full([1], c, gl.int32, layout))
    numbers.index(4 * slot + 3).store(gl.full([1], d, gl.int32, layout))
    mbarrier.arrive(told.index(slot))
    return after(slot, phase, MESSAGES)


@gluon.jit
def hear(ring, slot, phase):
    """The four numbers of a message, by a consumer of four warps."""
    numbers, told, heard = ring
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(told.index(slot), phase)
    a = gl.max(numbers.index(4 * slot).load(layout), 0)
    b = gl.max(numbers.index(4 * slot + 1).load(layout), 0)
    c = gl.max(numbers.index(4 * slot + 2).load(layout), 0)
    d = gl.max(numbers.index(4 * slot + 3).load(layout), 0)
    mbarrier.arrive(heard.index(slot))
    return a, b, c, d
