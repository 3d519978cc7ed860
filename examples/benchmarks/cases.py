"""What is timed: the shapes of named models, the cases of the layer benchmark, random tensors.

Each shape is stated here once; every benchmark takes it from here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import nn

from expert_modules import qwen3_experts
from peft_moe_lora.experts.layout import read_layout

MIB = 2**20
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PROJECTIONS = ("gate_up", "down")


class Shape(NamedTuple):
    """E experts, hidden size H, intermediate size I, top_k experts per token."""

    E: int
    H: int
    I: int  # noqa: E741  # the intermediate size is I in every formula
    top_k: int


GPU_SHAPES = {
    "qwen3-30b": Shape(128, 2048, 768, 8),
    "qwen3.5-35b": Shape(256, 2048, 512, 8),
    "olmoe": Shape(64, 2048, 1024, 8),
    "gptoss-shape": Shape(32, 2880, 2880, 4),
    "dsv3-slice": Shape(64, 7168, 2048, 8),
    "mixtral": Shape(8, 4096, 14336, 2),
    "qwen3-next": Shape(512, 2048, 512, 10),
    "llama4-like": Shape(16, 5120, 8192, 1),
}
CPU_SHAPES = {
    "many-small": Shape(32, 512, 256, 4),
    "few-large": Shape(8, 1024, 1024, 2),
}
SHAPES = GPU_SHAPES | CPU_SHAPES


class Goal(NamedTuple):
    """What moe_lora is held to.

    Attributes:
        x_roof: the step's time over the roofline.
        kept: MiB that forward keeps for backward.
    """

    x_roof: float
    kept: int


# by shape and tokens: on an H200 in bf16 at r = 16
GOALS = {
    ("qwen3-30b", 8192): Goal(1.5, 205),
    ("qwen3.5-35b", 8192): Goal(1.6, 140),
    ("olmoe", 8192): Goal(1.4, 270),
    ("gptoss-shape", 8192): Goal(1.3, 375),
    ("dsv3-slice", 8192): Goal(1.18, 525),
    ("mixtral", 8192): Goal(1.12, 910),
    ("qwen3-30b", 2048): Goal(1.7, 52),
    ("qwen3-30b", 32768): Goal(1.35, 815),
}
# on a CPU: the step's time over that of the base and the rank-r products alone
CPU_GOAL = 1.3
# shape and tokens of what is timed where the command line names nothing
GPU_CASES = list(GOALS)
CPU_CASES = [(name, 256) for name in CPU_SHAPES]

# whole models, as fields of transformers' Qwen3MoeConfig
QWEN3_30B = {
    "vocab_size": 151936,
    "hidden_size": SHAPES["qwen3-30b"].H,
    "moe_intermediate_size": SHAPES["qwen3-30b"].I,
    "num_experts": SHAPES["qwen3-30b"].E,
    "num_experts_per_tok": SHAPES["qwen3-30b"].top_k,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
}
TINY_QWEN3 = QWEN3_30B | {
    "vocab_size": 256,
    "hidden_size": 64,
    "moe_intermediate_size": 48,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def shape_of(name: str) -> Shape:
    """The shape of a name in SHAPES, or that written as "E,H,I,top_k".

    Raises:
        ValueError: if `name` is neither.
    """
    if name in SHAPES:
        return SHAPES[name]
    sizes = name.split(",")
    if len(sizes) != 4 or not all(size.isdecimal() for size in sizes):
        known = ", ".join(SHAPES)
        raise ValueError(f"{name!r} is no shape; give E,H,I,top_k or one of {known}.")
    return Shape(*map(int, sizes))


def shrunk(shape: Shape) -> Shape:
    """A shape of the same kind that a CPU computes in milliseconds."""
    top_k = min(shape.top_k, 2)
    return Shape(6, 32 + shape.H % 16, 16 + shape.I % 16, top_k)


def default_device() -> str:
    """The first GPU where there is one."""
    if torch.cuda.is_available():
        return "cuda"
    return "cpu"


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name without its module, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        name: of the shape, as the command line names it.
        E, H, I, top_k: the shape, see `Shape`.
        T: tokens.
        r: rank of one expert's update.
        dtype: of the base weights and the activations; the adapter is fp32.
        skew: share of the rows that go to one expert; 0 routes uniformly.
        device: where the tensors are.
        dropout: probability that an element is dropped before A.
        experts: is given the shape's four sizes, and makes the experts module on the meta device.
    """

    name: str
    E: int
    H: int
    I: int  # noqa: E741  # the intermediate size is I in every formula
    top_k: int
    T: int
    r: int
    dtype: torch.dtype
    skew: float
    device: torch.device
    dropout: float = 0.0
    experts: Callable[[int, int, int, int], nn.Module] = qwen3_experts

    @cached_property
    def gated(self) -> bool:
        """Whether gate_up has a gate half and an up half, or is up alone."""
        return read_layout(self.experts(self.E, self.H, self.I, self.top_k)).gated

    @property
    def label(self) -> str:
        """Shape, tokens and rank, for people to read."""
        label = f"{self.name} T={self.T} r={self.r}"
        if self.skew:
            label += f" skew={self.skew:g}"
        if self.dropout:
            label += f" dropout={self.dropout:g}"
        return label

    @property
    def goal(self) -> Goal | None:
        """What moe_lora is held to here; None where there is no goal."""
        if self.r != 16 or self.dtype != torch.bfloat16 or self.skew or self.dropout:
            return None
        return GOALS.get((self.name, self.T))


