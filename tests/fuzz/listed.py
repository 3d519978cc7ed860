"""Damage that random draws rarely make, by name, and what becomes of an adapter in our format."""

import json
import os
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from fuzz.damaged_tensors import _change_header, _split
from fuzz.values import CONFIG, WEIGHTS, Damage
from peft_moe_lora import MoELoraConfig

# ---- the weights ---------------------------------------------------------------------------------


def _cut_at(position):
    """Keep the bytes before a position, a function of the header's length and the file's."""

    def apply(folder):
        path = folder / WEIGHTS
        content = path.read_bytes()
        header = int.from_bytes(content[:8], "little")
        path.write_bytes(content[: position(header, len(content))])

    return apply


_CUTS = {
    "within the length": lambda header, size: 5,
    "after the length": lambda header, size: 8,
    "in the header": lambda header, size: 8 + header // 2,
    "before the header's last byte": lambda header, size: 7 + header,
    "after the header": lambda header, size: 8 + header,
    "in the first tensor": lambda header, size: 9 + header,
    "before the last byte": lambda header, size: size - 1,
}


def _twice_in_header(what):
    """Say a key of the header's text twice; `what` gives (text, its repetition)."""

    def change(header):
        text = json.dumps(header)
        old, new = what(header, text)
        assert text.count(old) >= 1
        return text.replace(old, new, 1)

    return _change_header(change)


def _shape_twice(header, text):
    return '"shape": [', '"shape": [2, 2], "shape": ['


def _metadata_twice(header, text):
    return '{"__metadata__"', '{"__metadata__": {"format": "pt"}, "__metadata__"'


def _description_twice(folder):
    def change(header):
        held = header["__metadata__"]
        if "peft_moe_lora" in held:
            held["peft_moe_lora"] = '{"routers": ["x"], ' + held["peft_moe_lora"][1:]
        return header

    _change_header(change)(folder)


def _new_state(change):
    """Write other tensors under the same metadata."""

    def apply(folder):
        path = folder / WEIGHTS
        header, _ = _split(path.read_bytes())
        state = change(load_file(path))
        held = {name: tensor.contiguous().clone() for name, tensor in state.items()}
        save_file(held, path, header.get("__metadata__"))

    return apply


def _one_expert(times):
    """One expert less (-1) or more (1) in every stack of one module's A and B."""

    def change(state):
        first = sorted(name for name in state if "experts" in name)[0]
        module = first.partition("lora_")[0]
        for name in state:
            if not name.startswith(module) or state[name].ndim != 2:
                continue
            along = 0 if "lora_A" in name else 1
            size = state[name].shape[along]
            kept = state[name].narrow(along, 0, size - 4 if times < 0 else size)
            more = [state[name].narrow(along, 0, 4)] if times > 0 else []
            state[name] = torch.cat([kept, *more], along)
        return state

    return change


def _all_to(dtype):
    return lambda state: {name: tensor.to(dtype) for name, tensor in state.items()}


def _a_to(dtype):
    return lambda state: {n: t.to(dtype) if "lora_A" in n else t for n, t in state.items()}


# ---- the configuration ---------------------------------------------------------------------------


def _text(change):
    """Change the text of the configuration, in bytes."""

    def apply(folder):
        path = folder / CONFIG
        path.write_bytes(change(path.read_bytes()))

    return apply


def _field(name, value):
    return _text(lambda text: json.dumps(json.loads(text) | {name: value}).encode())


def _of_another_adapter(folder):
    MoELoraConfig(r=2, lora_alpha=4, target_modules=["experts"]).save_pretrained(folder)


# ---- the files -----------------------------------------------------------------------------------


def _linked(name):
    def apply(folder):
        real = folder / f"real {name}"
        (folder / name).rename(real)
        (folder / name).symlink_to(real.name)

    return apply


def _behind_a_link(folder):
    real = folder / "real"
    real.mkdir()
    for name in (WEIGHTS, CONFIG):
        os.replace(folder / name, real / name)
        (folder / name).symlink_to(real / name)


class Listed(NamedTuple):
    """A damage, and what every entry must make of it: "right", "refused", or either of the two."""

    apply: object
    becomes: str = "refused"
    hidden: bool = False

    @property
    def damage(self):
        return Damage("listed", self.apply, self.hidden)


def _behind(written):
    """Put text at the end of the configuration."""
    return _text(lambda text: text.rstrip()[:-1] + written + b"}")


def _before(written):
    """Put text at the beginning of the configuration."""
    return _text(lambda text: b"{" + written + text.lstrip()[1:])


LISTED = {
    **{f"cut {name}": Listed(_cut_at(position)) for name, position in _CUTS.items()},
    "a shape said twice": Listed(_twice_in_header(_shape_twice)),
    "metadata said twice": Listed(_twice_in_header(_metadata_twice)),
    "routers said twice": Listed(_description_twice),
    "an expert less": Listed(_new_state(_one_expert(-1))),
    "an expert more": Listed(_new_state(_one_expert(1))),
    "fp8": Listed(_new_state(_all_to(torch.float8_e4m3fn))),
    "A in fp8": Listed(_new_state(_a_to(torch.float8_e5m2))),
    "int8": Listed(_new_state(_all_to(torch.int8))),
    "a rank said twice": Listed(_before(b'"r": 9, ')),
    "an unknown field twice": Listed(_before(b'"x": null, "x": null, ')),
    "a field in Latin-1": Listed(_behind(b', "revision": "\xe9"')),
    "UTF-16": Listed(_text(lambda text: text.decode().encode("utf-16"))),
    "UTF-8 with a mark": Listed(_text(lambda text: b"\xef\xbb\xbf" + text)),
    "a million lists": Listed(_behind(b', "x": ' + b"[" * 10**6 + b"]" * 10**6)),
    "alpha 1e400": Listed(_behind(b', "alpha_pattern": {"experts": 1e400}')),
    "alpha 10**400": Listed(_field("alpha_pattern", {"experts": 10**400})),
    "a rank of 5000 digits": Listed(_behind(b', "r_": ' + b"1" * 5000)),
    "NUL in a target": Listed(_field("target_modules", ["experts\0", "q_proj"]), "either"),
    "NUL in the base": Listed(_field("base_model_name_or_path", "a\0b"), "right"),
    "a surrogate in the base": Listed(_field("base_model_name_or_path", "\ud800"), "right"),
    "no version": Listed(_field("peft_version", "banana"), "right"),
    "a newer version": Listed(_field("peft_version", "99.0.0"), "right"),
    "a newer format": Listed(_field("format_version", 3)),
    "another layout": Listed(_field("layout", "rank_major")),
    "a newer field": Listed(_field("use_new_thing", True)),
    "a newer field, unset": Listed(_field("use_new_thing", None), "right"),
    "of another adapter": Listed(_of_another_adapter),
    "weights behind a link": Listed(_linked(WEIGHTS), "right"),
    "configuration behind a link": Listed(_linked(CONFIG), "right"),
    "both behind links": Listed(_behind_a_link, "right"),
}
