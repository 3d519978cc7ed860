"""What a server would refuse or misread, and what to do instead.

Each function returns a sentence that begins with the server's name, or None if the server reads the
adapter. They say what the loaders of vLLM 0.33 and SGLang 0.5.23 do.
"""

from collections import defaultdict
from collections.abc import Iterable

from ..experts.families import (
    SGLANG_NO_QUERY,
    SGLANG_ROUTER_CLASSES,
    VLLM_3D,
    VLLM_NO_EXPERT_BY_EXPERT,
)
from ..files.servers import SGLANG, VLLM, Server, mixed_vllm
from .base import BaseModel
from .model import Adapter

# projections that SGLang stacks: those that it needs, and those that may be missing
_STACKED = ((("q_proj", "v_proj"), ("k_proj",)), (("q_a_proj", "kv_a_proj_with_mqa"), ()))
MERGE = "merge it into the base model instead (peft-moe-lora merge)"


def in_its_words(words: str) -> str:
    """What a reader says to such an adapter, in brackets."""
    if not words:
        return "(it says nothing)"
    return f'(it says "{words}")'


def refuses_other_than_lora(adapter: Adapter, program: str) -> str | None:
    """What a program refuses that loads A and B alone."""
    held = adapter.without_lora()
    if not held:
        return None
    remedy = MERGE
    if held[0].endswith(".base_layer.weight"):
        remedy = "save it again with save_embedding_layers=False if the vocabulary has its old size"
    return f"{program} loads LoRA alone, but this adapter holds {held[0]}; {remedy}"


def vllm_refuses(adapter: Adapter, base: BaseModel) -> str | None:
    """What vLLM refuses or ignores in every format."""
    held = refuses_other_than_lora(adapter, VLLM.name)
    if held is not None:
        return held
    router = _first_router(adapter)
    if router is not None and not _is_gated(adapter, base):
        return (
            f"vLLM ignores LoRA on the routers of {base.architecture}, whose experts have no gate, "
            f"but this adapter adapts {router}; {MERGE}"
        )
    rank = max(layer.r for layer in adapter.layers())
    if VLLM.allocated(rank) is None:
        return (
            f"vLLM accepts ranks up to {VLLM.ranks[-1]}, but this adapter has rank {rank}; {MERGE}"
        )
    return None


def vllm_refuses_stacks(adapter: Adapter, base: BaseModel) -> str | None:
    """What vLLM refuses or misreads with all experts in one tensor (3-D)."""
    if base.architecture in VLLM_3D:
        return vllm_refuses(adapter, base)
    if base.hub_names.block != "mlp":
        return (
            f"vLLM names the experts of {base.architecture} {base.hub_names.block}.experts and "
            "ignores this format without an error; convert to per_expert instead"
        )
    if not _is_gated(adapter, base):
        return (
            f"vLLM misreads this format for {base.architecture}, whose experts have no gate; "
            "convert to per_expert instead"
        )
    return vllm_refuses(adapter, base)


def vllm_refuses_experts(adapter: Adapter, base: BaseModel) -> str | None:
    """What vLLM refuses or misreads with tensors of each expert (2-D)."""
    if base.architecture in VLLM_NO_EXPERT_BY_EXPERT:
        return (
            f"vLLM does not find the experts of {base.architecture} in this format "
            f"{in_its_words('expected target modules')}; convert to vllm_3d for it"
        )
    return vllm_refuses(adapter, base)


def vllm_needs_mixed(base: BaseModel, stacked: bool) -> str | None:
    """The options with which vLLM reads a format that is not the model's own."""
    if stacked == (base.architecture in VLLM_3D):
        return None
    own = "per_expert"
    if not stacked:
        own = "vllm_3d"
    return (
        f"vLLM reads {base.architecture} as {own}: convert to that, or serve with "
        f"--enable-mixed-moe-lora-format and is_3d_lora_weight {str(stacked).lower()}"
    )


def started(servers: Iterable[Server], base: BaseModel, stacked: bool) -> list[Server]:
    """The servers with the options that they need for a format; only vLLM needs some."""
    if vllm_needs_mixed(base, stacked) is None:
        return list(servers)
    return [mixed_vllm(stacked) if server is VLLM else server for server in servers]


def sglang_refuses(adapter: Adapter, base: BaseModel) -> str | None:
    """What SGLang refuses in every format."""
    held = refuses_other_than_lora(adapter, SGLANG.name)
    if held is not None:
        return held
    router = _first_router(adapter)
    if router is not None:
        words = f"get_hidden_dim not implemented for {router.rpartition('.')[2]}"
        if base.architecture in SGLANG_ROUTER_CLASSES:
            words = "No corresponding LoRA layer supported"
        return (
            f"SGLang has no LoRA on routers {in_its_words(words)}, but this adapter adapts "
            f"{router}; {MERGE}"
        )
    if base.architecture in SGLANG_NO_QUERY and _adapts(adapter, "q_proj"):
        return (
            f"SGLang refuses LoRA on q_proj of {base.architecture}, of which it expects half the "
            f"rows {in_its_words('does not match weight shape')}; {MERGE}"
        )
    incomplete = _incomplete_stack(adapter.linears)
    if incomplete is not None:
        return f"SGLang loads {incomplete}; {MERGE}"
    return None


def sglang_refuses_experts(adapter: Adapter, base: BaseModel) -> str | None:
    """What SGLang refuses or misreads with tensors of each expert (2-D)."""
    names = (base.hub_names.gate, base.hub_names.up, base.hub_names.down)
    words = ""
    if not _is_gated(adapter, base):
        words = "Cannot find target module name"
    elif names != ("gate_proj", "up_proj", "down_proj"):
        words = f"get_hidden_dim not implemented for {names[0]}"
    if words:
        return (
            f"SGLang does not take {base.architecture} in this format {in_its_words(words)}; "
            "convert to sglang_3d for it"
        )
    return sglang_refuses(adapter, base)


def _is_gated(adapter: Adapter, base: BaseModel) -> bool:
    return all(base.experts[path].gated for path in adapter.experts)


def _first_router(adapter: Adapter) -> str | None:
    """The first router that the adapter adapts."""
    return next((path for path, layer in adapter.linears.items() if layer.is_router), None)


def _adapts(adapter: Adapter, name: str) -> bool:
    """Whether the adapter adapts a linear layer of this last name."""
    return any(path.endswith(f".{name}") for path in adapter.linears)


def _incomplete_stack(paths: Iterable[str]) -> str | None:
    """The first block that adapts a part of what SGLang stacks, in words."""
    names_of_block: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        block, _, name = path.rpartition(".")
        names_of_block[block].add(name)
    for block, names in names_of_block.items():
        for needed, stacked in _STACKED:
            held = names & {*needed, *stacked}
            if held and not held.issuperset(needed):
                both = " and ".join(needed)
                return f"{both} together only, but {block} has {', '.join(sorted(held))}"
    return None
