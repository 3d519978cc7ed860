"""MoELoraConfig: the user's settings, checked before any model is changed."""

import json
from collections.abc import Iterable
from copy import copy
from dataclasses import MISSING, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig, PeftType
from peft.utils import CONFIG_NAME
from peft.utils.other import get_pattern_key

from .experts.families import STACKS_OF
from .experts.layout import PROJECTIONS, ExpertsLayout
from .files.adapter_file import (
    CHOSEN_EXPERTS_VERSION,
    LAYOUT,
    AdapterFile,
    complete_adapter_file,
    find_adapter_file,
    read_adapter_file,
)
from .files.card import OUR_CARD, write_card
from .files.config_fields import (
    HIGHEST_ALPHA,
    HIGHEST_RANK,
    LOWEST_ALPHA,
    checked_indices,
    checked_projections,
    is_alpha,
    is_rank,
)
from .files.field_rules import (
    RULES,
    check_fields,
    check_format,
    check_known,
    check_off,
    stored,
)
from .files.patterns import check_every_key_matches, value_of
from .files.peft_words import names_all_linear, said_in_peft, taken_from
from .files.scaling import scaling_of
from .files.tensor_file import read_json
from .files.text import quoted
from .files.writing import written_files
from .functional import BACKENDS

# a backend beside those of `functional`: the model's own implementation, run on W + scaling * B A
MATERIALIZE = "materialize"

# in adapter_config.json below "peft_type", because PEFT without this package stops at that line
PEFT_TYPE_FROM = (
    "the package peft_moe_lora: `pip install peft-moe-lora`, and `import peft_moe_lora` before "
    "PEFT loads this adapter. PEFT alone stops with KeyError: 'MOE_LORA'."
)


class Saving(NamedTuple):
    """What a saved adapter says, read from the layers of its model.

    Attributes:
        description: the metadata of its file.
        patterns: fields of its configuration, in a form that does not depend on the order of keys.
    """

    description: dict[str, Any]
    patterns: dict[str, Any]


