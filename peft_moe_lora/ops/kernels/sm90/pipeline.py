"""Circular pipelines between the warps that load and the warps that compute, in Gluon.

A pipeline has a fixed number of stages in shared memory. Producers fill them in turn, consumers
empty them in turn. Each stage has two mbarriers: consumers wait until it is full, producers until
it is empty again. Both sides count their own uses of stages from 0. The number of stages is a power
of two, so the low bits of a count are the stage, and the next bit is the phase of its mbarrier.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

# stages of a pipeline of messages: the producer may be this many messages ahead of the consumers
MESSAGES = gl.constexpr(2)


@gluon.jit
def stage_of(count, STAGES: gl.constexpr):
    """The stage of use number `count`."""
    gl.static_assert(STAGES & (STAGES - 1) == 0, "the number of stages is a power of two")
    return count & (STAGES - 1)


@gluon.jit
def wait_full(full, count, STAGES: gl.constexpr):
    """Wait until the stage of use number `count` has been filled for this use."""
    mbarrier.wait(full.index(stage_of(count, STAGES)), ((count & STAGES) != 0).to(gl.int32))


@gluon.jit
def wait_empty(empty, count, STAGES: gl.constexpr):
    """Wait until the stage of use number `count` is empty, as it is before its first use."""
    mbarrier.wait(empty.index(stage_of(count, STAGES)), ((count & STAGES) == 0).to(gl.int32))


@gluon.jit
def make_barriers(STAGES: gl.constexpr, FILLING: gl.constexpr, EMPTYING: gl.constexpr):
    """mbarriers (full, empty), [STAGES, 1] each.

    A phase of full is complete after FILLING arrivals, a phase of empty after EMPTYING arrivals.
    """
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=FILLING)
        mbarrier.init(empty.index(i), count=EMPTYING)
    return full, empty


@gluon.jit
def make_messages(CONSUMERS: gl.constexpr):
    """A pipeline of messages of four int32: (numbers [4 * MESSAGES, 1], full, empty)."""
    numbers = gl.allocate_shared_memory(
        gl.int32, [4 * MESSAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    full, empty = make_barriers(MESSAGES, 1, CONSUMERS)
    return numbers, full, empty


@gluon.jit
def send(messages, count, a, b, c, d, WARPS: gl.constexpr):
    """Write message number `count`, after all consumers have read the previous one in its stage."""
    numbers, full, empty = messages
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    stage = stage_of(count, MESSAGES)
    wait_empty(empty, count, MESSAGES)
    numbers.index(4 * stage).store(gl.full([1], a, gl.int32, layout))
    numbers.index(4 * stage + 1).store(gl.full([1], b, gl.int32, layout))
    numbers.index(4 * stage + 2).store(gl.full([1], c, gl.int32, layout))
    numbers.index(4 * stage + 3).store(gl.full([1], d, gl.int32, layout))
    mbarrier.arrive(full.index(stage))


@gluon.jit
def receive(messages, count):
    """The four numbers of message number `count`, for a consumer of four warps."""
    numbers, full, empty = messages
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    stage = stage_of(count, MESSAGES)
    wait_full(full, count, MESSAGES)
    # one element; the reduction turns it into a scalar
    a = gl.max(numbers.index(4 * stage).load(layout), 0)
    b = gl.max(numbers.index(4 * stage + 1).load(layout), 0)
    c = gl.max(numbers.index(4 * stage + 2).load(layout), 0)
    d = gl.max(numbers.index(4 * stage + 3).load(layout), 0)
    mbarrier.arrive(empty.index(stage))
    return a, b, c, d
