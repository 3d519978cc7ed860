"""Random damage to the weights of an adapter: header, metadata and tensors."""

import json

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fuzz.values import JSON, PREFIX, WEIGHTS, Damage, short, text_of

_KEY = "peft_moe_lora"


def _split(content):
    """The header as an object, and the bytes of the tensors."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _change_header(change):
    """A function of the folder; change(header) returns a header, or its text."""

    def apply(folder):
        path = folder / WEIGHTS
        header, rest = _split(path.read_bytes())
        header = change(header)
        text = header if isinstance(header, str) else text_of(header)
        encoded = text.encode()
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + rest)

    return apply


# ---- the header ----------------------------------------------------------------------------------


def _set(field, value):
    def change(header, name):
        header[name][field] = value
        return header

    return change


def _transpose(header, name):
    header[name]["shape"].reverse()
    return header


def _replace_entry(value):
    return lambda header, name: header | {name: value}


def _add_empty(size):
    """A tensor without elements may have any size."""

    def change(header, name):
        end = max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
        return header | {
            f"{name}2": {"dtype": "F32", "shape": [0, size], "data_offsets": [end, end]}
        }

    return change


def _share_bytes(header, name):
    return header | {f"{name}2": dict(header[name])}


def _say_twice(header, name):
    return text_of(header)[:-1] + "," + text_of({name: header[name]})[1:]


_DTYPES = ["I32", "U32", "F64", "BF16", "BOOL", "F8_E4M3", "C64", "X", "", "I8"]
_SIZES = [0, 1, 7, 2**31, 2**40, 2**63 - 1, 2**64 - 1]


@st.composite
def headers(draw):
    which = draw(st.integers(0, 99))
    value = draw(JSON)
    size = draw(st.sampled_from(_SIZES))
    dtype = draw(st.sampled_from(_DTYPES))
    # fmt: off
    changes = {
        f"shape {short(value)}": _set("shape", value),
        f"shape [{size}, 4]": _set("shape", [size, 4]),
        "shape transposed": _transpose,
        f"dtype {dtype}": _set("dtype", dtype),
        f"offsets to {size}": _set("data_offsets", [0, size]),
        f"entry {short(value)}": _replace_entry(value),
        f"an empty tensor [0, {size}] more": _add_empty(size),
        "two tensors share bytes": _share_bytes,
        "said twice": _say_twice,
    }
    # fmt: on
    what = draw(st.sampled_from([*changes, "length"]))
    if what == "length":
        return Damage(f"header: its length is {size}", _lie_about_length(size))

    def change(header):
        names = sorted(name for name in header if name != "__metadata__")
        return changes[what](header, names[which % len(names)])

    return Damage(f"header, tensor {which}: {what}", _change_header(change))


def _lie_about_length(size):
    def apply(folder):
        path = folder / WEIGHTS
        path.write_bytes(size.to_bytes(8, "little") + path.read_bytes()[8:])

    return apply


# ---- the metadata --------------------------------------------------------------------------------

_TEXTS = ["null", "[]", "{", "5", '"x"', "[" * 3000, "9" * 5000, "{}", ""]
_FIELDS = ["experts", "routers", "layout", "format_version", "linears", "new"]
_INNER = ["num_experts", "experts", "down", "gate_up", "r", "scaling", "in_features", "new"]


@st.composite
def metadata(draw):
    value = draw(JSON)
    text = draw(st.sampled_from(_TEXTS))
    field = draw(st.sampled_from(_FIELDS))
    inner = draw(st.sampled_from(_INNER))
    # fmt: off
    changes = {
        "gone": lambda held: None,
        f"all of it {short(value)}": lambda held: value,
        f"one more, {short(text)}": lambda held: held | {text or "name": text},
        f"the description {short(text)}": lambda held: held | {_KEY: text},
        f"{field} {short(value)}": _describe(lambda said: said | {field: value}),
        f"{inner} of a module {short(value)}": _describe(_of_module(inner, value)),
    }
    # fmt: on
    what = draw(st.sampled_from(sorted(changes)))

    def change(header):
        held = changes[what](header.pop("__metadata__", {}))
        return header if held is None else header | {"__metadata__": held}

    return Damage(f"metadata: {what}", _change_header(change))


def _describe(change):
    """Change what our own format describes; other formats get such a description."""

    def apply(held):
        said = json.loads(held.get(_KEY, "{}"))
        return held | {_KEY: text_of(change(said))}

    return apply


def _of_module(inner, value):
    """Replace an entry of the first module, or of one of its projections."""

    def change(said):
        module = next(iter(said.setdefault("experts", {"experts": {}}).values()))
        places = [module, *(place for place in module.values() if isinstance(place, dict))]
        place = next((place for place in places if inner in place), module)
        place[inner] = value
        return said

    return change


# ---- tensors -------------------------------------------------------------------------------------

_VALUES = [float("nan"), float("inf"), float("-inf"), 1e39, -1e300]
# fmt: off
_TORCH_DTYPES = [
    "float64", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "int32", "bool",
    "uint8", "complex64",
]
_RENAMES = {
    "no prefix": lambda name: name.removeprefix(PREFIX),
    "two prefixes": lambda name: PREFIX + name,
    "the adapter's name": lambda name: name.replace(".lora_A.", ".lora_A.default."),
    "capitals": str.upper,
    "another layer": lambda name: name.replace("layers.1.", "layers.7."),
    "a space": lambda name: f"{name} ",
    "an escape": lambda name: f"{name}\x1b[31m",
    "5000 more": lambda name: name + "x" * 5000,
    "C for A": lambda name: name.replace("lora_A", "lora_C"),
}
# fmt: on


def _put(value):
    def change(state, name):
        # a value that fp32 does not hold comes in fp64
        if abs(value) < float("inf"):
            state = {n: tensor.double() for n, tensor in state.items()}
        state[name].view(-1)[-1] = value
        return state

    return change


def _cut(dim):
    def change(state, name):
        along = dim % state[name].ndim
        return state | {name: state[name].narrow(along, 0, state[name].shape[along] - 1)}

    return change


def _double(dim):
    def change(state, name):
        return state | {name: torch.cat([state[name]] * 2, dim % state[name].ndim)}

    return change


def _again(new):
    def change(state, name):
        # a name that stays as it is would only give its tensor other values
        return {new(name): 2 * state[name], **state}

    return change


def _without(state, name):
    return {n: tensor for n, tensor in state.items() if n != name}


@st.composite
def tensors(draw):
    which = draw(st.integers(0, 99))
    value = draw(st.sampled_from(_VALUES))
    dtype = draw(st.sampled_from(_TORCH_DTYPES))
    rename = draw(st.sampled_from(sorted(_RENAMES)))
    dim = draw(st.integers(0, 1))
    to = getattr(torch, dtype)
    new = _RENAMES[rename]
    # fmt: off
    changes = {
        f"a value {value}": _put(value),
        f"dtype {dtype}": lambda state, name: state | {name: state[name].to(to)},
        f"all of dtype {dtype}": lambda state, name: {n: t.to(to) for n, t in state.items()},
        "missing": _without,
        "one more": lambda state, name: state | {f"{PREFIX}{rename}": torch.ones(2, 3)},
        f"name with {rename}": lambda state, name: _without(state, name) | {new(name): state[name]},
        f"all names with {rename}": lambda state, name: {new(n): t for n, t in state.items()},
        f"twice, once with {rename}": _again(new),
        f"cut along {dim}": _cut(dim),
        f"doubled along {dim}": _double(dim),
        "one dimension more": lambda state, name: state | {name: state[name][None]},
        "flat": lambda state, name: state | {name: state[name].flatten()},
        "transposed": lambda state, name: state | {name: state[name].mT},
        "none left": lambda state, name: {},
    }
    # fmt: on
    what = draw(st.sampled_from(sorted(changes)))

    def apply(folder):
        path = folder / WEIGHTS
        header, _ = _split(path.read_bytes())
        state = load_file(path)
        state = changes[what](state, sorted(state)[which % len(state)])
        held = {name: tensor.contiguous().clone() for name, tensor in state.items()}
        save_file(held, path, header.get("__metadata__"))

    # rounded values are values
    hidden = "dtype" in what and dtype in ("bfloat16", "float16")
    return Damage(f"tensor {which}: {what}", apply, hidden)
