"""PEFT's format as vLLM reads it for models with 3-D experts (gpt-oss, Qwen3.5-MoE).

vLLM supports one rank and one scaling, needs both projections in every module, does not load
modules that are saved whole, and accepts only some values of the maximum rank.
"""

from ...experts.families import VLLM_3D
from ...files.card import CardText, loading_with_peft
from ...files.servers import VLLM
from ...files.tensor_file import RefusedError
from ..model import Adapter
from .peft import LAYOUT, Peft


class Vllm3d(Peft):
    """The keys and orders of `peft`, within the limits of vLLM."""

    name = "vllm_3d"
    card = CardText(layout=LAYOUT, loading=loading_with_peft(), served_by=(VLLM,))
    one_rank = True
    both_projections = True

    def prepare(self, adapter: Adapter) -> Adapter:
        if adapter.carried:
            raise RefusedError(
                "vLLM refuses adapters with modules_to_save, but this one holds "
                f"{adapter.carried[0]}; merge it into the base model instead (peft-moe-lora merge)."
            )
        rank = max(layer.r for layer in adapter.layers())
        if VLLM.allocated(rank) is None:
            raise RefusedError(
                f"vLLM accepts ranks up to {VLLM.ranks[-1]}, but this adapter has {rank}; merge it "
                "into the base model instead (peft-moe-lora merge)."
            )
        if adapter.base is not None and adapter.base.model_type not in VLLM_3D:
            return adapter.noted(
                f"vLLM is not known to read {adapter.base.model_type} in 3-D, and it gives no "
                "error if it cannot; check that the model's class in vLLM sets is_3d_moe_weight, "
                "or convert to per_expert"
            )
        return adapter
