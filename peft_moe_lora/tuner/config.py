"""MoELoraConfig: what the user says, checked before anything is touched."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from operator import index

from peft import LoraConfig, PeftType
from peft.utils.other import get_pattern_key

from ..experts.layout import PROJECTIONS, ExpertsLayout
from ..files.adapter_file import (
    CHOSEN_EXPERTS_VERSION,
    FORMAT_VERSION,
    LAYOUT,
    AdapterFile,
    complete_adapter_file,
    find_adapter_file,
    read_adapter_file,
)
from ..files.card import OUR_CARD, write_card
from ..functional import BACKENDS
from .implementations import MATERIALIZE

# LoraConfig's fields that change what an adapter computes in ways experts have no counterpart for: off value, name
_NOT_ON_EXPERTS = {
    "use_dora": (False, "DoRA"),
    "lora_bias": (False, "a bias on B"),
    "target_parameters": (
        None,
        "targeting parameters; name the experts modules in target_modules instead",
    ),
    "use_qalora": (False, "QALoRA"),
    "use_bdlora": (None, "BD-LoRA"),
    "arrow_config": (None, "Arrow routing"),
    "kasa_config": (None, "KaSA"),
    "velora_config": (None, "VeLoRA"),
    "monteclora_config": (None, "MonteCLoRA"),
    "alora_invocation_tokens": (None, "aLoRA"),
    "eva_config": (None, "EVA initialisation"),
    "corda_config": (None, "CorDA initialisation"),
    "lora_ga_config": (None, "LoRA-GA initialisation"),
    "layer_replication": (None, "layer replication"),
    "megatron_config": (None, "Megatron layers"),
}


@dataclass
class MoELoraConfig(LoraConfig):
    """Configuration of per-expert LoRA: every field of `peft.LoraConfig`, and those below.

    Every targeted expert gets its own pair: W[e] + scaling * B[e] A[e], with scaling = lora_alpha / r
    (lora_alpha / sqrt(r) with use_rslora). Targets that are not experts become PEFT's own LoRA layers.

    Args:
        r: rank of each expert's update, at least 1.
        target_modules: names of experts modules and of ordinary layers; None for every experts module of the model.
        expert_indices: which experts of which layer get an adapter: experts modules, by path, the end of a path or a
            regular expression as in rank_pattern, to ids 0..E-1. The first entry that matches a module counts; one
            that none matches, or an empty list, gets no adapter. None for every expert. A and B, their gradients and
            the optimizer's state hold the chosen experts alone, in ascending order.
        target_projections: which projections of the experts get an adapter, out of "gate_up" (the up projection where
            there is no gate) and "down"; both by default.
        backend: "triton" (fused kernels), "torch", or "auto": triton on CUDA of compute capability 8.0 and newer;
            "materialize": the model's own experts implementation, on W + scaling * B A written out in every call.
        recompute: keep no pre-activation for backward; costs the gate_up product once more.
        layout, format_version: of the adapter file; written on save, checked on load, not for users to set.
    Raises:
        ValueError: naming the field, if a value is out of range or an option does not exist for experts.
    Source: Hu et al. 2021, arXiv:2106.09685, applied to each expert on its own.
    """

    expert_indices: dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Experts that get an adapter, by layer: path or pattern -> ids; every expert by default."
        },
    )
    target_projections: list[str] | None = field(
        default=None,
        metadata={
            "help": 'Projections of the experts that get an adapter: "gate_up", "down"; both by default.'
        },
    )
    backend: str = field(
        default="auto",
        metadata={"help": 'What runs the experts: "auto", "triton", "torch" or "materialize".'},
    )
    recompute: bool = field(
        default=False,
        metadata={"help": "Keep no pre-activation for backward: less memory, one more product."},
    )
    layout: str = field(default=LAYOUT, metadata={"help": "Order of the adapter tensors on disk."})
    format_version: int = field(default=1, metadata={"help": "Version of the adapter file format."})

    def __post_init__(self):
        # before PEFT's own checks: theirs warn about fields that ours refuse
        self._refuse_unsupported()
        super().__post_init__()
        self.peft_type = PeftType.MOE_LORA
        if isinstance(self.target_projections, str):
            self.target_projections = [self.target_projections]
        self.target_projections = list(
            PROJECTIONS if self.target_projections is None else self.target_projections
        )
        self._check_values()
        if self.expert_indices is not None:
            self.expert_indices = checked_indices(self.expert_indices)
            self.format_version = max(self.format_version, CHOSEN_EXPERTS_VERSION)
        # not fields, so never written: what was read beside this configuration, what is to be written beside it
        self._file: AdapterFile | None = None
        self._description: dict | None = None

    def _refuse_unsupported(self) -> None:
        known = {f.name for f in fields(self)}
        for name, (off, what) in _NOT_ON_EXPERTS.items():
            if name in known and getattr(self, name) not in (off, None, False, [], {}):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: experts do not support {what}; leave {name} unset."
                )
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r}: experts know True (A as nn.Linear, B zero), "
                '"gaussian" (A normal, B zero) and False (both random).'
            )

    def _check_values(self) -> None:
        ranks = {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}
        for name, r in ranks.items():
            if isinstance(r, bool) or not isinstance(r, int) or r < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {r!r}.")
        alphas = {
            "lora_alpha": self.lora_alpha,
            **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()},
        }
        for name, alpha in alphas.items():
            if not isinstance(alpha, int | float) or not math.isfinite(alpha):
                raise ValueError(f"{name} must be a finite number, got {alpha!r}.")
        if not isinstance(self.lora_dropout, int | float) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}.")
        wrong = [name for name in self.target_projections if name not in PROJECTIONS]
        if (
            wrong
            or not self.target_projections
            or len(set(self.target_projections)) < len(self.target_projections)
        ):
            raise ValueError(
                f"target_projections must name {PROJECTIONS} once each, got {self.target_projections!r}."
            )
        if self.backend not in (*BACKENDS, MATERIALIZE):
            raise ValueError(
                f"backend must be one of {(*BACKENDS, MATERIALIZE)}, got {self.backend!r}."
            )
        if self.backend == MATERIALIZE and self.lora_dropout:
            raise ValueError(
                f'lora_dropout={self.lora_dropout!r}: with backend="{MATERIALIZE}" there is no low-rank path whose '
                "input could be dropped; leave lora_dropout at 0."
            )
        if self.backend == MATERIALIZE and self.recompute:
            raise ValueError(
                f'recompute=True: with backend="{MATERIALIZE}" the experts implementation of the model decides what '
                "is kept for backward; use gradient checkpointing."
            )
        if self.layout != LAYOUT:
            raise ValueError(
                f"layout={self.layout!r} is not known; this version reads {LAYOUT!r}. If a newer peft_moe_lora wrote "
                "the adapter, upgrade; if another program did, convert it."
            )
        if (
            not isinstance(self.format_version, int)
            or not 1 <= self.format_version <= FORMAT_VERSION
        ):
            raise ValueError(
                f"format_version={self.format_version!r} is not known; this version reads 1 to {FORMAT_VERSION}. "
                "Upgrade peft_moe_lora to read the adapter."
            )

    def experts_of(self, key: str, num_experts: int) -> tuple[int, ...] | None:
        """Ascending ids of the experts of a module that get an adapter; None for all, () for none.

        Args:
            key: path of the experts module.
            num_experts: E, which every id must be below.
        Raises:
            ValueError: naming the entry of expert_indices that asks for experts the module does not have.
        """
        if self.expert_indices is None:
            return None
        pattern = get_pattern_key(self.expert_indices.keys(), key)
        chosen = tuple(self.expert_indices.get(pattern, ()))
        if chosen and chosen[-1] >= num_experts:
            raise ValueError(
                f"expert_indices[{pattern!r}] names expert {chosen[-1]}, but {key} has {num_experts} experts, "
                f"0 to {num_experts - 1}."
            )
        return chosen

    def projections_of(self, layout: ExpertsLayout) -> list[str]:
        """The projections of an experts module that get an adapter."""
        return layout.targeted(self.target_projections or list(PROJECTIONS))

    def check_every_entry_matches(self, keys: Iterable[str]) -> None:
        """Hold expert_indices against the paths of all experts modules that are targeted.

        Raises:
            ValueError: naming an entry that decides for none of them.
        """
        patterns, keys = self.expert_indices or {}, list(keys)
        idle = set(patterns) - {get_pattern_key(patterns.keys(), key) for key in keys}
        if idle:
            raise ValueError(
                f"expert_indices: {sorted(idle)[0]!r} matches no targeted experts module that an earlier entry leaves "
                f"to it; these are {keys[:4] or 'none'}{f' and {len(keys) - 4} more' if keys[4:] else ''}."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        """As PEFT's, and reads the adapter file beside the configuration, so that a bad one fails before it is used.

        Raises:
            ValueError: if the file is truncated, a pickle, of an unknown layout or version, or not finite.
        """
        config = super().from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )
        path = find_adapter_file(
            pretrained_model_name_or_path, subfolder, **cls._split_kwargs(kwargs)[0]
        )
        if path is not None:
            config._file = read_adapter_file(path)
        return config

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """As PEFT's, and completes what was saved beside it: the adapter file's metadata and the model card.

        Raises:
            ValueError: if the weights were just saved as a pickle, which is removed.
        """
        described, self._description = self._description, None
        if described is not None:
            complete_adapter_file(save_directory, described)
        super().save_pretrained(save_directory, **kwargs)
        if described is not None:
            write_card(save_directory, OUR_CARD, self.to_dict())


def checked_indices(indices: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """expert_indices with ascending lists of plain integers.

    Raises:
        ValueError: if it is no dict of patterns to lists of different ids, or chooses no expert at all.
    """
    if not isinstance(indices, Mapping):
        raise ValueError(
            f"expert_indices must be a dict of layer patterns to lists of expert ids, got {indices!r}."
        )
    found = {}
    for pattern, experts in indices.items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"expert_indices: {pattern!r} is no path or regular expression ({error})."
            ) from error
        ids = (
            list(experts)
            if isinstance(experts, Iterable) and not isinstance(experts, str)
            else None
        )
        # index(): numpy's integers and tensors of one number are welcome, and written as numbers
        if ids is None or not all(hasattr(e, "__index__") and not isinstance(e, bool) for e in ids):
            raise ValueError(
                f"expert_indices[{pattern!r}] must be a list of expert ids, got {experts!r}."
            )
        ids = sorted(index(e) for e in ids)
        if len(set(ids)) < len(ids) or (ids and ids[0] < 0):
            raise ValueError(
                f"expert_indices[{pattern!r}] must name experts from 0 up, each once, got {experts!r}."
            )
        found[pattern] = ids
    if not any(found.values()):
        raise ValueError(
            f"expert_indices={indices!r} chooses no expert; leave it unset for every expert."
        )
    return found
