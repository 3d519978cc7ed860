"""Values that stand where they do not belong: numbers, words and JSON of any shape."""

import json
from typing import NamedTuple

from hypothesis import strategies as st

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# fmt: off
NUMBERS = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**63, 10**12, 10**400, -(2**63), 0.5, 1e-300, 1e308, -0.0, 4.0]),
    st.sampled_from([float("nan"), float("inf"), True, False]),
)
WORDS = st.sampled_from([
    "", "experts", "down", "q_proj", "gate", "lm_head", "all-linear", "cpu", "false",
    # no regular expressions, or ones that take long
    "(", "(?i)experts", "[0", "*", "a{9}{9}{9}", "(a+)+$", r"(.*\.)*x", ".*",
    # paths, and what a terminal or a file system minds
    "../..", "/dev/zero", "/", "\x1b[2J", "\ud800", "\u202e", "a\nb", "x" * 3000,
])
# fmt: on
JSON = st.recursive(
    st.one_of(st.none(), NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=4,
)


class Damage(NamedTuple):
    """What is done to an adapter's folder.

    Attributes:
        what: the damage in words, for messages.
        apply: called with the folder.
        hidden: whether no reader can see it: other values, which another adapter could have.
    """

    what: str
    apply: object
    hidden: bool = False

    def __repr__(self):
        return self.what


def short(value):
    text = repr(value)
    if len(text) < 120:
        return text
    return f"{text[:100]}... ({len(text)} characters)"


def text_of(value):
    """JSON as a file has it; Python's NaN and infinity are written as they are."""
    return json.dumps(value)
