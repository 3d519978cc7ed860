"""Products by warps of two roles, where the table has a row for them and this Triton the Gluon they are written in."""

import logging
from functools import cache

from .tile import linear_blocks

logger = logging.getLogger(__name__)


@cache
def _linear_roles():
    """`linear_roles`, or None where this Triton's Gluon, an experiment still, is not the one it is written in."""
    try:
        from .linear_roles import linear_roles
    except (ImportError, AttributeError) as error:
        logger.warning("products of large tiles take up to 15 %% longer, without warps of two roles: %s.", error)
        return None
    return linear_roles


def by_roles(x, weight, routing, bias, xa, lora_B, y, gather=False, activation=None, act=None) -> bool:
    """`linear_roles`, or nothing; whether it was done."""
    op = "linear_roles_gathered" if gather else "linear_roles"
    found = linear_blocks(op, x, weight, routing.block_m)
    kernel = found and _linear_roles()
    if not kernel:
        return False
    programs, _, blocks = found
    return kernel(programs, blocks, x, weight, routing, bias, xa, lora_B, y, gather, activation, act)
