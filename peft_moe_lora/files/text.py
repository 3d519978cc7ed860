"""Text of a file in messages, on a terminal and in a model card.

What a file says may hold escape sequences of a terminal, line breaks or megabytes of text. A
message shows such characters as escapes, and shortens long text.
"""

# longest text that is quoted in a message, and longest name that a tensor or module may have
QUOTED = 200
LONGEST_NAME = 1000


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
        text = f"{text[:half]} ... {text[length - half :]}"
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
