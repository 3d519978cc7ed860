"""What an adapter trains and saves beside A and B, by PEFT's own rules.

These are modules that are trained whole (modules_to_save), rows of embeddings (trainable tokens),
biases, and copies of the base's embeddings.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper, _get_module_names_tied_with_embedding
from torch import nn

from ..config import MoELoraConfig
from ..experts.layout import ExpertsLayout
from ..experts.stored import shape_of
from ..files.text import quoted
from ..parallel import zero

Shape = tuple[int, ...]

_DELTA = "token_adapter.trainable_tokens_delta"
# where PEFT's wrappers keep the base module
_BASE = (".token_adapter.base_layer", ".original_module", ".base_layer")
# where a file may hold the weights of an embedding: as they are, or inside one of the wrappers
_TRAINED = "modules_to_save."
_PLACES = ("", "base_layer.", "original_module.", _TRAINED, "token_adapter.base_layer.")


class Tensors(NamedTuple):
    """The tensors of an adapter file beside A and B. Keys have no prefix of PEFT.

    Attributes:
        needed: key -> shape, of tensors that the file must hold.
        allowed: key -> shape, of tensors that it may hold.
        free: beginnings of keys whose tensors have no shape that is known here.
    """

    needed: Mapping[str, Shape]
    allowed: Mapping[str, Shape]
    free: tuple[str, ...]


class Beside:
    """What a configuration trains beside its targets, in one model.

    Args:
        model: the model; it may have other adapters already.
        config: the configuration of a new adapter.
    Attributes:
        modules: path -> module, of the model as it is without adapters.
        saved: path -> module, of the modules that are trained and saved whole.
        tokens: path -> ids, of the embeddings with trained rows.
        tied: path -> ids, of the heads whose rows are those of a tied embedding; no file holds
            them.
    """

    def __init__(self, model: nn.Module, config: MoELoraConfig) -> None:
        self.model = model
        self.config = config
        self.modules = dict(_base_modules(model))
        self.saved = self._named(self._saved_entries())
        self.tokens: dict[str, list[int]] = {}
        self.tied: dict[str, list[int]] = {}
        self._find_tokens()

    def _named(self, entries: Collection[str]) -> dict[str, nn.Module]:
        """The modules that PEFT takes for named: an entry may begin inside a name."""
        ends = tuple(entries)
        return {key: module for key, module in self.modules.items() if key.endswith(ends)}

    def _saved_entries(self) -> list[str]:
        # PEFT moves entries that are tied to the embedding into a list of their own
        tied = getattr(self.config, "modules_to_tie", None) or ()
        return [*(self.config.modules_to_save or ()), *tied]

    def _token_entries(self) -> dict[str, list[int]]:
        indices = self.config.trainable_token_indices
        if isinstance(indices, dict):
            return indices
        if indices is None:
            return {}
        path = self._path_of("get_input_embeddings")
        return {path or "embed_tokens": indices}

    def _find_tokens(self) -> None:
        for entry, ids in self._token_entries().items():
            for path in self._named([entry]):
                self.tokens[path] = list(ids)
        embedding = self._path_of("get_input_embeddings")
        if embedding not in self.tokens:
            return
        config = getattr(self.model, "config", None)
        if not getattr(config, "tie_word_embeddings", False):
            return
        for name in _get_module_names_tied_with_embedding(self.model):
            path = _base_path(name)
            ids = self.tokens[embedding]
            if self.tokens.get(path, ids) == ids:
                self.tokens.pop(path, None)
                self.tied[path] = ids

    def _path_of(self, getter: str) -> str | None:
        """Path of the input or output embedding; None if the model has none."""
        try:
            found = getattr(self.model, getter)()
        except (AttributeError, NotImplementedError):
            return None
        if found is None:
            return None
        base = base_module(found)
        return next((path for path, module in self.modules.items() if module is base), None)

    # ---- checks --------------------------------------------------------------------------------

    def check(self, experts: Mapping[str, ExpertsLayout], others: Collection[str]) -> None:
        """Check what PEFT would refuse only after it changed the model, or would leave out.

        Args:
            experts: path -> layout, of the experts modules that get A and B.
            others: paths of the other modules that get A and B.
        Raises:
            ValueError: if an entry matches no module, if a module would be trained in two ways, if
                a token has no row, or if biases of experts would have to be trained.
        """
        self._check_biases(experts)
        targets = [*experts, *others]
        # the head of a task is named by PEFT itself, in two ways of which one matches
        optional = (*SEQ_CLS_HEAD_NAMES, "qa_outputs")
        if self.config._file is None:
            for entry in self._saved_entries():
                if entry not in optional:
                    self._check_entry("modules_to_save", entry)
        for entry in self._token_entries():
            self._check_entry("trainable_token_indices", entry)
        for path in self.saved:
            self._check_unadapted("modules_to_save", path)
        for path, ids in (*self.tokens.items(), *self.tied.items()):
            self._check_tokens(path, ids, targets)

    def _check_biases(self, experts: Mapping[str, ExpertsLayout]) -> None:
        if self.config.bias == "none":
            return
        for path, layout in experts.items():
            names = [projection.bias for projection in layout.projections.values()]
            if any(names):
                raise ValueError(
                    f"bias={self.config.bias!r} would have to train the biases {names} of {path}, "
                    "but the biases of adapted experts stay as they are. Leave bias unset, or "
                    "train the experts whole with modules_to_save instead of an adapter."
                )

    def _check_entry(self, field: str, entry: str) -> None:
        if not self._named([entry]):
            names = {self._path_of("get_input_embeddings"), self._path_of("get_output_embeddings")}
            raise ValueError(
                f"{field}: {quoted(entry)} matches no module of the model; its embeddings are "
                f"called {sorted(name for name in names if name)}. Correct the entry, or remove it."
            )

    def _check_tokens(self, path: str, ids: list[int], targets: Collection[str]) -> None:
        if path in self.saved or path in targets:
            other = "target_modules"
            if path in self.saved:
                other = "modules_to_save"
            remedy = "Take one of the two out of the configuration"
            if path in self.tied:
                remedy += ", or train a base whose head has a weight of its own"
            raise ValueError(
                f"trainable_token_indices trains rows of {path}, which {other} names too. {remedy}."
            )
        self._check_unadapted("trainable_token_indices", path)
        weight = getattr(self.modules[path], "weight", None)
        if not isinstance(weight, torch.Tensor) or len(shape_of(weight)) != 2:
            raise ValueError(
                f"trainable_token_indices: {path} is a {type(self.modules[path]).__name__}, which "
                "has no rows of tokens; name an embedding or a head."
            )
        repeated = len(set(ids)) < len(ids)
        if repeated or max(ids) >= shape_of(weight)[0]:
            raise ValueError(
                f"trainable_token_indices must name rows of {path}, each once, from 0 to "
                f"{shape_of(weight)[0] - 1}; got {quoted(ids)}. If the tokens are new, call "
                "model.resize_token_embeddings first."
            )

    def check_tokens_of(self, name: str, other: "Beside") -> None:
        """Check that another adapter has trained rows in the same embeddings.

        PEFT looks for rows of every adapter in every embedding that has rows of one.

        Args:
            name: name of the other adapter.
            other: what the other adapter trains beside its targets.
        Raises:
            ValueError: if it has not.
        """
        if {*self.tokens, *self.tied} != {*other.tokens, *other.tied}:
            raise ValueError(
                f"trainable_token_indices: adapter {quoted(name)} trains rows of "
                f"{sorted(other.tokens)}, this one of {sorted(self.tokens)}, and PEFT can neither "
                "save nor load one beside the other. Let both train rows of the same embeddings, "
                "or load each adapter into a model of its own."
            )

    def _check_unadapted(self, field: str, path: str) -> None:
        """Check that no other adapter has A and B on a module."""
        module = self.model.get_submodule(path)
        if isinstance(module, BaseTunerLayer):
            raise ValueError(
                f"{field}: another adapter has A and B on {path}, and PEFT cannot train the "
                "same module in two ways; delete that adapter first, or load each adapter into a "
                "model of its own."
            )

    # ---- tensors -------------------------------------------------------------------------------

    def tensors(self, targets: Collection[str]) -> Tensors:
        """The tensors that a file of this adapter holds beside A and B.

        Args:
            targets: paths of the modules that get A and B.
        """
        needed = {}
        for path, module in self.saved.items():
            for name, tensor in module.state_dict(keep_vars=True).items():
                needed[f"{path}.{name}"] = shape_of(tensor)
        for path, ids in self.tokens.items():
            needed[f"{path}.{_DELTA}"] = self._delta_shape(path, ids)
        needed |= self._biases(targets)
        allowed: dict[str, Shape] = {}
        free = []
        for path in self._embeddings():
            shapes = self._copies(path)
            if shapes is None:
                free.append(f"{path}.")
            else:
                allowed |= shapes
        return Tensors(needed, allowed, tuple(free))

    def _delta_shape(self, path: str, ids: list[int]) -> Shape:
        weight = self.modules[path].weight
        assert isinstance(weight, torch.Tensor), "tokens are checked to be rows of a matrix"
        return (len(ids), shape_of(weight)[1])

    def _biases(self, targets: Collection[str]) -> dict[str, Shape]:
        """The biases that PEFT trains and saves with bias="all" or bias="lora_only"."""
        shapes: dict[str, Shape] = {}
        if self.config.bias == "none":
            return shapes
        for path, module in self.modules.items():
            bias = dict(module.named_parameters(recurse=False)).get("bias")
            if bias is None:
                continue
            if path in targets:
                shapes[f"{path}.base_layer.bias"] = shape_of(bias)
            elif self.config.bias == "all":
                shapes |= {key: shape_of(bias) for key in self._unadapted_bias(path)}
        return shapes

    def _unadapted_bias(self, path: str) -> Iterator[str]:
        """Keys of the bias of a module without A and B; a module that is saved whole has two."""
        for saved in self.saved:
            if f"{path}.".startswith(f"{saved}."):
                inner = path.removeprefix(saved)
                yield f"{saved}.original_module{inner}.bias"
                yield f"{saved}.modules_to_save{inner}.bias"
                return
        yield f"{path}.bias"

    def _embeddings(self) -> set[str]:
        """Paths of the modules whose weights PEFT may save as they are in the base."""
        getters = ("get_input_embeddings", "get_output_embeddings")
        return {path for path in map(self._path_of, getters) if path}

    def base_tensor(self, key: str) -> torch.Tensor | None:
        """The tensor of the base into which PEFT loads a copy of an embedding; None for others."""
        for path in self._embeddings():
            for place in _PLACES:
                name = key.removeprefix(f"{path}.{place}")
                state = self.modules[path].state_dict(keep_vars=True)
                if name != key and name in state and place != _TRAINED:
                    tensor = state[name]
                    if zero.is_partitioned(tensor):
                        return zero.whole(tensor)
                    return tensor
        return None

    def _copies(self, path: str) -> dict[str, Shape] | None:
        """The tensors with which PEFT saves an embedding; None if their shapes are not known."""
        state = self.modules[path].state_dict(keep_vars=True)
        # a quantized head has packed weights and further tensors
        if not all(isinstance(t, torch.Tensor) and t.is_floating_point() for t in state.values()):
            return None
        shapes = {
            f"{path}.{place}{name}": shape_of(tensor)
            for place in _PLACES
            for name, tensor in state.items()
        }
        if path in self.tied:
            shapes[f"{path}.{_DELTA}"] = self._delta_shape(path, self.tied[path])
        return shapes


def _base_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of the model as it is without adapters."""
    base = base_module(module)
    yield path, base
    for name, child in base.named_children():
        yield from _base_modules(child, f"{path}.{name}".removeprefix("."))


def base_module(module: nn.Module) -> nn.Module:
    """The module inside PEFT's layers and wrappers."""
    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module


def _base_path(path: str) -> str:
    """The path that a module has without PEFT's wrapper around it."""
    for end in _BASE:
        path = path.removesuffix(end)
    return path
