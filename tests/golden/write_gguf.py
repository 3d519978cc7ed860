"""Write the golden GGUF adapters of llama.cpp, from the definition of the format.

    python tests/golden/write_gguf.py       add `gguf` to the families that do not have it

What was written once stays. llama.cpp 0.3.36 (llama-cpp-python) runs with these files.
"""

import sys
from pathlib import Path

import gguf
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]

from write import (  # noqa: E402 the path is made above
    ALPHA,
    FAMILIES,
    LINEAR,
    PREFIX,
    R,
    halves,
    read_ours,
)

ARCHITECTURES = {"qwen3_moe": "qwen3moe", "mixtral": "llama", "gpt_oss": "gpt-oss"}
ATTENTION = {"q_proj": "attn_q", "v_proj": "attn_v"}


def spelled_out(family):
    """name in llama.cpp -> tensor."""
    path, A, B, linears = read_ours(HERE / family)
    gate, up = (torch.stack(rows) for rows in zip(*map(halves(family), B["gate_up"]), strict=True))
    pairs = {
        "ffn_gate_exps": (torch.stack(A["gate_up"]), gate),
        "ffn_up_exps": (torch.stack(A["gate_up"]), up),
        "ffn_down_exps": (torch.stack(A["down"]), torch.stack(B["down"])),
    }
    attention = f"{PREFIX}{path.replace('mlp.experts', 'self_attn')}"
    for name, short in ATTENTION.items():
        side_A, side_B = (linears[f"{attention}.{name}.lora_{side}.weight"] for side in "AB")
        if family == "mixtral" and name == "q_proj":
            side_B = side_B[paired_rows(LINEAR["num_attention_heads"], LINEAR["head_dim"])]
        pairs[short] = (side_A, side_B)
    state = {}
    for name, (side_A, side_B) in pairs.items():
        state[f"blk.0.{name}.weight.lora_a"] = side_A
        state[f"blk.0.{name}.weight.lora_b"] = side_B
    return state


def paired_rows(heads, head_dim):
    """The row of the first half of a head, then the same of its second half, and so on."""
    rows = []
    for head in range(heads):
        for i in range(head_dim // 2):
            rows += [head * head_dim + i, head * head_dim + head_dim // 2 + i]
    return rows


def write(family):
    file = HERE / family / "gguf" / "adapter.gguf"
    if file.exists():
        return
    file.parent.mkdir()
    writer = gguf.GGUFWriter(file, ARCHITECTURES[family])
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    for name, tensor in spelled_out(family).items():
        assert tensor.shape[-1] == R or tensor.shape[-2] == R
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    for name in FAMILIES:
        write(name)
