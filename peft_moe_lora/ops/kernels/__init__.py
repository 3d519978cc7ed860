"""The operations as Triton kernels: same names and signatures as `reference`."""

from .act_backward import expert_act_backward
from .act_backward_outer import expert_act_backward_outer
from .columns import transpose_columns
from .combine import combine, combine_backward
from .dequantize import dequantize
from .launching.replay import replayed
from .linear import expert_linear, expert_linear_act
from .low_rank import add_low_rank
from .outer import expert_outer
from .routing import one_expert, route, with_tiles
from .shrink import expert_shrink
from .shrink_outer import expert_shrink_outer
from .unrouted import zero_unrouted
from .widths import fast_widths

__all__ = [
    "add_low_rank",
    "combine",
    "combine_backward",
    "dequantize",
    "expert_act_backward",
    "expert_act_backward_outer",
    "expert_linear",
    "expert_linear_act",
    "expert_outer",
    "expert_shrink",
    "expert_shrink_outer",
    "fast_widths",
    "one_expert",
    "replayed",
    "route",
    "transpose_columns",
    "with_tiles",
    "zero_unrouted",
]
