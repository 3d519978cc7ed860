"""What a configuration means, and what the model with such an adapter computes, written out.

Nothing here is the package's. Which layers are adapted, and their ranks and scalings, follow from
what PEFT documents; the model is the base on W + scaling * B A.
"""

import math
import re
from typing import NamedTuple

import torch
from torch.func import functional_call

PREFIX = "base_model.model."


class Refused(Exception):
    """A configuration must be refused; the argument is the field to name."""


class Meant(NamedTuple):
    """The adapter of one module: its rank and scaling, and of experts the chosen ones."""

    r: int
    scaling: float
    chosen: tuple[int, ...] | None = None


def meaning(fields, names):
    """Path -> Meant of every module that gets an adapter.

    Raises:
        Refused: if fields choose what is not there, or contradict each other.
    """
    targeted = [path for path in names.modules if _is_target(path, fields, names)]
    faults = list(_faults(fields, names, targeted))
    try:
        fields = _by_module(fields, names, targeted)
    except Refused as error:
        faults.append(str(error))
    if faults:
        raise Refused("|".join(faults))
    meant = {path: _meant(fields, path, _chosen(fields, path, names)) for path in targeted}
    return {path: value for path, value in meant.items() if value.chosen != ()}


def _faults(fields, names, targeted):
    """The fields that an error may blame."""
    experts = [path for path in targeted if path in names.experts]
    materialized = fields.get("backend") == "materialize"
    if isinstance(fields["target_modules"], str) and "layers_to_transform" in fields:
        yield "layers_to_transform|layers_pattern"
    if not targeted:
        yield "target_modules|exclude_modules|layers_to_transform"
    if materialized and fields.get("recompute"):
        yield "recompute"
    if materialized and experts and not names.on_interface:
        yield "backend"
    embedding_is_taken = names.embedding in targeted or _is_saved(names.embedding, fields)
    if fields.get("trainable_token_indices") and embedding_is_taken:
        yield "trainable_token_indices"
    if fields.get("bias", "none") != "none" and any(names.biases[path] for path in experts):
        yield "bias"
    indices = fields.get("expert_indices")
    if indices is None:
        return
    unused = set(indices) - {_first(indices, path) for path in experts}
    chosen = [e for path in experts for e in _chosen(fields, path, names)]
    if unused or not any(indices.values()):
        yield "expert_indices"
    elif chosen and max(chosen) >= names.experts[experts[0]]["down"].num_experts:
        yield "expert_indices"


def _by_module(fields, names, targeted):
    """Fields without entries of rank_pattern and alpha_pattern that name parameters of experts.

    Raises:
        Refused: if the parameters of one module have different values.
    """
    found = dict(fields)
    projections = fields.get("target_projections") or ["gate_up", "down"]
    for name, default in {"rank_pattern": fields["r"], "alpha_pattern": 8}.items():
        pattern = fields.get(name) or {}
        default = fields.get("lora_alpha", default) if name == "alpha_pattern" else default
        values = {}
        for path in targeted:
            stacks = names.experts.get(path, {})
            given = [
                _first_of_two(pattern, path, f"{path}.{stacks[projection].parameter}", targeted)
                for projection in projections
                if stacks
            ] or [_first(pattern, path)]
            different = {pattern.get(key, default) for key in given}
            if len(different) > 1:
                raise Refused(name)
            (values[f"^{re.escape(path)}"],) = different
        found[name] = values
    return found


def _first_of_two(pattern, module, parameter, targeted):
    """The first key that matches the module, or its parameter if it matches no target."""
    for key in pattern:
        if _first([key], module):
            return key
        if _first([key], parameter) and not any(_first([key], path) for path in targeted):
            return key
    return None


def _chosen(fields, path, names):
    """Ascending ids of the experts that get an adapter; None for all, and beside experts."""
    indices = fields.get("expert_indices")
    if indices is None or path not in names.experts:
        return None
    return tuple(sorted(indices.get(_first(indices, path), ())))


def _meant(fields, path, chosen):
    r = _value(fields, "rank_pattern", path, fields["r"])
    alpha = _value(fields, "alpha_pattern", path, fields.get("lora_alpha", 8))
    divisor = math.sqrt(r) if fields.get("use_rslora") else r
    return Meant(r, alpha / divisor, chosen)


