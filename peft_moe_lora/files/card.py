"""What a saved adapter's README says: what it is, how to load it, how to serve it."""

from pathlib import Path

_BEGIN, _END = "<!-- peft_moe_lora: begin -->", "<!-- peft_moe_lora: end -->"
# vLLM allocates adapters at one of these ranks
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

_PEFT = (
    "PEFT's `target_parameters`: `<experts>.base_layer.lora_A/B.weight` is gate_up, `<experts>.lora_A/B.weight` down "
    "(or the only target). A `[E * r, K]` is expert-major, B `[N, r * E]` **rank-major**: column `j*E + e`."
)
_LAYOUTS = {
    "moe_lora": "`<experts>.lora_A.<projection>` `[r * E, K]` and `lora_B` `[N, r * E]`, **both expert-major**: rows, "
    "and columns, `e*r` up to `(e + 1)*r` belong to expert `e`.",
    "peft": _PEFT,
    "vllm_3d": _PEFT,
    "per_expert": "2-D tensors of every expert, `<experts>.<e>.gate_proj|up_proj|down_proj.lora_A/B.weight` (Mixtral: "
    "w1, w3, w2): `[r, K]` and `[N, r]`; gate and up share A.",
    "sglang_3d": "`<experts>.gate_up_proj.lora_A/B.weight` and `down_proj`: `[E, r, K]` and `[E, N, r]`.",
}


def write_card(folder, format_name: str, config: dict, notes=()) -> None:
    """Write our part of the README in an adapter's folder; what others wrote there stays.

    Args:
        folder: of the adapter.
        format_name: the format its tensors are in.
        config: its configuration, as a dict.
        notes: sentences on what a conversion changed.
    """
    path = Path(folder, "README.md")
    text = path.read_text(encoding="utf-8") if path.is_file() else _front_matter(config)
    head, _, rest = text.partition(_BEGIN)
    tail = rest.partition(_END)[2]
    section = f"{_BEGIN}\n{card_section(format_name, config, notes)}\n{_END}"
    path.write_text(f"{head.rstrip()}\n\n{section}\n{tail.lstrip()}".lstrip(), encoding="utf-8")


def card_section(format_name: str, config: dict, notes=()) -> str:
    """Layout, ranks, targets, the import line, and the commands for vLLM and SGLang, in Markdown."""
    base = config.get("base_model_name_or_path") or "BASE"
    ranks = config.get("rank_pattern") or {}
    targets = [*_listed(config.get("target_modules")), *_listed(config.get("target_parameters"))]
    facts = {
        "base model": f"`{base}`",
        "rank": f"{config.get('r')}{f', by name {ranks}' if ranks else ''}",
        "scaling": f"lora_alpha / {'sqrt(r)' if config.get('use_rslora') else 'r'}, lora_alpha {config['lora_alpha']}",
        "targets": ", ".join(f"`{target}`" for target in targets) or "every experts module",
        "experts": _chosen(config.get("expert_indices")),
        "projections": ", ".join(config.get("target_projections") or ()),
        "layout": _LAYOUTS[format_name],
    }
    lines = ["## LoRA on the experts of a Mixture-of-Experts model", ""]
    lines += [f"- {name}: {fact}" for name, fact in facts.items() if fact]
    lines += [f"- {note}" for note in notes]
    lines += ["", "### Load", "", *_loading(format_name, base)]
    lines += [
        "",
        "### Serve",
        "",
        *_serving(format_name, base, max((config.get("r") or 1, *ranks.values()))),
    ]
    return "\n".join(lines)


def _chosen(indices: dict[str, list[int]] | None) -> str:
    if not indices:
        return ""
    return "only those that `expert_indices` in adapter_config.json names; the others are the base model's"


def _loading(format_name: str, base: str) -> list[str]:
    if format_name == "sglang_3d":
        return [
            "SGLang alone reads this format; `peft-moe-lora convert ADAPTER OUT --to peft` makes one for PEFT."
        ]
    own = ["import peft_moe_lora  # registers the tuner"] if format_name == "moe_lora" else []
    return [
        "```python",
        *own,
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")',
        'model = PeftModel.from_pretrained(model, "ADAPTER")',
        "```",
    ]


def _serving(format_name: str, base: str, rank: int) -> list[str]:
    """The commands, with what has to be converted first."""
    served = format_name in ("per_expert", "vllm_3d", "sglang_3d")
    at = "ADAPTER" if served else "ADAPTER-serving"
    lines = (
        []
        if served
        else [f"peft-moe-lora convert ADAPTER {at} --to per_expert --base-config {base}"]
    )
    allowed = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
    if format_name != "sglang_3d" and allowed is not None:
        lines.append(
            f"vllm serve {base} --enable-lora --max-lora-rank {allowed} --lora-modules adapter={at}"
        )
    if format_name != "vllm_3d":
        sglang = f"python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {rank}"
        lines.append(f"{sglang} --lora-paths adapter={at}")
    lines.append(
        f"peft-moe-lora merge ADAPTER {base} MERGED  # or a full checkpoint, for any server"
    )
    lines = ["```sh", *lines, "```"]
    if not served:
        lines += ["", "vLLM's 3-D models (gpt-oss, Qwen3.5-MoE, Qwen3-VL-MoE) take `--to vllm_3d`."]
    return lines


def _listed(value) -> list[str]:
    return [value] if isinstance(value, str) else sorted(value or ())


def _front_matter(config: dict) -> str:
    base = config.get("base_model_name_or_path")
    lines = [
        "---",
        *([f"base_model: {base}"] if base else []),
        "library_name: peft",
        "tags:",
        "- lora",
        "- moe",
        "---",
    ]
    return "\n".join(lines) + "\n"