class Problem:
    """Random inputs, base weights and adapter of a case.

    The adapter adds to a row about half of what the base gives it.

    Attributes:
        x: [T, H] leaf.
        top_k_index: [T, top_k] int64.
        top_k_weights: [T, top_k] leaf, dtype of x.
        dout: [T, H], the gradient of the output.
        experts: the experts module on the meta device.
        layout: how it stores its weights.
        weights: {"gate_up": [E, N, H], "down": [E, H, I]}, frozen; N = 2I where gated, else I.
            Views of transposed tensors where the module stores them as [E, K, N].
        biases: {"gate_up": [E, N], "down": [E, H]}, frozen; empty where the module has none.
        adapter: {"lora_A.gate_up": [r*E, H], "lora_B.gate_up": [N, r*E], ...}, fp32, expert-major:
            rows of A and columns of B e*r up to (e + 1)*r are expert e.
        scaling: lora_alpha / r.
    """

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        self.scaling = 2.0
        generator = torch.Generator(case.device).manual_seed(seed)

        def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = case.dtype) -> torch.Tensor:
            values = torch.randn(*shape, dtype=dtype, generator=generator, device=case.device)
            return values.mul_(std)

        def uniform(*shape: int) -> torch.Tensor:
            return torch.rand(*shape, generator=generator, device=case.device)

        self.x = normal(case.T, case.H).requires_grad_()
        self.dout = normal(case.T, case.H)
        self.top_k_index = uniform(case.T, case.E).topk(case.top_k, dim=-1).indices
        self.top_k_index[uniform(case.T, case.top_k) < case.skew] = case.E // 2
        logits = normal(case.T, case.top_k, dtype=torch.float32)
        self.top_k_weights = logits.softmax(-1).to(case.dtype).requires_grad_()
        self.experts = case.experts(case.E, case.H, case.I, case.top_k)
        self.layout = read_layout(self.experts)
        self.weights = {}
        self.biases = {}
        self.adapter = {}
        for name, projection in self.layout.projections.items():
            N = projection.out_features
            K = projection.in_features
            if projection.transposed:
                self.weights[name] = normal(case.E, K, N, std=K**-0.5).transpose(1, 2)
            else:
                self.weights[name] = normal(case.E, N, K, std=K**-0.5)
            if projection.bias:
                self.biases[name] = normal(case.E, N, std=0.5)
            rank = case.r * case.E
            A = normal(rank, K, std=K**-0.5, dtype=torch.float32)
            std_B = 0.5 * case.r**-0.5 / self.scaling
            B = normal(N, rank, std=std_B, dtype=torch.float32)
            self.adapter[f"lora_A.{name}"] = A
            self.adapter[f"lora_B.{name}"] = B

    def activation(self, pre: torch.Tensor) -> torch.Tensor:
        """What the experts module itself computes between the projections: [M, N] -> [M, I]."""
        if self.layout.gated:
            return self.experts._apply_gate(pre)
        return self.experts.act_fn(pre)
