"""row[slot] = expert_offsets[e] + number of earlier slots of expert e: a stable counting sort.

Three launches: count the slots of each expert in each block of slots; sum these counts over the
blocks; write the row of every slot. The last launch also writes the offsets and the tile table.
Few slots take one launch: each of its programs reads all slots, and waits for no other program.

Legend: S = T * top_k slots, in blocks of BLOCK. A sentinel (an id outside 0..E-1) counts as id E.
    counts_ptr [blocks, E + 1]: first the number of slots of each expert in a block. The scan turns
        it into the number in all earlier blocks. The last launch turns that into the row of each
        expert's first slot in the block.
    totals_ptr [E + 1]: number of slots of each expert
    tiles_ptr [max_tiles + 3, 2]: the tile table, (expert, first row) of each row tile. A tile ends
        at the first row of the next line; so lines after the last tile are (-1, number of routed
        rows). The last two lines are (-1, number of tiles) and (-1, 0). This 0 is a counter, for
        kernels whose programs take output tiles from a queue. They reset it to 0 when they end.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..routing import Routing, table_memory
from .launching.launch import facts, launch
from .launching.table import block_m_for, ceil_div, device_facts, power_of_2
from .operands import Operand

BLOCK = 128
TILES_BLOCK = 32
# up to so many slots are sorted in one launch. Its work grows with their square: 32 slots of a
# program are compared with all others
FEW_SLOTS = 2048
FEW_BLOCK = 32
# rows of a program of `one_expert`
ORDER_BLOCK = 1024


class _Tables(NamedTuple):
    """Pointers of what a sort writes, the tensors of `Routing`."""

    expert_offsets: Any
    row_token: Any
    row_slot: Any
    slot_row: Any
    tiles: Any

    @classmethod
    def of(cls, routing: Routing) -> "_Tables":
        """The tensors of a routing with tiles."""
        rows = routing.row_token, routing.row_slot, routing.slot_row
        return cls(routing.expert_offsets, *rows, routing.tiles)


class _Place(NamedTuple):
    """Constants of `_place_kernel` and of `_route_few_kernel`.

    Attributes:
        BLOCK: slots of a program.
        OTHERS: slots that they are compared with at a time. `_route_few_kernel` compares them with
            all slots at once, padded to a power of two.
        E_PADDED: E, padded to a power of two.
        BLOCK_M: rows of a tile. TILES_BLOCK: lines of the tile table of a program.
    """

    BLOCK: Any
    OTHERS: Any
    E_PADDED: Any
    BLOCK_M: Any
    TILES_BLOCK: Any


@triton.jit
def _load_ids(top_k_index, slots, S, E, top_k):
    """The expert of each slot: E for a sentinel; past the last slot E + 1, which is no id."""
    offsets = (slots // top_k).to(tl.int64) * top_k_index.stride_m
    offsets += (slots % top_k) * top_k_index.stride_k
    ids = tl.load(top_k_index.ptr + offsets, mask=slots < S, other=-1)
    ids = tl.where((ids < 0) | (ids >= E), E, ids).to(tl.int32)
    return tl.where(slots < S, ids, E + 1)


@triton.jit(do_not_specialize=["S"])
def _count_kernel(top_k_index, counts_ptr, S, E, top_k, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Grid [blocks]: counts of one block, BLOCK_E experts at a time."""
    pid = tl.program_id(0)
    slots = pid * BLOCK + tl.arange(0, BLOCK)
    ids = _load_ids(top_k_index, slots, S, E, top_k)
    for e0 in range(0, E + 1, BLOCK_E):
        experts = e0 + tl.arange(0, BLOCK_E)
        counts = tl.sum((ids[:, None] == experts[None, :]).to(tl.int32), axis=0)
        tl.store(counts_ptr + pid * (E + 1) + experts, counts, mask=experts <= E)


