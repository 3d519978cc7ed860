"""Products by warps of two roles, where the table has a row for them and this Triton the Gluon they are written in."""

from ..tiles.tile import linear_blocks
from .in_gluon import in_gluon


def by_roles(
    x, weight, routing, bias, xa, lora_B, y, gather=False, activation=None, act=None
) -> bool:
    """`linear_roles`, or nothing; whether it was done."""
    op = "linear_roles_gathered" if gather else "linear_roles"
    found = linear_blocks(op, x, weight, routing.block_m)
    kernel = found and in_gluon("linear_roles")
    if not kernel:
        return False
    programs, _, blocks = found
    return kernel(
        programs, blocks, x, weight, routing, bias, xa, lora_B, y, gather, activation, act
    )
