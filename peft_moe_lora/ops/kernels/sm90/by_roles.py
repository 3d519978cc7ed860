"""Run `linear_roles` if the table has a row for it and Triton has the Gluon functions it needs."""

from ..tiles.product import Product
from ..tiles.tile import linear_blocks
from .in_gluon import in_gluon


def by_roles(product: Product) -> bool:
    """Write the outputs of a product with a dense weight by `linear_roles`, if possible.

    Returns: whether they were written.
    """
    op = "linear_roles"
    if product.gather:
        op = "linear_roles_gathered"
    found = linear_blocks(op, product.x, product.weight, product.routing.block_m)
    if found is None:
        return False
    kernel = in_gluon("linear_roles")
    if kernel is None:
        return False
    programs, _, blocks = found
    return kernel(programs, blocks, product)
