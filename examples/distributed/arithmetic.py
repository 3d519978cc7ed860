"""What a model with an adapter on every expert holds and sends on several GPUs, by arithmetic.

    python examples/distributed/arithmetic.py

A and B are fp32, each with a gradient and two moments of AdamW: 16 bytes. A weight has `bytes`.
Activations come on top; they do not depend on the engine.

held by a GPU of n:
    DDP    weights + 16 P
    FSDP2  (weights + 16 P) / n + 2 layers, which are gathered at a time
    EP     (weights + 16 P) / n + 2 layers without their experts, which are never gathered
sent and received by a GPU in a layer and a step, f = (n - 1) / n:
    DDP    2 * 4 p f                gradients
    FSDP2  2 * layer * f + 4 p f    weights in forward and backward; gradients
    EP     4 * 2 T top_k H f        rows to their experts and back, forward and backward, in bf16
P, p: parameters of the adapter in the model and in a layer. EP is over FSDP2, with fsdp_size = n.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

RANK = 16
TOKENS = 8192
# GB that a GPU of 80 GB and one of 141 GB leave to weights and adapter, beside activations
ROOM = {"80 GB": 65, "141 GB": 120}
ENGINES = ("none", "DDP", "FSDP2", "EP")
# under DDP each of several GPUs holds as much as one
CASES = (("none", 1), ("DDP", 8), ("FSDP2", 8), ("EP", 8), ("FSDP2", 16), ("EP", 16))
DOCS = Path(__file__).parents[2] / "docs" / "scale.md"
BEGIN, END = "<!-- made by examples/distributed/arithmetic.py -->\n", "<!-- end of arithmetic -->\n"


@dataclass(frozen=True)
class Model:
    """A model whose experts all get an adapter.

    Attributes:
        parameters: of the whole model.
        layers: with experts.
        E, H, I, top_k: experts, hidden size, intermediate size, experts of a token.
        bytes: of a weight, scales included.
        engines: those that can hold the weights in this form.
    """

    name: str
    parameters: float
    layers: int
    E: int
    H: int
    I: int  # noqa: E741  # the intermediate size is I in every formula
    top_k: int
    bytes: float = 2.0
    engines: tuple[str, ...] = ENGINES

    @property
    def adapter_of_layer(self) -> int:
        """Parameters of A and B: r * (H + 2I) for gate_up and r * (I + H) for down."""
        return self.E * RANK * (2 * self.H + 3 * self.I)

    @property
    def experts_of_layer(self) -> int:
        """Parameters of the experts' weights."""
        return self.E * 3 * self.H * self.I

    @property
    def others_of_layer(self) -> float:
        """Parameters of a layer beside its experts; embeddings and dense layers are shared out."""
        return self.parameters / self.layers - self.experts_of_layer

    def held(self, engine: str, n: int) -> float:
        """GB that a GPU of n holds of weights, A, B, gradients and AdamW's state."""
        everything = self.parameters * self.bytes + 16 * self.adapter_of_layer * self.layers
        if engine in ("none", "DDP"):
            return everything / 1e9
        gathered = self.others_of_layer
        if engine == "FSDP2":
            gathered += self.experts_of_layer
        return (everything / n + 2 * gathered * self.bytes) / 1e9

    def sent(self, engine: str, n: int) -> float:
        """MB that a GPU of n sends in a layer and a step of TOKENS tokens a GPU."""
        factor = (n - 1) / n
        layer = (self.experts_of_layer + self.others_of_layer) * self.bytes
        of_engine = {
            "none": 0.0,
            "DDP": 2 * 4 * self.adapter_of_layer,
            "FSDP2": 2 * layer + 4 * self.adapter_of_layer,
            "EP": 4 * 2 * TOKENS * self.top_k * self.H,
        }
        return of_engine[engine] * factor / 1e6


MODELS = (
    Model("Qwen3-30B-A3B, bf16", 30.5e9, 48, 128, 2048, 768, 8),
    Model("Qwen3-30B-A3B, NF4", 30.5e9, 48, 128, 2048, 768, 8, 0.52, ENGINES[:2]),
    Model("gpt-oss-120b, bf16", 116.8e9, 36, 128, 2880, 2880, 4),
    Model("gpt-oss-120b, MXFP4", 116.8e9, 36, 128, 2880, 2880, 4, 0.54, ENGINES[:2]),
    Model("DeepSeek-V3, bf16", 671e9, 58, 256, 7168, 2048, 8),
)


def table() -> str:
    """Markdown: a row for each model, engine and number of GPUs."""
    lines = [
        f"| model | engine | GPUs | GB held | {' | '.join(ROOM)} | MB sent a layer |\n",
        "| --- | --- | --- | --- | --- | --- | --- |\n",
    ]
    lines += [
        _row(model, engine, n) for model in MODELS for engine, n in CASES if engine in model.engines
    ]
    return "".join(lines)


def _row(model: Model, engine: str, n: int) -> str:
    held = model.held(engine, n)
    fits = " | ".join("yes" if held <= room else "no" for room in ROOM.values())
    return (
        f"| {model.name} | {engine} | {n} | {held:,.0f} | {fits} | {model.sent(engine, n):,.0f} |\n"
    )


def written() -> str:
    """The table in docs/scale.md."""
    text = DOCS.read_text("utf-8")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)]


def main() -> int:
    """Print the table, and write it into docs/scale.md."""
    print(table(), end="")
    old, new = (f"{BEGIN}{text}{END}" for text in (written(), table()))
    DOCS.write_text(DOCS.read_text("utf-8").replace(old, new), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