@dataclass
class MoELoraConfig(LoraConfig):
    """Configuration of per-expert LoRA: every field of `peft.LoraConfig`, and those below.

    Every targeted expert e gets its own A[e] and B[e]. Its weight becomes
    W[e] + scaling * B[e] A[e], with scaling = lora_alpha / r (lora_alpha / sqrt(r) with
    use_rslora). Targets that are not experts become PEFT's LoRA layers.

    Args:
        r: rank of each expert's update, at least 1.
        target_modules: names of experts modules and of ordinary layers; None for every experts
            module of the model, or for no module if target_parameters is given. "all-linear", also
            in a list, is every linear layer but the head, and every experts module unless
            target_parameters is given.
        target_parameters: parameters of experts ("experts.down_proj"), as in PEFT. When the adapter
            is added to a model, they become target_modules and target_projections.
        expert_indices: which experts get an adapter, as a dict from experts modules to lists of ids
            0..E-1; None for every expert. A key is the path of a module, the end of a path or a
            regular expression, as in rank_pattern; the first key that matches a module is used. A
            module gets no adapter if no key matches it or if its list is empty. A and B, their
            gradients and the optimizer's state hold only the chosen experts, in ascending order.
        target_projections: which projections of the experts get an adapter, out of "gate_up" (the
            up projection of experts without a gate) and "down"; both by default. A dict gives
            experts modules their own: its keys are as in expert_indices, its values such lists,
            and a module that no key matches gets both.
        backend: "triton" (fused kernels), "torch", or "auto": triton on CUDA devices of compute
            capability 8.0 and newer, else torch. "materialize" computes W + scaling * B A in every
            call, and runs the model's own experts implementation on it.
        recompute: do not keep the pre-activation for backward; backward computes the gate_up
            product again.
        keep_implementation: while the adapter is disabled or merged, run the experts implementation
            that the model's config names, and not this package's kernels.
        fast_linear: compute the adapters of linear layers in the dtype of the activations; False
            for PEFT's own forward, which computes them in the dtype of A and B, fp32.
        peft_type_from: what a reader of adapter_config.json needs to load the adapter; always the
            same sentence.
        layout: order of the tensors in the adapter file. It is written when an adapter is saved
            and checked when it is loaded; users should not set it.
        format_version: version of the adapter file; users should not set it either.
    Raises:
        ValueError: if a value is out of range, or if experts do not support an option. The message
            names the field.
    Source: Hu et al. 2021, arXiv:2106.09685, applied to each expert separately.
    """

    expert_indices: dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Experts that get an adapter, by layer: path or pattern -> ids; "
            "every expert by default."
        },
    )
    target_projections: list[str] | dict[str, list[str]] | None = field(
        default=None,
        metadata={
            "help": 'Projections of the experts that get an adapter: "gate_up", "down", or by '
            "layer: path or pattern -> projections; both by default."
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
    keep_implementation: bool = field(
        default=False,
        metadata={
            "help": "Run the model's own experts implementation while the adapter is disabled or "
            "merged, not this package's kernels."
        },
    )
    fast_linear: bool = field(
        default=True,
        metadata={
            "help": "Compute adapters of linear layers in the dtype of the activations; "
            "False: in fp32, as PEFT does."
        },
    )
    peft_type_from: str = field(
        default=PEFT_TYPE_FROM, metadata={"help": "What is needed to load the adapter."}
    )
    layout: str = field(default=LAYOUT, metadata={"help": "Order of the adapter tensors on disk."})
    format_version: int = field(default=1, metadata={"help": "Version of the adapter file format."})

    def __post_init__(self) -> None:
        # before PEFT's own checks, which take the types for granted and warn about fields that are
        # refused here
        check_fields(vars(self))
        check_off(vars(self))
        self._refuse_unknown()
        for name in RULES.keys() & vars(self).keys():
            setattr(self, name, stored(name, getattr(self, name), self._default_of(name)))
        self._check_start()
        super().__post_init__()
        self.peft_type = PeftType["MOE_LORA"]
        self.peft_type_from = PEFT_TYPE_FROM
        self.target_projections = checked_projections(self.target_projections, PROJECTIONS)
        self._check_numbers()
        self._check_words()
        self._check_backend()
        check_format(vars(self))
        if self.expert_indices is not None:
            self.expert_indices = checked_indices(self.expert_indices)
            self.format_version = max(self.format_version, CHOSEN_EXPERTS_VERSION)
        # two attributes that are not dataclass fields, so they are never written to
        # adapter_config.json: the adapter file that was read with this configuration
        self._file: AdapterFile | None = None
        # what belongs to the adapter file that PEFT saves just before this configuration
        self._saving: Saving | None = None

    def _refuse_unknown(self) -> None:
        """Check that the fields of a newer release of PEFT are unset."""
        for name in vars(self).keys() - RULES.keys():
            value = getattr(self, name)
            if value != self._default_of(name):
                raise ValueError(
                    f"{name}={quoted(value)}: this version knows no such field of LoraConfig; "
                    f"leave {name} unset."
                )

    @classmethod
    def _default_of(cls, name: str) -> object:
        found = cls.__dataclass_fields__[name]
        if found.default_factory is not MISSING:
            return found.default_factory()
        return found.default

    def _check_start(self) -> None:
        start = self.init_lora_weights
        if not isinstance(start, bool) and start != "gaussian":
            raise ValueError(
                f"init_lora_weights={quoted(start)}: experts support True (A as nn.Linear, B "
                'zero), "gaussian" (A normal, B zero) and False (both random).'
            )

    def _check_numbers(self) -> None:
        ranks = {"r": self.r}
        for key, value in (self.rank_pattern or {}).items():
            ranks[f"rank_pattern[{quoted(key)}]"] = value
        for name, r in ranks.items():
            if not is_rank(r):
                raise ValueError(
                    f"{name} must be an integer of at least 1 and at most {HIGHEST_RANK}, got "
                    f"{quoted(r)}."
                )
        alphas: dict[str, float] = {"lora_alpha": self.lora_alpha}
        for key, value in (self.alpha_pattern or {}).items():
            alphas[f"alpha_pattern[{quoted(key)}]"] = value
        for name, alpha in alphas.items():
            if not is_alpha(alpha):
                raise ValueError(
                    f"{name} must be a finite number of a size from {LOWEST_ALPHA:g} to "
                    f"{HIGHEST_ALPHA:g}, or 0; got {quoted(alpha)}."
                )
        dropout = self.lora_dropout
        if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {dropout!r}.")

    def _check_words(self) -> None:
        """Check that PEFT's words do not contradict the fields beside them."""
        given = self.target_projections
        if self.target_parameters and (
            not isinstance(given, list) or set(given) != set(PROJECTIONS)
        ):
            raise ValueError(
                f"target_projections={quoted(given)}: target_parameters names the "
                "projections already; leave one of the two unset."
            )
        for name, is_given in {
            "target_parameters": self.target_parameters,
            "target_modules": names_all_linear(self.target_modules),
        }.items():
            if is_given and self.layers_to_transform not in (None, []):
                raise ValueError(
                    f"layers_to_transform={quoted(self.layers_to_transform)}: it does not choose "
                    f"layers of {name}={quoted(getattr(self, name))}; name the layers in {name} "
                    '("layers.0.mlp.experts..."), and leave layers_to_transform unset.'
                )

    def _check_backend(self) -> None:
        backends = (*BACKENDS, MATERIALIZE)
        if self.backend not in backends:
            raise ValueError(f"backend must be one of {backends}, got {quoted(self.backend)}.")
        if self.backend != MATERIALIZE:
            return
        if self.lora_dropout:
            raise ValueError(
                f'lora_dropout={self.lora_dropout!r}: backend="{MATERIALIZE}" adds B A to the '
                "weights, so A has no input of its own that could be dropped; set lora_dropout=0."
            )
        if self.recompute:
            raise ValueError(
                f'recompute=True: with backend="{MATERIALIZE}" the model\'s experts implementation '
                "decides what is kept for backward; leave recompute unset and use gradient "
                "checkpointing."
            )

    def rank_of(self, key: str) -> int:
        """The rank of the adapter on the module at this path."""
        return value_of(self.rank_pattern, key, self.r)

    def lora_alpha_of(self, key: str) -> float:
        """The lora_alpha of the adapter on the module at this path."""
        return value_of(self.alpha_pattern, key, self.lora_alpha)

    def scaling_of(self, key: str) -> float:
        """The scaling of the adapter on the module at this path."""
        return scaling_of(self.lora_alpha_of(key), self.rank_of(key), self.use_rslora)

    def experts_of(self, key: str, num_experts: int) -> tuple[int, ...] | None:
        """Ascending ids of the experts of a module that get an adapter; None for all, () for none.

        Args:
            key: path of the experts module.
            num_experts: E; every id must be less than E.
        Raises:
            ValueError: if an entry of expert_indices names an expert that the module does not
                have. The message names the entry.
        """
        if self.expert_indices is None:
            return None
        pattern = get_pattern_key(list(self.expert_indices), key)
        chosen = tuple(self.expert_indices.get(pattern, ()))
        if chosen and chosen[-1] >= num_experts:
            raise ValueError(
                f"expert_indices[{quoted(pattern)}] names expert {chosen[-1]}, but {key} has "
                f"{num_experts} experts, 0 to {num_experts - 1}."
            )
        return chosen

    def named_projections_of(self, key: str) -> list[str]:
        """The entries of target_projections for the experts module at this path."""
        given = self.target_projections
        if isinstance(given, dict):
            return value_of(given, key, list(PROJECTIONS))
        return given or list(PROJECTIONS)

    def projections_of(self, key: str, layout: ExpertsLayout) -> list[str]:
        """The projections of the experts module at this path that get an adapter."""
        return layout.targeted(self.named_projections_of(key))

    def check_every_entry_matches(self, keys: Iterable[str]) -> None:
        """Check that every entry of expert_indices and target_projections decides some module.

        Args:
            keys: the paths of all targeted experts modules.
        Raises:
            ValueError: if an entry matches none of these modules, or if an earlier entry matches
                all modules that it matches. The message names the entry.
        """
        paths = list(keys)
        for name in ("expert_indices", "target_projections"):
            pattern = getattr(self, name)
            if isinstance(pattern, dict):
                check_every_key_matches(name, pattern, paths)

    @classmethod
    def from_lora_config(cls, config: LoraConfig, **changes: Any) -> "MoELoraConfig":
        """The configuration of per-expert LoRA that means what a LoraConfig means.

        "all-linear" without target_parameters also means the experts, which PEFT leaves out.

        Args:
            config: a configuration of PEFT's LoRA; it is left unchanged.
            changes: fields that get another value, or that a LoraConfig does not have.
        Raises:
            ValueError: if experts do not support a field, or if the meaning of a field is not
                known. The message names the field.
        """
        return cls(**{**taken_from(config), **changes})

    def to_lora_config(self) -> LoraConfig:
        """The LoraConfig by which PEFT adapts the same layers, experts by their parameters.

        `backend`, `recompute` and `fast_linear` are left out: they say how layers run, not what is
        trained.

        Raises:
            ValueError: if a LoraConfig cannot say what a field says. The message names the field.
        """
        projections = self.target_projections
        if not isinstance(projections, list):
            projections = list(PROJECTIONS)
        parameters = [name for projection in projections for name in STACKS_OF[projection]]
        return LoraConfig(**said_in_peft(self, parameters))

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read adapter_config.json; called by PEFT's `from_pretrained`.

        Raises:
            ValueError: if it is not a JSON object, or if it has fields that are not known.
        """
        check_known(read_json(path_json_file))
        return super().from_json_file(path_json_file, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> "MoELoraConfig":
        """Load a configuration as PEFT does, and also read and check the adapter file next to it.

        A damaged file raises an error here, before a model is changed.

        Raises:
            ValueError: if the file is truncated, a pickle, of an unknown layout or version, or
                holds values that are not finite.
        """
        # PEFT annotates str, but accepts a Path too
        source: Any = pretrained_model_name_or_path
        config = super().from_pretrained(source, subfolder=subfolder, **kwargs)
        hub_kwargs, *_ = cls._split_kwargs(kwargs)
        path = find_adapter_file(source, subfolder, **hub_kwargs)
        if path is not None:
            config._file = read_adapter_file(path)
        return config

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Save the configuration as PEFT does, and complete the adapter file and the model card.

        PEFT saves the adapter file first. Its metadata are added here.

        Raises:
            ValueError: if PEFT has saved the weights as a pickle. The pickle is removed.
            OSError: if a file could not be written, for example because the disk is full.
        """
        # PEFT annotates str, but accepts a Path too
        folder: Any = save_directory
        saving = self._saving
        self._saving = None
        if saving is None:
            with written_files(folder) as new:
                super().save_pretrained(str(new), **kwargs)
                self._restore_order(new / CONFIG_NAME)
            return
        complete_adapter_file(folder, saving.description)
        saved = copy(self)
        for name, pattern in saving.patterns.items():
            setattr(saved, name, pattern)
        with written_files(folder) as new:
            super(MoELoraConfig, saved).save_pretrained(str(new), **kwargs)
        write_card(folder, OUR_CARD, saved.to_dict())

    def _restore_order(self, path: Path) -> None:
        """Give the patterns in a saved configuration their order; PEFT has sorted their keys."""
        content = read_json(path)
        for name in ("rank_pattern", "alpha_pattern", "expert_indices", "target_projections"):
            content[name] = getattr(self, name)
        path.write_text(json.dumps(content, indent=2))
