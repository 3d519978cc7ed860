"""What each reader does with each format of each family, found by running the reader's own code.

`test_vllm.py`, `test_sglang.py`, `test_mlx.py` and `test_llama_cpp.py` run it. `test_verdicts.py`,
which needs no reader, holds our conversions to the same table, and `readers_table.py` writes it
into docs/serving.md.
"""

from dataclasses import dataclass
from typing import NamedTuple

from peft_moe_lora.files.servers import SGLANG, VLLM, Server

EXACT = "exact"
# vLLM reads two layouts of experts if it is started with --enable-mixed-moe-lora-format
MIXED = "exact, mixed"
# the reader loads the file without an error, but what it computes is the base, or something else
IGNORED = "ignored"
MISREAD_MIXED = "misread, mixed"


def refused(words: str) -> str:
    """The reader raises an error with these words."""
    return f"refused: {words}"


class Row(NamedTuple):
    """One architecture.

    Attributes:
        formats: format -> what the reader does with an adapter on experts alone.
        attention: the same with an adapter on attention too, in the formats that are exact.
        router: the same with an adapter on the routers too.
    """

    formats: dict[str, str]
    attention: str = EXACT
    router: str = EXACT


@dataclass(frozen=True)
class Reader:
    """A reader at one release.

    Attributes:
        name: the reader's name.
        server: the same as our formats know it, if it is a server.
        package, version: its release.
        date: when it was run.
        rows: architecture -> what it does.
    """

    name: str
    server: Server | None
    package: str
    version: str
    date: str
    rows: dict[str, Row]


_2D = {"per_expert": EXACT, "vllm_3d": MIXED}
_3D = {"per_expert": MIXED, "vllm_3d": EXACT}

VLLM_0_33 = Reader(
    "vLLM",
    VLLM,
    "vllm",
    "0.33.0",
    "2026-11-30",
    {
        "Qwen3MoeForCausalLM": Row(_2D),
        "Qwen3_5MoeForCausalLM": Row(_2D),
        "Qwen3_5MoeForConditionalGeneration": Row(_3D),
        "Qwen3VLMoeForConditionalGeneration": Row(_3D),
        "MixtralForCausalLM": Row({"per_expert": EXACT, "vllm_3d": IGNORED}),
        "OlmoeForCausalLM": Row(_2D),
        "DeepseekV3ForCausalLM": Row(_2D),
        "Glm4MoeForCausalLM": Row(_2D),
        "GptOssForCausalLM": Row(
            {"per_expert": refused("expected target modules"), "vllm_3d": EXACT}
        ),
        "NemotronHForCausalLM": Row(
            {"per_expert": EXACT, "vllm_3d": MISREAD_MIXED}, router=IGNORED
        ),
    },
)

_NO_ROUTER = refused("get_hidden_dim not implemented for gate")
_NO_LAYER = refused("No corresponding LoRA layer supported")
_BOTH = {"per_expert": EXACT, "sglang_3d": EXACT}

SGLANG_0_5_23 = Reader(
    "SGLang",
    SGLANG,
    "sglang",
    "0.5.23",
    "2026-11-30",
    {
        "Qwen3MoeForCausalLM": Row(_BOTH, router=_NO_ROUTER),
        "Qwen3_5MoeForCausalLM": Row(
            _BOTH, attention=refused("does not match weight shape"), router=_NO_ROUTER
        ),
        "Qwen3_5MoeForConditionalGeneration": Row(_BOTH, router=_NO_ROUTER),
        "Qwen3VLMoeForConditionalGeneration": Row(_BOTH, router=_NO_ROUTER),
        "MixtralForCausalLM": Row(
            {
                "per_expert": refused("get_hidden_dim not implemented for w"),
                "sglang_3d": EXACT,
            },
            router=_NO_ROUTER,
        ),
        "OlmoeForCausalLM": Row(_BOTH, router=_NO_ROUTER),
        "DeepseekV3ForCausalLM": Row(_BOTH, router=_NO_LAYER),
        "Glm4MoeForCausalLM": Row(_BOTH, router=_NO_LAYER),
        "GptOssForCausalLM": Row(
            _BOTH,
            router=refused("get_hidden_dim not implemented for router"),
        ),
        "NemotronHForCausalLM": Row(
            {"per_expert": refused("Cannot find target module name"), "sglang_3d": EXACT},
            router=_NO_ROUTER,
        ),
    },
)

_NO_PARAMETER = refused("not an adapter parameter in the model")
_NO_GATE = refused("Can't convert layer of type MoEGate to LoRA")
_MLX = {"mlx": EXACT}

MLX_0_32 = Reader(
    "mlx-lm",
    None,
    "mlx-lm",
    "0.32.2",
    "2026-11-30",
    {
        "Qwen3MoeForCausalLM": Row(_MLX),
        "Qwen2MoeForCausalLM": Row(_MLX),
        "MixtralForCausalLM": Row(_MLX),
        "OlmoeForCausalLM": Row(_MLX),
        "DeepseekV3ForCausalLM": Row(_MLX, attention=_NO_PARAMETER, router=_NO_GATE),
        "Glm4MoeForCausalLM": Row(_MLX, router=_NO_GATE),
        "GptOssForCausalLM": Row(_MLX),
    },
)

_GGUF = {"gguf": EXACT}
# kv_b_proj is stored as two tensors; what else is wrong there is in `test_llama_cpp.py`
_NO_TENSOR = refused("does not exist in base model")

LLAMA_CPP = Reader(
    "llama.cpp",
    None,
    "llama-cpp-python",
    "0.3.36",
    "2026-11-30",
    {
        "Qwen3MoeForCausalLM": Row(_GGUF),
        "Qwen2MoeForCausalLM": Row(_GGUF),
        "MixtralForCausalLM": Row(_GGUF),
        "OlmoeForCausalLM": Row(_GGUF),
        "DeepseekV2ForCausalLM": Row(_GGUF, attention=_NO_TENSOR),
        "DeepseekV3ForCausalLM": Row(_GGUF, attention=_NO_TENSOR),
        "GptOssForCausalLM": Row(_GGUF),
    },
)

READERS = (VLLM_0_33, SGLANG_0_5_23, MLX_0_32, LLAMA_CPP)
