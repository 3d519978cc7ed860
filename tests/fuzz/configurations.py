"""Random configurations: the fields of a MoELoraConfig, as a user may write them."""

import re
from typing import Any, NamedTuple

from hypothesis import strategies as st

from fuzz.bases import FAMILIES, ROUTER, names_of
from peft_moe_lora.files.field_rules import RULES

# field -> a value that must be refused by the field's name
# fmt: off
WRONG = [
    ("r", 0), ("r", -1), ("r", 2.0), ("r", "4"), ("r", True), ("r", None), ("r", 2**31),
    ("lora_alpha", float("nan")), ("lora_alpha", float("inf")), ("lora_alpha", "8"),
    ("lora_alpha", 10**400), ("lora_alpha", None),
    ("rank_pattern", {"experts": 0}), ("rank_pattern", {"experts": 1.5}), ("rank_pattern", [3]),
    ("rank_pattern", {"experts": None}), ("rank_pattern", {"(": 2}),
    ("alpha_pattern", {"experts": float("nan")}), ("alpha_pattern", {"experts": "2"}),
    ("alpha_pattern", {"*": 2}), ("alpha_pattern", "experts"),
    ("expert_indices", {}), ("expert_indices", {"experts": []}), ("expert_indices", [0, 1]),
    ("expert_indices", {"experts": [0, 0]}), ("expert_indices", {"experts": [-1]}),
    ("expert_indices", {"experts": [99]}), ("expert_indices", {"experts": 3}),
    ("expert_indices", {"experts": ["0"]}), ("expert_indices", {"experts": [0.0]}),
    ("expert_indices", {"no_such": [0]}), ("expert_indices", {"[": [0]}),
    ("target_modules", ["experts", "no_such"]), ("target_modules", "no_such"),
    ("target_modules", r".*\.(experts"), ("target_modules", []),
    ("target_projections", []), ("target_projections", ["up"]),
    ("target_projections", ["down", "down"]),
    ("backend", "cuda"), ("backend", None), ("fast_linear", 1),
    ("lora_dropout", 1.0), ("lora_dropout", -0.5), ("lora_dropout", float("nan")),
    ("init_lora_weights", "pissa"), ("init_lora_weights", "orthogonal"),
    ("init_lora_weights", "none"), ("init_lora_weights", 3),
    ("use_dora", True), ("lora_bias", True), ("target_parameters", ["experts.down_proj"]),
    ("layout", "rank_major"), ("format_version", 99),
    ("peft_type", "IA3"), ("task_type", "no_such"), ("auto_mapping", []), ("peft_version", 21),
    ("base_model_name_or_path", 3), ("revision", {}), ("inference_mode", "no"),
    ("use_rslora", "yes"), ("recompute", None), ("keep_implementation", 1), ("bias", "some"),
    ("fan_in_fan_out", 0), ("ensure_weight_tying", {}), ("exclude_modules", 3),
    ("modules_to_save", [""]), ("layers_to_transform", [-1]), ("layers_pattern", {}),
    ("trainable_token_indices", []), ("loftq_config", []), ("runtime_config", {}),
    ("megatron_core", []), ("qalora_group_size", 0), ("peft_type_from", 3),
    *((name, {}) for name, rule in RULES.items() if rule.feature),
]
# fmt: on
# fields of which no right value but the default is drawn -> why
NOT_DRAWN = {
    "peft_type": "set by the class",
    "peft_type_from": "set by the class",
    "layout": "set by the class",
    "format_version": "set by the class",
    "peft_version": "set by PEFT",
    "auto_mapping": "set by PEFT",
    "runtime_config": "PEFT uses it for DoRA alone",
    "inference_mode": "True trains nothing",
    "fan_in_fan_out": "PEFT sets it to False where these models have linear layers",
    "target_parameters": "in the tests of PEFT's words",
    "loftq_config": "PEFT leaves it out",
    "megatron_core": "PEFT uses it beside a feature that is refused",
    "qalora_group_size": "PEFT uses it beside a feature that is refused",
    **{name: "a feature that is refused" for name, rule in RULES.items() if rule.feature},
}


class Drawn(NamedTuple):
    """A configuration of one family.

    Attributes:
        family: the base model's family.
        fields: what MoELoraConfig gets.
        wrong: name of the field that must be refused; None if all fields are right in themselves.
        dtype: name of the dtype that the adapter is saved in.
        seed: of the adapter's values.
    """

    family: str
    fields: dict[str, Any]
    wrong: str | None
    dtype: str
    seed: int


ALPHAS = st.one_of(
    st.integers(1, 16),
    st.sampled_from([0.5, 1.75, 3.3, -2, 1e-3, 1000]),
)


def _some(values, most=3):
    """A list of different values in any order; order counts in patterns."""
    return st.lists(st.sampled_from(values), min_size=1, max_size=most, unique=True)


