"""Text of a file in messages, on a terminal and in a model card.

What a file says may hold escape sequences of a terminal, line breaks or megabytes of text. A
message shows such characters as escapes, and shortens long text. The name of a base model may be
an address with a password or a token in it, which is left out.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches

# longest text that is quoted in a message, and longest name that a tensor or module may have
QUOTED = 200
LONGEST_NAME = 1000

# scheme://user:password@, scheme://token@ and user:password@, up to the @; lengths are bounded so
# that no text takes long
_USER = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,20}://)?"
    r"(?:(?<=://)[^/\s@]{0,300}|[^\s/@:'\"`]{1,100}:[^\s@]{1,300})@"
)
# ...?token=..., and other parameters of an address that give access
_PARAMETER = re.compile(
    r"([?&;#][^=&;#\s]{0,60}(?:token|key|secret|passw|auth|sig|credential)[^=&;#\s]{0,60}=)"
    r"[^&;#\s'\"]+",
    re.IGNORECASE,
)
# tokens of Hugging Face, GitHub, GitLab and others
_TOKEN = re.compile(
    r"\b(?:hf_|gh[a-z]_|github_pat_|glpat-|sk-|xox[a-z]-)[A-Za-z0-9_-]{20,}", re.IGNORECASE
)
# characters beyond those that are shown in which a credential is looked for
_MARGIN = 1000


def shown(value: object, limit: int = QUOTED) -> str:
    """A value as printable text of one line; ordinary text stays as it is.

    Args:
        value: a string, or another value, which is shown as `repr` writes it.
        limit: the longest text that is shown whole, in characters.
    """
    text = _text(value)
    length = len(text)
    if length > limit:
        half = limit // 2
        head = without_credentials(text[: half + _MARGIN])
        tail = without_credentials(text[-half - _MARGIN :])
        text = f"{head[:half]} ... {tail[len(tail) - half :]}"
    else:
        text = without_credentials(text)
    if not text.isprintable():
        text = "".join(_escaped(character) for character in text)
    if length > limit:
        text += f" ({length} characters)"
    return text


def quoted(value: object, limit: int = QUOTED) -> str:
    """A value of a file as `repr` writes it, shortened."""
    if isinstance(value, str):
        # repr escapes what is not printable
        return shown(repr(value), limit)
    return shown(value, limit)


def without_credentials(text: str) -> str:
    """A text without the passwords and tokens of addresses; other text stays as it is."""
    text = _USER.sub(lambda match: match["scheme"] or "", text)
    text = _PARAMETER.sub(r"\1...", text)
    return _TOKEN.sub("...", text)


def nearest(given: str, known: Iterable[str]) -> str:
    """A question that names what a misspelt name may mean; empty if nothing is near.

    Args:
        given: the name, or the end of a path.
        known: names, or whole paths, of which as many parts are compared as were given.
    """
    parts = given.count(".") + 1
    names = sorted({".".join(path.split(".")[-parts:]) for path in known})
    found = get_close_matches(given[:LONGEST_NAME], names, n=1)
    if not found:
        return ""
    return f" Did you mean {quoted(found[0])}?"


def is_plain(name: str) -> bool:
    """Whether a name is printable and no longer than the names of real modules."""
    return name.isprintable() and len(name) <= LONGEST_NAME


def _text(value: object) -> str:
    if isinstance(value, str | Exception):
        return str(value)
    try:
        return repr(value)
    except (RecursionError, ValueError):
        # nested too deeply, or an integer of too many digits
        return f"a value of type {type(value).__name__} that is too large to print"


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")
