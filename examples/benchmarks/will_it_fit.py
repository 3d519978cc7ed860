"""The README's table of what fits: models by GPUs, by rank, from `plan`.

    python examples/benchmarks/will_it_fit.py

It takes half a minute and needs no GPU.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import GptOssConfig, OlmoeConfig, PreTrainedConfig, Qwen3MoeConfig

from cases import QWEN3_30B
from peft_moe_lora import Plan, plan
from report import markdown_table

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- made by examples/benchmarks/will_it_fit.py -->\n", "<!-- end -->\n"
LENGTH = 2048
# name of an optimizer in TrainingArguments -> how it keeps AdamW's moments
MOMENTS = {"adamw_torch_fused": "fp32", "adamw_8bit": "8-bit"}
TARGETS = ("experts", "q_proj", "k_proj", "v_proj", "o_proj")
# name of a GPU, and GB as it is sold
GPUS = {"RTX 4090": 24, "RTX 5090": 32, "H100 80GB": 80, "H200": 141}
OLMOE = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
GPT_OSS_20B = {"num_hidden_layers": 24, "num_local_experts": 32}
MODELS: dict[str, PreTrainedConfig] = {
    "OLMoE-1B-7B": OlmoeConfig(**OLMOE),
    "gpt-oss-20b": GptOssConfig(**GPT_OSS_20B),
    "Qwen3-30B-A3B": Qwen3MoeConfig(**QWEN3_30B),
}


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        model: a name in MODELS.
        quant: format of the experts; None for bf16.
        r: rank.
        optim: a name in MOMENTS.
    """

    model: str
    quant: str | None
    r: int
    optim: str = "adamw_torch_fused"


CASES = (
    Case("OLMoE-1B-7B", None, 16),
    Case("Qwen3-30B-A3B", "nf4", 4),
    Case("Qwen3-30B-A3B", "nf4", 8, "adamw_8bit"),
    Case("Qwen3-30B-A3B", "nf4", 16),
    Case("gpt-oss-20b", None, 16),
    Case("Qwen3-30B-A3B", None, 16),
)


def planned(case: Case) -> Plan:
    """What a step of a case needs, with gradient checkpointing and Liger."""
    return plan(
        MODELS[case.model],
        r=case.r,
        length=LENGTH,
        quant=case.quant,
        checkpointing=True,
        liger=True,
        optim=case.optim,
        target_modules=TARGETS,
    )


def row(case: Case) -> list[str]:
    """The cells of a case."""
    found = planned(case)
    experts = (case.quant or "bf16").replace("nf4", "NF4")
    counts = [str(found.gpus[name] or "no") for name in GPUS]
    moments = MOMENTS[case.optim]
    return [case.model, experts, str(case.r), moments, f"{found.peak_gib:.1f}", *counts]


def table() -> str:
    """All rows."""
    gpus = [f"{name.removesuffix(' 80GB')} ({gb} GB)" for name, gb in GPUS.items()]
    header = ["model", "experts", "r", "AdamW", "GiB on one GPU", *gpus]
    return markdown_table(header, [row(case) for case in CASES]) + "\n"


def main() -> None:
    """Write the table into the README."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}{table()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
