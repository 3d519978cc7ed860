"""The interface of the operations, for the Triton kernels and for their twins in plain PyTorch.

Legend:
    T tokens; M = T * top_k rows in expert order; E experts; K and N in- and out-features; r rank
    R columns of rows of rank r: those past r are zeros (`ranks`)
    x: [M, K] rows; or [T, K] tokens with `gather`, and then row m reads token row_token[m]
    weight: [E, N, K], any strides, or quantized
    lora_A [E, r, K], lora_B [E, N, r]: views of the expert-major parameters, any strides; they are
        cast to the dtype of x
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from .activation import Activation
from .dropout import Dropout
from .quantized import QuantizedWeight
from .routing import Routing


class BatchShape(tuple[int, ...]):
    """The shape of a result, as an argument of `replayed`: no kernel depends on it."""

    __slots__ = ()


class RankRows(NamedTuple):
    """Tensors of the low-rank products that are computed with an activation's gradient.

    The products are dA = down_yb^T act, with weighted rows, yb = scaling * B^T dpre, and
    dB = dpre^T xa.

    Attributes:
        down_yb: [M, R] rows; None without an adapter on down.
        dA: [E, r, I] fp32, any strides, is overwritten with the gradient of down's A; None if it is
            not needed.
        xa: [M, R] rows.
        lora_B: [E, N, r], B of up; None if yb is not needed.
        scaling: factor of yb.
        dB: [E, N, r] fp32, any strides, is overwritten with the gradient of up's B; None if it is
            not needed.
    """

    down_yb: torch.Tensor | None
    dA: torch.Tensor | None
    xa: torch.Tensor | None
    lora_B: torch.Tensor | None
    scaling: float
    dB: torch.Tensor | None


class Operations(Protocol):
    """The functions of the module `reference` and of the package `kernels`."""

    def replayed(self, function: Callable[..., tuple], *arguments: Any) -> tuple:
        """Run function(*arguments), which composes operations.

        Args:
            function: the kernels that it launches may be recorded, and replayed in later calls.
            arguments: a tensor first, then tensors, quantized weights, None, or hashable values.
        """

    def route(
        self, top_k_index: torch.Tensor, num_experts: int, table: torch.Tensor | None = None
    ) -> Routing:
        """A stable counting sort of the slots by expert.

        Args:
            top_k_index: [T, top_k] integer expert ids; an id outside 0..E-1 is a sentinel.
            table: memory that `table_memory` has made for the table of tiles, if these operations
                need one; allocated if None.
        """

    def one_expert(self, rows: torch.Tensor) -> Routing:
        """The routing of rows [M, K] that are all of one expert, in their order."""

    def with_tiles(self, routing: Routing) -> Routing:
        """The routing, with a table of tiles if these operations need one."""

    def dequantize(
        self, weight: QuantizedWeight, expert_offsets: torch.Tensor, first: int, out: torch.Tensor
    ) -> torch.Tensor:
        """out[j] = W[first + j], in its stored order, for the experts that have rows.

        Args:
            expert_offsets: [E + 1] int32.
            out: [count, R, C]; returned.
        """

    def expert_shrink(
        self,
        x: torch.Tensor,
        lora_A: torch.Tensor,
        routing: Routing,
        scaling: float,
        *,
        gather: bool = False,
        dropout: Dropout | None = None,
    ) -> torch.Tensor:
        """xa[m] = scaling * A[e] drop(x[m]).  Returns: [M, R], dtype of x."""

    def expert_linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | QuantizedWeight,
        routing: Routing,
        *,
        bias: torch.Tensor | None = None,
        xa: torch.Tensor | None = None,
        lora_B: torch.Tensor | None = None,
        gather: bool = False,
        dropout: Dropout | None = None,
    ) -> torch.Tensor:
        """y[m] = W[e] x[m] + bias[e] + drop(B[e] xa[m]).

        Args:
            bias: [E, N].
            xa: [M, R], dtype of x; needs lora_B [E, N, r].
            dropout: the mask of the low-rank term, for the input gradient of a layer with dropout.
        Returns: [M, N], dtype of x.
        """

    def expert_linear_act(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | QuantizedWeight,
        routing: Routing,
        activation: Activation,
        *,
        bias: torch.Tensor | None = None,
        xa: torch.Tensor | None = None,
        lora_B: torch.Tensor | None = None,
        gather: bool = False,
        keep_pre: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """pre = `expert_linear`, act = activation(pre).

        Args:
            keep_pre: whether pre is wanted.
        Returns: pre [M, N], None without keep_pre; act [M, I].
        """

    def expert_act_backward(
        self,
        draw: torch.Tensor,
        pre: torch.Tensor,
        routing: Routing,
        activation: Activation,
        top_k_weights: torch.Tensor,
        *,
        dout: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of the pre-activation and of the routing weights, from the gradient of act.

        d top_k_weights = <act, draw> + <bias, dout>, so forward does not keep the output of down.

        Args:
            draw: [M, I], gradient of act before it is multiplied by the routing weight; may be
                overwritten.
            pre: [M, N], the pre-activation.
            top_k_weights: [T, top_k] float.
            dout: [T, H], gradient of the layer's output; read only if there is a bias.
            bias: [E, H], the bias of down.
        Returns: dpre [M, N], act [M, I], d_top_k_weights [T, top_k] fp32, 0 for sentinels.
        """

    def combine(
        self,
        y: torch.Tensor,
        routing: Routing,
        top_k_weights: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """out[t] = sum over the token's slots of top_k_weights[t, slot] * y[row of the slot].

        Args:
            y: [M, N] float rows in expert order.
            top_k_weights: [T, top_k] float; None for ones.
            dtype: dtype of the result; by default the dtype of y.
        Returns: [T, N], summed in fp32; a sentinel slot adds nothing.
        """

    def combine_backward(
        self, dout: torch.Tensor, y: torch.Tensor, routing: Routing, top_k_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """dy[m] = w[slot] * dout[t], d_top_k_weights[slot] = <y[m], dout[t]>.

        Returns: dy [M, N], d_top_k_weights [T, top_k] fp32, 0 for sentinels.
        """

    def add_low_rank(
        self,
        x: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        scaling: float,
        y: torch.Tensor | None,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """xa = scaling * x A^T, out = y + xa B^T: the update of a linear layer, of no expert.

        Args:
            x: [T, K] rows.
            lora_A: [r, K], any strides and float dtype; cast to the dtype of x.
            lora_B: [N, r], as lora_A.
            y: [T, N], dtype of x; None for zeros.
            out: [T, N], dtype of x, contiguous; is overwritten, and may be y.
        Returns: xa [T, R], dtype of x.
        """

    def fast_widths(self, widths: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
        """The widths with which a layer of rows of these widths is computed.

        Operations take all widths. Greater ones are asked for where zeros after the given ones
        take less time.
        """

    def transpose_columns(self, matrix: torch.Tensor, a: int, dtype: torch.dtype) -> torch.Tensor:
        """out[n, j * a + i] = matrix[n, i * b + j]: rank-major columns become expert-major ones.

        Args:
            matrix: [N, a * b] float, contiguous: B [N, r * E], where a = r makes it expert-major
                and a = E makes it rank-major.
            a: how many groups of columns a row has.
            dtype: float dtype of the result.
        Returns: [N, b * a], contiguous, a new tensor.
        """

    def zero_unrouted(self, rows: torch.Tensor, routing: Routing) -> torch.Tensor:
        """rows[m] = 0, in place, for the rows of sentinels.

        Other operations leave these rows undefined. Code that is not ours may read them: a norm's
        own gradient is a sum over all rows.

        Args:
            rows: [M, N] float rows in expert order, contiguous.
        Returns: rows.
        """

    def expert_outer(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        routing: Routing,
        out: torch.Tensor,
        *,
        row_weights: torch.Tensor | None = None,
        gather_left: bool = False,
        gather_right: bool = False,
        dropout: Dropout | None = None,
    ) -> torch.Tensor:
        """out[e, p, q] = sum over the rows m of e of w[slot] * left[m, p] * drop(right)[m, q].

        Args:
            left: [M, P], or [T, P] with gather_left.
            right: [M, Q], or [T, Q] with gather_right.
            out: [E, P, Q] fp32, any strides; zeros for an expert without rows; returned.
            row_weights: [T, top_k] float; None for ones.
        """

    def expert_shrink_outer(
        self,
        x: torch.Tensor,
        lora_A: torch.Tensor,
        right: torch.Tensor,
        routing: Routing,
        scaling: float,
        out: torch.Tensor,
        *,
        row_weights: torch.Tensor | None = None,
        gather: bool = False,
    ) -> torch.Tensor | None:
        """`composed.expert_shrink_outer` as one kernel, which reads x once.

        Returns: xa; or None if the kernel does not support the case, and then nothing is written.
        """

    def expert_act_backward_outer(
        self,
        draw: torch.Tensor,
        pre: torch.Tensor,
        routing: Routing,
        activation: Activation,
        top_k_weights: torch.Tensor,
        rows: RankRows,
        *,
        dout: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """`composed.expert_act_backward_outer` as one kernel; no field of `rows` is None.

        Returns: dpre, yb, d_top_k_weights; or None if the kernel does not support the case, and
            then nothing is written.
        """
