"""Adapters with random values, and models on fixed tokens."""

from types import SimpleNamespace

import torch

from fuzz import written_out
from helpers import VOCAB

IDS = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(4))


def logits_of(model):
    """[batch, length, VOCAB], in eval mode."""
    return model.eval()(input_ids=IDS, use_cache=False).logits


def fill(base, drawn, adapted, meant):
    """Give the adapter random values; return what the model must compute.

    Returns: adapted (the model), meant, targets ({lora_A: parameter of the base}), pairs ({lora_A:
        (A, B)}), saved ({parameter of the base: value of a module saved whole}).
    """
    targets = written_out.parameters(meant, drawn.fields, base.names)
    held = {n: p for n, p in adapted.named_parameters() if ".lora_" in n}
    both = {*targets, *map(written_out.other_side, targets)}
    assert set(held) == both, "another set of layers is adapted"
    generator = torch.Generator().manual_seed(drawn.seed)
    pairs = {}
    for name in targets:
        A, B = held[name], held[written_out.other_side(name)]
        r, scaling, chosen = meant[written_out.path_of(name)]
        blocks = 1
        if written_out.path_of(name) in base.names.experts:
            stack = base.names.experts[written_out.path_of(name)]["down"]
            blocks = stack.num_experts if chosen is None else len(chosen)
        assert A.shape[0] == B.shape[1] == r * blocks, f"{name}: another rank, or other experts"
        # an embedding looks its A up, it does not multiply by it
        fan_in = 4 if "embedding" in name else A.shape[1]
        fill_one(A, generator, fan_in**-0.5, drawn.dtype)
        fill_one(B, generator, 0.7 / (abs(scaling) * r**0.5), drawn.dtype)
        pairs[name] = (A, B)
    saved = fill_saved(base, adapted)
    asked = drawn.fields.get("modules_to_save") or ()
    assert all(any(f"{name}." in key for key in saved) for name in asked)
    return SimpleNamespace(adapted=adapted, meant=meant, targets=targets, pairs=pairs, saved=saved)


def fill_saved(base, adapted):
    """Change what is trained whole; return {parameter of the base: its value}."""
    named = dict(base.model.named_parameters())
    saved = {}
    for name, parameter in adapted.named_parameters():
        plain = name.removeprefix(written_out.PREFIX)
        if ".lora_" in name or not parameter.requires_grad:
            continue
        with torch.no_grad():
            parameter.mul_(1.25).add_(0.1)
        value = parameter.detach().clone()
        if plain.endswith("trainable_tokens_delta.default"):
            plain = f"{plain.partition('.token_adapter.')[0]}.weight"
            rows = adapted.peft_config["default"].trainable_token_indices
            if isinstance(rows, dict):
                (rows,) = rows.values()
            value = named[plain].detach().clone().index_copy(0, torch.tensor(rows), value)
        plain = plain.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")
        assert plain in named, f"{name} is trained"
        saved[plain] = value
    return saved


def trained_biases(adapted):
    """{parameter of the base: value} of the biases that are trained in place."""
    found = {}
    for name, parameter in adapted.named_parameters():
        # modules that are saved whole have copies
        copied = ".modules_to_save." in name or ".original_module." in name
        if name.endswith(".bias") and not copied:
            plain = name.removeprefix(written_out.PREFIX).replace(".base_layer.", ".")
            found[plain] = parameter.detach()
    return found


def fill_one(parameter, generator, std, dtype):
    """Random values that the file's dtype holds exactly."""
    values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
    with torch.no_grad():
        parameter.copy_(values.to(getattr(torch, dtype)))
