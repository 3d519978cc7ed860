"""The instructions that drop elements of 16 bits, run without a GPU.

The interpreter has other code in their place. `_run` knows the few instructions that they have, on
registers of 32 bits.
"""

import random

import pytest
import torch

from peft_moe_lora.ops.dropout import Dropout, _mix, dropout_mask, threshold
from peft_moe_lora.ops.kernels.tiles import dropout as kernel

ALL = 0xFFFFFFFF
SEED, ROWS, COLUMNS = 2**31 + 77, 40, 64


def _permuted(low, high, selector):
    """prmt: each nibble of the selector chooses one of the 8 bytes of low and high.

    With bit 3 of the nibble, it is the byte's sign bit, eight times.
    """
    pool = (low | high << 32).to_bytes(8, "little")
    found = 0
    for place in range(4):
        nibble = selector >> 4 * place & 15
        byte = pool[nibble & 7]
        if nibble & 8:
            byte = 0xFF * (byte >> 7)
        found |= byte << 8 * place
    return found


OPERATIONS = {
    "mul.lo.u32": lambda a, b: a * b,
    "add.u32": lambda a, b: a + b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "xor.b32": lambda a, b: a ^ b,
    "and.b32": lambda a, b: a & b,
    "prmt.b32": _permuted,
}


def _run(code, *inputs):
    """What the code writes to $0, with its inputs in $1, $2, ..."""
    registers = {f"${i}": value for i, value in enumerate(inputs, 1)}
    for line in code.strip("{}").split(";"):
        name, _, rest = line.strip().partition(" ")
        if not name or name.startswith("."):
            continue
        target, *operands = [word.strip() for word in rest.split(",")]
        values = [registers[word] if word in registers else int(word, 0) for word in operands]
        registers[target] = OPERATIONS[name](*values) & ALL
    return registers["$0"]


@pytest.mark.parametrize("p", [1e-9, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("neighbours", [True, False])
def test_elements_are_kept_where_the_mask_of_the_twin_is_not_0(p, neighbours):
    seed = torch.tensor([SEED])
    slots = torch.arange(ROWS, dtype=torch.int32) * 7919
    mask = dropout_mask(Dropout(p, seed), slots, COLUMNS) > 0
    hashes = _mix(slots.long() ^ SEED)
    inputs = hashes ^ hashes >> 16
    code = kernel._keeping(threshold(p))
    chosen = random.Random(0)
    for _ in range(400):
        row, column = chosen.randrange(ROWS), 2 * chosen.randrange(COLUMNS // 2)
        pair = [(row, column), (row, column + 1)]
        if not neighbours:
            pair = [(chosen.randrange(ROWS), chosen.randrange(COLUMNS)) for _ in pair]
        h = [inputs[row].item() ^ column >> 1 for row, column in pair]
        half = [0xBB if column % 2 else 0x99 for _, column in pair]
        x = chosen.randrange(1 << 32) | 0x10001
        kept = [0xFFFF * bool(mask[place]) for place in pair]
        assert _run(code, x, *h, *half) == x & (kept[0] | kept[1] << 16)
