"""Random damage to an adapter's folder: its bytes, configuration and files.

Damage to the header, the metadata and the tensors is in `fuzz.damaged_tensors`.
"""

import json
import os
from dataclasses import fields

import torch
from hypothesis import strategies as st

from fuzz.damaged_tensors import headers, metadata, tensors
from fuzz.values import CONFIG, JSON, NUMBERS, WEIGHTS, Damage, short, text_of
from peft_moe_lora import MoELoraConfig


def damages():
    """A `Damage`."""
    return st.one_of(
        _bytes(),
        headers(),
        metadata(),
        tensors(),
        tensors(),
        _fields(),
        _fields(),
        _configurations(),
        _files(),
    )


# ---- bytes ---------------------------------------------------------------------------------------

# kind -> (content, position, what is put in) -> content
_CHANGES = {
    "cut": lambda content, at, more: content[:at],
    "flip": lambda content, at, more: (
        content[:at] + _flipped(content[at], more) + content[at + 1 :]
    ),
    "insert": lambda content, at, more: content[:at] + more + content[at:],
    "drop": lambda content, at, more: content[:at] + content[at + len(more) :],
    "append": lambda content, at, more: content + more,
    "noise": lambda content, at, more: (more * len(content))[: len(content)],
}
_PUT_IN = [b"\0", b"\n", b" ", b"{}", b"\xff" * 8, b"\x01" * 64]


def _flipped(byte, more):
    return bytes([byte ^ (more[0] or 0x20)])


@st.composite
def _bytes(draw):
    name = draw(st.sampled_from([WEIGHTS, WEIGHTS, CONFIG]))
    kind = draw(st.sampled_from(sorted(_CHANGES)))
    share = draw(st.floats(0, 1))
    more = draw(st.sampled_from(_PUT_IN))
    in_header = draw(st.booleans())

    def apply(folder):
        path = folder / name
        content = path.read_bytes()
        length = len(content)
        if name == WEIGHTS and in_header:
            length = 8 + int.from_bytes(content[:8], "little")
        at = int(share * (length - 1))
        path.write_bytes(_CHANGES[kind](content, at, more))

    where = f"{share:.4f} of the {'header' if in_header else 'file'}"
    # a bit of a number makes another number, in the configuration too
    hidden = kind in ("flip", "drop", "insert") and (name == CONFIG or not in_header)
    return Damage(f"bytes of {name}: {kind} {more!r} at {where}", apply, hidden)


# ---- the configuration ---------------------------------------------------------------------------

# other programs' formats say these nowhere else, so another value is another adapter
_MEANING = (
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "lora_B_layout",
    "peft_version",
)
# every field of a configuration, and what other programs write or a newer release might
_FIELDS = [
    *_MEANING,
    *_MEANING,
    *(field.name for field in fields(MoELoraConfig)),
    "no_such_field",
    "unsloth_fused_expert_lora",
]
_PATHS = ["model.layers.1.mlp.experts", "experts", "q_proj", r".*\.0\..*"]
_PATTERNS = st.dictionaries(st.sampled_from(_PATHS), NUMBERS, max_size=2)
# the empty value of each kind turns features on in PEFT
_EMPTY = st.sampled_from([None, False, 0, "", [], {}])
_TEXTS = ["", "{", "{}", "[" * 100_000, '{"a":' * 3000, "9" * 5000, "NaN", "\ufeff{}", "\0"]
_GONE = object()


@st.composite
def _fields(draw):
    field = draw(st.sampled_from(_FIELDS))
    value = draw(st.one_of(JSON, JSON, _PATTERNS, _EMPTY, st.just(_GONE)))

    def apply(folder):
        path = folder / CONFIG
        config = json.loads(path.read_text())
        config.pop(field, None)
        if value is not _GONE:
            config[field] = value
        path.write_text(text_of(config))

    what = "is gone" if value is _GONE else f"is {short(value)}"
    return Damage(f"configuration: {field} {what}", apply, hidden=field in _MEANING)


@st.composite
def _configurations(draw):
    text = draw(st.one_of(JSON.map(text_of), st.sampled_from(_TEXTS)))
    return Damage(
        f"configuration: all of it is {short(text)}",
        lambda folder: (folder / CONFIG).write_text(text),
    )


# ---- files ---------------------------------------------------------------------------------------


def _sparse(path):
    path.touch()
    os.truncate(path, 2**30)


# fmt: off
_KINDS = {
    "missing": lambda path: None,
    "empty": lambda path: path.touch(),
    "a folder": lambda path: path.mkdir(),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a named pipe": os.mkfifo,
    "1 GiB of nothing": _sparse,
    "a pickle": lambda path: torch.save({"x": torch.ones(2)}, path),
}
_NAMES = [
    WEIGHTS, WEIGHTS, CONFIG, CONFIG, "adapter_model.bin", "README.md", "tokenizer.json",
    "added_tokens.json", "special_tokens_map.json",
]
# fmt: on


@st.composite
def _files(draw):
    name = draw(st.sampled_from(_NAMES))
    kind = draw(st.sampled_from(sorted(_KINDS)))

    def apply(folder):
        path = folder / name
        path.unlink(missing_ok=True)
        _KINDS[kind](path)

    return Damage(f"file: {name} is {kind}", apply)
