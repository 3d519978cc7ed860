"""PEFT's format as vLLM reads it for models with 3-D experts (gpt-oss, Qwen3.5-MoE).

vLLM supports one rank and one scaling, needs both projections in every module, does not load
modules that are saved whole, and accepts only some values of the maximum rank.
"""

from dataclasses import replace

from ...files.card import CardText, loading_with_peft
from ...files.servers import VLLM, Server
from ...files.tensor_file import RefusedError
from ..base import need_base
from ..model import Adapter
from ..serving import started, vllm_needs_mixed, vllm_refuses_stacks
from .peft import LAYOUT, Peft
from .peft_targets import NOT_WITH_PEFT, drops


class Vllm3d(Peft):
    """The keys and orders of `peft`, within the limits of vLLM."""

    name = "vllm_3d"
    card = CardText(layout=LAYOUT, loading=loading_with_peft(), served_by=(VLLM,))
    one_rank = True
    both_projections = True

    def prepare(self, adapter: Adapter) -> Adapter:
        base = need_base(
            adapter.base, "vLLM reads this format of some models only, so the model must be known"
        )
        refusal = vllm_refuses_stacks(adapter, base)
        if refusal is not None:
            raise RefusedError(f"{refusal}.")
        notes = (vllm_needs_mixed(base, stacked=True), drops(adapter))
        return adapter.noted(*(note for note in notes if note is not None))

    def card_of(self, adapter: Adapter) -> CardText:
        if drops(adapter) is None:
            return self.card
        return replace(self.card, loading=NOT_WITH_PEFT)

    def servers(self, adapter: Adapter) -> list[Server]:
        assert adapter.base is not None, "the adapter was not prepared for vLLM"
        return started(super().servers(adapter), adapter.base, stacked=True)
