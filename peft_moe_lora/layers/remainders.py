"""What subtracting a merged update does not restore, so that unmerging gives the base bit for bit.

W + delta is rounded to the dtype of W, and so is the sum minus delta. Where that is not W, W is
kept. Programs that merge before each synchronization with a server merge thousands of times.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Remainder:
    """The values of one block of a weight that subtraction does not restore, in host memory.

    Attributes:
        places: [count] int32 or int64 indices into the flat block; None for all of the block.
        values: [count], the values before the merge.
    """

    places: torch.Tensor | None
    values: torch.Tensor

    def write(self, block: torch.Tensor) -> None:
        """Write the values into a block [n, k]."""
        values = self.values.to(block.device)
        if self.places is None:
            block.copy_(values.view(block.shape))
            return
        # a block may be a view with other strides
        flat = block.flatten()
        flat[self.places.to(block.device, torch.int64)] = values
        block.copy_(flat.view(block.shape))


def add(block: torch.Tensor, delta: torch.Tensor) -> Remainder:
    """Add an update to a block of a weight, and keep what subtracting it would not restore.

    Args:
        block: [n, k], changed in place.
        delta: [n, k] in at least fp32.
    """
    before = block.clone()
    block.copy_(block + delta)
    restored = (block - delta).to(block.dtype)
    # bits are compared, so that -0 is kept
    places = (_bits(restored) != _bits(before)).flatten().nonzero()[:, 0]
    size = places.numel() * (4 + block.element_size())
    if size >= block.numel() * block.element_size():
        return Remainder(None, before.flatten().cpu())
    values = before.flatten()[places].cpu()
    if block.numel() < 2**31:
        places = places.int()
    return Remainder(places.cpu(), values)


def subtract(block: torch.Tensor, delta: torch.Tensor, remainder: Remainder) -> None:
    """Subtract the update again: the block is what it was before `add`.

    If the block was cast meanwhile, the result is what it was, cast. A cast to a narrower dtype has
    rounded the sum, so its result is as near as that dtype allows.
    """
    restored = (block - delta).to(remainder.values.dtype)
    remainder.write(restored)
    block.copy_(restored)


def _bits(values: torch.Tensor) -> torch.Tensor:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.contiguous().view(integers[values.element_size()])
