"""GPUs by memory and speed, and how many of them hold a step."""

from dataclasses import dataclass

GIB = 2**30
# what a large product and a large copy reached of the data sheet's speed (H200, 2026-11-24)
REACHED_FLOPS = 0.80
REACHED_BANDWIDTH = 0.89
# of a GPU's memory, for the CUDA context, the kernels and the gaps between allocations
CONTEXT = GIB
GAPS = 0.05
# processes of one node
COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class GPU:
    """A GPU, by its data sheet.

    Attributes:
        name: as it is sold.
        gib: GiB of memory, as its driver reports them.
        tflops: dense bf16 with fp32 accumulation.
        tb_s: TB/s of its memory.
    """

    name: str
    gib: float
    tflops: float
    tb_s: float

    @property
    def flops(self) -> float:
        """FLOP/s that a large product reaches."""
        return self.tflops * 1e12 * REACHED_FLOPS

    @property
    def bandwidth(self) -> float:
        """Bytes/s that a large copy reaches, read and written."""
        return self.tb_s * 1e12 * REACHED_BANDWIDTH

    @property
    def usable(self) -> float:
        """Bytes that tensors may take."""
        return (self.gib * GIB - CONTEXT) * (1 - GAPS)


# data sheets, read 2026-11-29; the times of every GPU but the H200 follow from them alone
GPUS = (
    GPU("RTX 4090", 24.0, 165, 1.01),
    GPU("RTX 5090", 31.8, 210, 1.79),
    GPU("L40S", 45.0, 362, 0.86),
    GPU("A100 80GB", 80.0, 312, 2.04),
    GPU("H100 80GB", 79.6, 989, 3.35),
    GPU("RTX PRO 6000", 95.6, 504, 1.79),
    GPU("H200", 140.4, 989, 4.80),
    GPU("B200", 179.0, 2250, 8.00),
)
CALIBRATED = "H200"


def gpu_of(name: str) -> GPU:
    """The GPU of a name in `GPUS`."""
    (found,) = (gpu for gpu in GPUS if gpu.name == name)
    return found


def how_many(
    gpu: GPU, divided: int, whole: int, layer: int, available: int | None = None
) -> int | None:
    """The least number of GPUs of one node that hold a step under FSDP2; None if none does.

    Args:
        available: the one number that is asked for; None for all of `COUNTS`.
        divided: bytes that FSDP2 divides: weights, A and B, gradients, optimizer.
        whole: bytes that every GPU has for its own batch.
        layer: bytes of the largest layer; two are gathered at a time.
    """
    counts: tuple[int, ...] = COUNTS
    if available is not None:
        counts = (available,)
    for count in counts:
        gathered = 0
        if count > 1:
            gathered = 2 * layer
        if divided / count + gathered + whole <= gpu.usable:
            return count
    return None