@triton.jit(do_not_specialize=["blocks"])
def _scan_kernel(counts_ptr, totals_ptr, blocks, E, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr):
    """Grid [experts / BLOCK_E]: counts become exclusive prefix sums over the blocks, in place."""
    experts = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    before = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for b0 in range(0, blocks, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        ptrs = counts_ptr + b[:, None] * (E + 1) + experts[None, :]
        mask = (b[:, None] < blocks) & (experts[None, :] <= E)
        counts = tl.load(ptrs, mask=mask, other=0)
        tl.store(ptrs, tl.cumsum(counts, axis=0) - counts + before[None, :], mask=mask)
        before += tl.sum(counts, axis=0)
    tl.store(totals_ptr + experts, before, mask=experts <= E)


@triton.jit
def _write_tiles(
    totals, base, tiles_ptr, first_tile, lines, BLOCK_M: tl.constexpr, TILES_BLOCK: tl.constexpr
):
    """Write lines first_tile up to first_tile + TILES_BLOCK of a tile table.

    totals [experts]: rows of each expert. base: first row of the first expert. lines: number of
        lines of the table.
    """
    tiles_end = tl.cumsum((totals + BLOCK_M - 1) // BLOCK_M, axis=0)
    rows_end = tl.cumsum(totals, axis=0)
    num_tiles = tl.max(tiles_end, axis=0)
    t = first_tile + tl.arange(0, TILES_BLOCK)
    # passed: experts whose tiles all come before tile t. The expert of t is the next one: its index
    # is the number of passed experts, and its rows and tiles begin where theirs end
    passed = tiles_end[None, :] <= t[:, None]
    expert = tl.sum(passed.to(tl.int32), axis=1)
    first_row = tl.max(tl.where(passed, rows_end[None, :], 0), axis=1)
    expert_tile = tl.max(tl.where(passed, tiles_end[None, :], 0), axis=1)
    expert = tl.where(t < num_tiles, expert, -1)
    first_row += base + tl.where(t < num_tiles, t - expert_tile, 0) * BLOCK_M
    first_row = tl.where(t == lines - 2, num_tiles, tl.where(t == lines - 1, 0, first_row))
    tl.store(tiles_ptr + 2 * t, expert, mask=t < lines)
    tl.store(tiles_ptr + 2 * t + 1, first_row, mask=t < lines)


@triton.jit
def _write_rows(row, ids, slots, tables, S, E, top_k):
    """Write the row of each slot, and the slot and the token of each row; -1 for a sentinel."""
    mask = slots < S
    tl.store(tables.row_slot + row, slots, mask=mask)
    tl.store(tables.row_token + row, slots // top_k, mask=mask)
    tl.store(tables.slot_row + slots, tl.where(ids < E, row, -1), mask=mask)


@triton.jit
def _write_offsets_or_tiles(totals, tables, part, lines, E, PLACE):
    """Write the offsets if part is 0, else block part - 1 of the lines of the tile table.

    totals: rows of each expert; zeros from expert E on.
    """
    if part == 0:
        experts = tl.arange(0, PLACE.E_PADDED)
        tl.store(tables.expert_offsets, 0)
        tl.store(tables.expert_offsets + 1 + experts, tl.cumsum(totals, axis=0), mask=experts < E)
    else:
        first = (part - 1) * PLACE.TILES_BLOCK
        _write_tiles(totals, 0, tables.tiles, first, lines, PLACE.BLOCK_M, PLACE.TILES_BLOCK)


@triton.jit(do_not_specialize=["S", "blocks", "lines"])
def _place_kernel(top_k_index, counts_ptr, totals_ptr, tables, S, blocks, lines, E, top_k, PLACE):
    """Grid [blocks + 1 + tile blocks]: one program for each block of slots, one for the offsets,
    one for each block of table lines.
    """
    pid = tl.program_id(0)
    if pid < blocks:
        slots = pid * PLACE.BLOCK + tl.arange(0, PLACE.BLOCK)
        ids = _load_ids(top_k_index, slots, S, E, top_k)
        mask = slots < S
        # every slot needs the block's first row of its own expert. These rows are written to memory
        # and read back
        experts = tl.arange(0, PLACE.E_PADDED)
        totals = tl.load(totals_ptr + experts, mask=experts < E, other=0)
        starts_ptr = counts_ptr + pid * (E + 1)
        earlier_blocks = tl.load(starts_ptr + experts, mask=experts < E, other=0)
        starts = earlier_blocks + tl.cumsum(totals, axis=0) - totals
        tl.store(starts_ptr + experts, starts, mask=experts < E)
        tl.debug_barrier()
        row = tl.load(starts_ptr + ids, mask=mask, other=0)
        # sentinels come after the rows of all experts
        row += tl.where(ids < E, 0, tl.sum(totals, axis=0))
        for j in range(0, PLACE.BLOCK, PLACE.OTHERS):
            others = pid * PLACE.BLOCK + j + tl.arange(0, PLACE.OTHERS)
            other_ids = _load_ids(top_k_index, others, S, E, top_k)
            earlier = (other_ids[None, :] == ids[:, None]) & (others[None, :] < slots[:, None])
            row += tl.sum(earlier.to(tl.int32), axis=1)
        _write_rows(row, ids, slots, tables, S, E, top_k)
    else:
        experts = tl.arange(0, PLACE.E_PADDED)
        totals = tl.load(totals_ptr + experts, mask=experts < E, other=0)
        _write_offsets_or_tiles(totals, tables, pid - blocks, lines, E, PLACE)


@triton.jit(do_not_specialize=["S", "lines"])
def _route_few_kernel(top_k_index, tables, S, lines, E, top_k, PLACE):
    """Grid [blocks + 1 + tile blocks], as that of `_place_kernel`; each program reads all slots."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(S, PLACE.BLOCK)
    all_slots = tl.arange(0, PLACE.OTHERS)
    all_ids = _load_ids(top_k_index, all_slots, S, E, top_k)
    if pid < blocks:
        slots = pid * PLACE.BLOCK + tl.arange(0, PLACE.BLOCK)
        ids = _load_ids(top_k_index, slots, S, E, top_k)
        # a row is the number of slots that sort before it: by expert, and by slot within an expert
        keys = ids * PLACE.OTHERS + slots
        all_keys = all_ids * PLACE.OTHERS + all_slots
        row = tl.sum((all_keys[None, :] < keys[:, None]).to(tl.int32), axis=1)
        _write_rows(row, ids, slots, tables, S, E, top_k)
    else:
        totals = tl.histogram(all_ids, PLACE.E_PADDED, mask=all_ids < E)
        _write_offsets_or_tiles(totals, tables, pid - blocks, lines, E, PLACE)


@triton.jit(do_not_specialize=["lines"])
def _tiles_kernel(
    expert_offsets_ptr, tiles_ptr, lines, E,
    E_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, TILES_BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid [tile blocks]: the tile table of a routing that has only offsets."""
    experts = tl.arange(0, E_PADDED)
    start = tl.load(expert_offsets_ptr + experts, mask=experts < E, other=0)
    end = tl.load(expert_offsets_ptr + experts + 1, mask=experts < E, other=0)
    _write_tiles(
        end - start, 0, tiles_ptr, tl.program_id(0) * TILES_BLOCK, lines, BLOCK_M, TILES_BLOCK
    )


@triton.jit(do_not_specialize=["lines"])
def _part_tables_kernel(
    expert_offsets_ptr, tiles_ptr, lines, E,
    COUNT: tl.constexpr, COUNT_PADDED: tl.constexpr, BLOCK_M: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid [tile blocks, parts]: a tile table for each part of COUNT experts. In a table,
    experts count from 0.
    """
    first = tl.program_id(1) * COUNT
    j = tl.arange(0, COUNT_PADDED)
    mask = (j < COUNT) & (first + j < E)
    start = tl.load(expert_offsets_ptr + first + j, mask=mask, other=0)
    end = tl.load(expert_offsets_ptr + first + j + 1, mask=mask, other=0)
    base = tl.load(expert_offsets_ptr + first)
    table_ptr = tiles_ptr + tl.program_id(1).to(tl.int64) * 2 * lines
    _write_tiles(
        end - start, base, table_ptr, tl.program_id(0) * TILES_BLOCK, lines, BLOCK_M, TILES_BLOCK
    )


def _lines(M: int, E: int, block_m: int) -> int:
    """Lines of a tile table: max_tiles + 3.

    max_tiles is an upper bound of the tiles of any routing of M rows, so that shapes do not depend
    on the data.
    """
    return M // block_m + min(E, M) + 3


def _cut(table: torch.Tensor, lines: int) -> torch.Tensor:
    """The first lines of memory for a tile table."""
    assert table.shape[0] >= lines, f"a tile table of {table.shape[0]} lines, {lines} are needed"
    return table[:lines]


def route(
    top_k_index: torch.Tensor, num_experts: int, table: torch.Tensor | None = None
) -> Routing:
    """Sort the slots by expert, in a stable order, and make the tile table of the kernels.

    Args:
        top_k_index: [T, top_k] integer expert ids; an id outside 0..E-1 is a sentinel.
        num_experts: E.
        table: memory for the tile table, of `table_memory`; allocated here if None.
    Twin: `reference.route`.
    """
    T, top_k = top_k_index.shape
    E = num_experts
    S = T * top_k
    arch, _ = device_facts(top_k_index.device)
    block_m = block_m_for(S, E, arch)
    lines = _lines(S, E, block_m)
    expert_offsets, row_token, row_slot, slot_row = _indices(top_k_index, E + 1, S, S, S)
    if table is None:
        table = table_memory(top_k_index, E)
    tiles = _cut(table, lines)
    routing = Routing(expert_offsets, row_token, row_slot, slot_row, top_k, tiles, block_m)
    if S == 0:
        expert_offsets.zero_()
        tiles[:, 0] = -1
        tiles[:, 1] = 0
    elif S <= FEW_SLOTS:
        _route_few(top_k_index, routing)
    else:
        _route_many(top_k_index, routing)
    return routing


def _indices(like: torch.Tensor, *lengths: int) -> list[torch.Tensor]:
    """Uninitialised int32 vectors of these lengths, on the device of a tensor."""
    return [torch.empty(n, dtype=torch.int32, device=like.device) for n in lengths]


def _route_few(top_k_index: torch.Tensor, routing: Routing) -> None:
    """Fill the tensors of a routing in one launch."""
    E = routing.num_experts
    S = routing.num_rows
    top_k = routing.top_k
    lines = routing.tiles.shape[0]
    # at least a block of the other kernels, so that fewer kernels are compiled
    padded = max(power_of_2(S), BLOCK)
    tables = _Tables.of(routing)

    def arguments() -> tuple[tuple, tuple, dict]:
        place = _Place(FEW_BLOCK, padded, power_of_2(E), routing.block_m, TILES_BLOCK)
        operands = Operand.of(top_k_index), tables
        return operands, (E, top_k), {"PLACE": place, "num_warps": 8}

    key = "route_few", facts(top_k_index), routing.block_m, E, top_k, padded
    tensors = top_k_index, *tables
    grid = ceil_div(S, FEW_BLOCK) + 1 + ceil_div(lines, TILES_BLOCK), 1, 1
    launch(key, _route_few_kernel, grid, tensors, arguments, (S, lines))


def _route_many(top_k_index: torch.Tensor, routing: Routing) -> None:
    """Fill the tensors of a routing in three launches."""
    E = routing.num_experts
    S = routing.num_rows
    top_k = routing.top_k
    lines = routing.tiles.shape[0]
    blocks = ceil_div(S, BLOCK)
    counts, totals = _indices(top_k_index, blocks * (E + 1), E + 1)
    ids = Operand.of(top_k_index)
    key = facts(top_k_index), routing.block_m, E, top_k
    launch(
        ("count", *key), _count_kernel, (blocks, 1, 1), (top_k_index, counts),
        lambda: ((ids, counts), (E, top_k), {"BLOCK": BLOCK, "BLOCK_E": 32}), (S,),
    )  # fmt: skip
    scan = {"BLOCK_B": 256, "BLOCK_E": 16, "num_warps": 8}
    launch(
        ("scan", E), _scan_kernel, (ceil_div(E + 1, 16), 1, 1), (counts, totals),
        lambda: ((counts, totals), (E,), scan), (blocks,),
    )  # fmt: skip
    tables = _Tables.of(routing)
    tensors = top_k_index, counts, totals, *tables
    grid = blocks + 1 + ceil_div(lines, TILES_BLOCK), 1, 1

    def arguments() -> tuple[tuple, tuple, dict]:
        place = _Place(BLOCK, 32, power_of_2(E), routing.block_m, TILES_BLOCK)
        return (ids, counts, totals, tables), (E, top_k), {"PLACE": place}

    launch(("place", *key), _place_kernel, grid, tensors, arguments, (S, blocks, lines))


@triton.jit(do_not_specialize=["M"])
def _one_expert_kernel(expert_offsets_ptr, order_ptr, M, BLOCK: tl.constexpr):
    """Grid [blocks]: order[m] = m, and the offsets of one expert with M rows."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(order_ptr + rows, rows, mask=rows < M)
    if tl.program_id(0) == 0:
        ends = tl.arange(0, 2)
        tl.store(expert_offsets_ptr + ends, ends * M)


def one_expert(rows: torch.Tensor) -> Routing:
    """The routing of rows that are all of one expert, in their order; without a tile table.

    Args:
        rows: [M, K] float.
    Twin: `reference.one_expert`.
    """
    M = rows.shape[0]
    expert_offsets, order = _indices(rows, 2, M)
    tensors = expert_offsets, order
    # a program writes the offsets in any case
    grid = max(1, ceil_div(M, ORDER_BLOCK)), 1, 1
    constants = {"BLOCK": ORDER_BLOCK}
    key = ("one_expert",)
    launch(key, _one_expert_kernel, grid, tensors, lambda: (tensors, (), constants), (M,))
    return Routing(expert_offsets, order, order, order, 1)


def with_tiles(routing: Routing) -> Routing:
    """The routing with a tile table, made here if it has none; the same object if it has one."""
    if routing.block_m:
        return routing
    M = routing.num_rows
    E = routing.num_experts
    offsets = routing.expert_offsets
    arch, _ = device_facts(offsets.device)
    block_m = block_m_for(M, E, arch)
    lines = _lines(M, E, block_m)
    if routing.tiles is not None:
        return routing._replace(tiles=_cut(routing.tiles, lines), block_m=block_m)
    tiles = torch.empty(lines, 2, dtype=torch.int32, device=offsets.device)
    constants = {"E_PADDED": power_of_2(E), "BLOCK_M": block_m, "TILES_BLOCK": TILES_BLOCK}
    grid = ceil_div(lines, TILES_BLOCK), 1, 1
    key = "tiles", E, block_m
    tensors = offsets, tiles
    launch(key, _tiles_kernel, grid, tensors, lambda: (tensors, (E,), constants), (lines,))
    return routing._replace(tiles=tiles, block_m=block_m)


def part_tables(routing: Routing, count: int) -> list[Routing]:
    """Routings of `count` experts each.

    In the tile table of a part its experts count from 0; row numbers are those of the whole
    routing.

    Args:
        routing: with tiles.
        count: experts of a part; the last part may have fewer.
    """
    M = routing.num_rows
    E = routing.num_experts
    offsets = routing.expert_offsets
    block_m = routing.block_m
    # an even number, so that every table begins at a multiple of 16 bytes
    lines = ceil_div(_lines(M, count, block_m), 2) * 2
    number = ceil_div(E, count)
    tables = torch.empty(number, lines, 2, dtype=torch.int32, device=offsets.device)
    constants = {
        "COUNT": count,
        "COUNT_PADDED": power_of_2(count),
        "BLOCK_M": block_m,
        "TILES_BLOCK": TILES_BLOCK,
    }
    grid = ceil_div(lines, TILES_BLOCK), number, 1
    key = "part_tables", E, count, block_m
    tensors = offsets, tables
    launch(key, _part_tables_kernel, grid, tensors, lambda: (tensors, (E,), constants), (lines,))
    return [
        routing._replace(expert_offsets=offsets[first : first + count + 1], tiles=tables[i])
        for i, first in enumerate(range(0, E, count))
    ]
