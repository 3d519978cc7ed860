"""Which rows each expert owns, which token each row reads, and which rows each token has.

A row is one (token, slot) pair. Rows are sorted by expert, and within one expert by slot. Rows from
expert_offsets[E] on belong to ids outside 0..E-1 (sentinels of expert parallelism): these rows are
not computed, and no result may read them.
"""

from typing import NamedTuple

import torch

# the fewest rows of a tile that any device chooses
MIN_BLOCK_M = 16


def table_memory(top_k_index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Memory for the table of tiles of a routing, uninitialised: [lines, 2] int32.

    The number of tiles depends on the device. The size of this tensor does not: so operators can
    return it, and a graph of torch.compile has no condition on the number of rows.

    Args:
        top_k_index: [T, top_k] integer.
        num_experts: E.
    """
    lines = top_k_index.numel() // MIN_BLOCK_M + num_experts + 3
    return torch.empty(lines, 2, dtype=torch.int32, device=top_k_index.device)


class Routing(NamedTuple):
    """Index tensors of one batch, all on the device of the routing.

    Attributes:
        expert_offsets: [E + 1] int32, exclusive: expert e owns rows expert_offsets[e] up to
            expert_offsets[e + 1].
        row_token: [M] int32, the token that a row reads.
        row_slot: [M] int32, the flat (token, slot) of a row: token * top_k + slot.
        slot_row: [M] int32, the inverse of row_slot; -1 for a sentinel slot.
        top_k: experts per token.
        tiles: [max_tiles + 3, 2] int32 for kernels: (expert, first row) of each tile of `block_m`
            rows; expert is -1 past the last tile; then (-1, number of tiles) and (-1, 0), a
            counter. The twins have no use for it.
        block_m: number of rows in a tile of `tiles`; 0 if `tiles` is the whole of what
            `table_memory` has made, which has more lines. `with_tiles` cuts it to size.
    """

    expert_offsets: torch.Tensor
    row_token: torch.Tensor
    row_slot: torch.Tensor
    slot_row: torch.Tensor
    top_k: int
    tiles: torch.Tensor | None = None
    block_m: int = 0

    @property
    def num_experts(self) -> int:
        return self.expert_offsets.shape[0] - 1

    @property
    def num_rows(self) -> int:
        return self.row_slot.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.num_rows // self.top_k if self.top_k else 0