def _value(fields, name, path, default):
    pattern = fields.get(name) or {}
    return pattern.get(_first(pattern, path), default)


def _first(pattern, path):
    """The first key that matches a path: a path, the end of one, or a regular expression."""
    for key in pattern:
        if re.fullmatch(rf"(.*\.)?({key})", path):
            return key
    return None


def _ends_with(path, entries):
    return any(path == entry or path.endswith(f".{entry}") for entry in entries)


def _is_target(path, fields, names):
    if path not in names.targets:
        return False
    excluded = fields.get("exclude_modules") or ()
    if isinstance(excluded, str) and re.fullmatch(excluded, path):
        return False
    if not isinstance(excluded, str) and _ends_with(path, excluded):
        return False
    # as in PEFT, a module that is saved whole gets no adapter
    if _is_saved(path, fields):
        return False
    targets = fields["target_modules"]
    if targets is None:
        return path in names.experts and _is_in_layers(path, fields)
    if targets == "all-linear":
        return path in names.all_linear or path in names.experts
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    if path in targets:
        return True
    return _ends_with(path, targets) and _is_in_layers(path, fields)


def _is_saved(path, fields):
    saved = fields.get("modules_to_save") or ()
    return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in saved)


def _is_in_layers(path, fields):
    layers = fields.get("layers_to_transform")
    if layers is None:
        return True
    found = re.search(r"\.layers\.(\d+)\.", path)
    layers = [layers] if isinstance(layers, int) else layers
    return found is not None and int(found[1]) in layers


# ---- the model -----------------------------------------------------------------------------------


def parameters(meant, fields, names):
    """{name of lora_A: name of the base's parameter} of the adapter's pairs."""
    projections = fields.get("target_projections") or ["gate_up", "down"]
    found = {}
    for path in meant:
        if path == names.embedding:
            found[f"{PREFIX}{path}.lora_embedding_A.default"] = f"{path}.weight"
            continue
        if path not in names.experts:
            found[f"{PREFIX}{path}.lora_A.default.weight"] = f"{path}.weight"
            continue
        for projection in projections:
            stack = names.experts[path][projection]
            name = f"{PREFIX}{path}.lora_A.default.{projection}"
            found[name] = f"{path}.{stack.parameter}"
    return found


def other_side(name):
    """The name of B, from the name of A."""
    return name.replace(".lora_A.", ".lora_B.").replace("embedding_A", "embedding_B")


def path_of(name):
    return name.removeprefix(PREFIX).partition(".lora_")[0]


def updates(pairs, meant, names):
    """{name of lora_A: scaling * B A}: [E, N, K] of experts, [N, K] of a linear layer.

    Args:
        pairs: {name of lora_A: (A, B)}.
        meant: path -> Meant.
        names: of the base's modules.
    """
    found = {}
    for name, (A, B) in pairs.items():
        path = path_of(name)
        r, scaling, chosen = meant[path]
        if path == names.embedding:
            # A is [r, V] and B [H, r], the weight [V, H]
            found[name] = (scaling * B @ A).T
            continue
        if path not in names.experts:
            found[name] = scaling * B @ A
            continue
        E = names.experts[path]["down"].num_experts
        held = list(range(E) if chosen is None else chosen)
        found[name] = torch.stack([_of_expert(e, held, r, scaling, A, B) for e in range(E)])
    return found


def _of_expert(e, held, r, scaling, A, B):
    """[N, K]: expert-major, the s-th of the held experts has the s-th block of r."""
    if e not in held:
        return torch.zeros(B.shape[0], A.shape[1], dtype=A.dtype)
    own = slice(held.index(e) * r, (held.index(e) + 1) * r)
    return scaling * B[:, own] @ A[own]


def weights(base, found, targets):
    """{parameter of the base: W + update}.

    Args:
        base: the plain model.
        found: as `updates` gives it.
        targets: as `parameters` gives it.
    """
    named = dict(base.model.named_parameters())
    changed = {}
    for name, update in found.items():
        stacks = base.names.experts.get(path_of(name), {}).values()
        if any(stack.transposed for stack in stacks):
            update = update.mT
        changed[targets[name]] = named[targets[name]] + update
    return changed


def logits(base, changed, ids):
    out = functional_call(base.model, changed, (), {"input_ids": ids, "use_cache": False})
    return out.logits
