"""act = f(gate) * (up + up_shift), with clamped gate and up, or act = f(pre) without a gate."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

KINDS = ("silu", "gelu_tanh", "gelu", "relu2")


@dataclass(frozen=True)
class Activation:
    """An activation that the kernels can fuse, and its definition in plain PyTorch.

    Attributes:
        kind: f, one of KINDS; relu2 is relu(x)^2.
        gated: whether the pre-activation consists of gate and up; if not, act = f(pre).
        interleaved: whether the columns of gate and up alternate (gpt_oss); if not, all columns of
            gate come first.
        limit: first, gate is clamped to at most limit, and up is clamped to [-limit, limit]; None
            for no clamp.
        alpha: f(x) = x * sigmoid(alpha * x); used only for kind "silu".
        up_shift: added to up before the product (gpt_oss: 1).
    """

    kind: str = "silu"
    gated: bool = True
    interleaved: bool = False
    limit: float | None = None
    alpha: float = 1.0
    up_shift: float = 0.0

    @property
    def halves(self) -> int:
        """2 if all columns of gate come before all columns of up, else 1."""
        return 2 if self.gated and not self.interleaved else 1

    def width(self, N: int) -> int:
        """I, the width of act for a pre-activation of width N."""
        return N // 2 if self.gated else N

    def columns(self, I: int) -> int:  # noqa: E741
        """N, the width of the pre-activation for an act of width I."""
        return 2 * I if self.gated else I

    def __call__(self, pre: torch.Tensor) -> torch.Tensor:
        """act [M, I] from pre [M, N], computed in fp32 (fp64 for fp64); dtype of pre."""
        if not self.gated:
            return self._f(wide(pre)).to(pre.dtype)
        gate, up = self._clamped(*self._split(wide(pre)))
        return (self._f(gate) * (up + self.up_shift)).to(pre.dtype)

    def backward(self, pre: torch.Tensor, dact: torch.Tensor) -> torch.Tensor:
        """The gradient of the pre-activation, from the gradient of act.

        Args:
            pre: [M, N], the pre-activation.
            dact: [M, I], the gradient of act.
        Returns: [M, N], dtype of pre; zero where a value was clamped.
        """
        dact = dact.to(wide(pre).dtype)
        if not self.gated:
            return (dact * self._df(wide(pre))).to(pre.dtype)
        raw_gate, raw_up = self._split(wide(pre))
        gate, up = self._clamped(raw_gate, raw_up)
        dgate = dact * self._df(gate) * (up + self.up_shift)
        dup = dact * self._f(gate)
        if self.limit is not None:
            dgate = dgate.masked_fill(raw_gate > self.limit, 0.0)
            dup = dup.masked_fill(raw_up.abs() > self.limit, 0.0)
        if self.interleaved:
            dpre = torch.stack((dgate, dup), -1).flatten(-2)
        else:
            dpre = torch.cat((dgate, dup), -1)
        return dpre.to(pre.dtype)

    def _split(self, pre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.interleaved:
            return pre[..., ::2], pre[..., 1::2]
        gate, up = pre.chunk(2, dim=-1)
        return gate, up

    def _clamped(self, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.limit is None:
            return gate, up
        return gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)

    def _f(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "silu":
            return x * torch.sigmoid(self.alpha * x)
        if self.kind == "relu2":
            return torch.relu(x).square()
        return F.gelu(x, approximate="tanh" if self.kind == "gelu_tanh" else "none")

    def _df(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "silu":
            sigmoid = torch.sigmoid(self.alpha * x)
            return sigmoid * (1 + self.alpha * x * (1 - sigmoid))
        if self.kind == "relu2":
            return 2 * torch.relu(x)
        if self.kind == "gelu":
            density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
            return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density
        c = math.sqrt(2 / math.pi)
        tanh = torch.tanh(c * (x + 0.044715 * x**3))
        slope = (1 - tanh * tanh) * c * (1 + 3 * 0.044715 * x * x)
        return 0.5 * (1 + tanh) + 0.5 * x * slope


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in fp32 if it has half precision; x itself if it is fp32 or fp64."""
    return x.float() if x.dtype.itemsize < 4 else x