def _suffix(path, names):
    return ".".join(path.split(".")[-names:])


def _expert_keys(names):
    """Keys that match experts modules: paths, ends of paths, regular expressions."""
    paths = list(names.experts)
    return [
        "experts",
        *paths,
        *(_suffix(path, 4) for path in paths),
        r"layers\.\d+\..*experts",
        r"[^0]*1\..*",
        r".*experts",
        r"layers\.(0|1)\.\w+\.experts",
    ]


def _beside(names):
    """Keys that match routers, linear layers, the embedding and the head."""
    return sorted(
        {_suffix(path, 1) for path in names.targets - set(names.experts)}
        | {names.linears[-1], names.routers[0], _suffix(names.linears[0], 2)}
    )


@st.composite
def _targets(draw, family):
    names = names_of(family)
    paths = list(names.experts)
    form = draw(st.sampled_from(["names", "names", "every", "paths", "pattern", "linears", "all"]))
    if form == "every":
        return None
    if form == "all":
        return "all-linear"
    if form == "linears":
        return draw(_some(_beside(names)))
    beside = []
    if draw(st.booleans()):
        beside = draw(_some(_beside(names), most=4))
    if form == "names":
        return list(draw(st.permutations(["experts", *beside])))
    if form == "paths":
        return [
            draw(st.sampled_from([*paths, _suffix(paths[0], 4), _suffix(paths[-1], 3)])),
            *beside,
        ]
    ends = "|".join(["experts", *(re.escape(_suffix(name, 1)) for name in beside)])
    return draw(st.sampled_from([rf".*\.({ends})", rf"model\.layers\.[12]\..*\b({ends})"]))


def _indices(family):
    names = names_of(family)
    ids = st.lists(st.integers(0, 5), max_size=4, unique=True)
    return st.dictionaries(st.sampled_from(_expert_keys(names)), ids, min_size=1, max_size=3)


def _pattern(family, values):
    names = names_of(family)
    keys = st.sampled_from([*_expert_keys(names), *_beside(names)])
    return st.dictionaries(keys, values, min_size=1, max_size=4)


def right_values(family):
    """Field -> values that are right for any adapter of a family."""
    names = names_of(family)
    router = ROUTER.get(family, "gate")
    embedding = _suffix(names.embedding, 1)
    saved = st.sampled_from([[router], ["lm_head"], [embedding], [router, "lm_head"]])
    # fmt: off
    return {
        "lora_alpha": ALPHAS,
        "use_rslora": st.booleans(),
        "rank_pattern": _pattern(family, st.integers(1, 6)),
        "alpha_pattern": _pattern(family, ALPHAS),
        "expert_indices": _indices(family),
        "target_projections": st.sampled_from([["gate_up"], ["down"], ["down", "gate_up"]]),
        "backend": st.sampled_from(["auto", "torch", "materialize"]),
        "recompute": st.booleans(),
        "fast_linear": st.booleans(),
        "init_lora_weights": st.sampled_from([True, False, "gaussian"]),
        "lora_dropout": st.just(0.0),
        "layers_to_transform": st.sampled_from([1, [0, 1], [1]]),
        "exclude_modules": st.sampled_from([["q_proj"], [router], r".*\.0\..*", ["0.mlp.experts"]]),
        "modules_to_save": saved,
        "trainable_token_indices": st.sampled_from([[3, 5], [60], {embedding: [4, 3]}]),
        "bias": st.sampled_from(["none", "lora_only", "all"]),
        "keep_implementation": st.booleans(),
        "ensure_weight_tying": st.booleans(),
        "task_type": st.just("CAUSAL_LM"),
        "base_model_name_or_path": st.sampled_from(["", "of/a-hub"]),
        "revision": st.sampled_from(["main", "v1"]),
    }
    # fmt: on


@st.composite
def _fields(draw, family):
    optional = right_values(family)
    chosen = {name: values for name, values in optional.items() if draw(st.integers(0, 2)) == 0}
    fields = draw(st.fixed_dictionaries({"r": st.integers(1, 6), **chosen}))
    fields["target_modules"] = draw(_targets(family))
    if "layers_to_transform" in fields and draw(st.booleans()):
        fields["layers_pattern"] = draw(st.sampled_from(["layers", ["h", "layers"], []]))
    return fields


@st.composite
def configurations(draw):
    """A `Drawn`; one in six has a field that must be refused."""
    family = draw(st.sampled_from(FAMILIES))
    fields = draw(_fields(family))
    wrong = None
    if draw(st.integers(0, 5)) == 0:
        wrong, value = draw(st.sampled_from(WRONG))
        fields[wrong] = value
    return Drawn(
        family=family,
        fields=fields,
        wrong=wrong,
        dtype=draw(st.sampled_from(["float32", "float32", "bfloat16", "float16"])),
        seed=draw(st.integers(0, 2**16)),
    )
