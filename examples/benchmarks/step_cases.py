"""The cases of train_step.py: a batch, and how its training steps run.

4x2048                         4 sequences of 2048 tokens, eager
4x2048+experts+liger           with checkpointing under `keep_experts`, and Liger
4x2048+liger+vocabulary=151936
"""

from dataclasses import dataclass
from typing import NamedTuple

from cases import QWEN3_30B

VOCABULARY = 32768
SLICE = QWEN3_30B | {"vocab_size": VOCABULARY}
# kinds of checkpointing; without one of them there is none
CHECKPOINTING = ("plain", "experts")
VARIANTS = ("compile", "layers", "liger", "one-thread")
# what a run measures unless it is told otherwise
DEFAULT = (
    "4x2048",
    "4x2048+plain",
    "4x2048+experts",
    "1x2048",
    "1x2048+plain",
    "1x2048+experts",
    "1x2048+one-thread",
    "4x2048+compile",
    "1x2048+compile",
    "4x2048+layers",
    "1x2048+layers",
    "4x2048+liger",
    "4x2048+plain+liger",
    "4x2048+experts+liger",
    "4x2048+vocabulary=151936",
    "4x2048+liger+vocabulary=151936",
    "4x2048+experts+liger+vocabulary=151936",
)
TINY = ("4x32", "4x32+plain", "4x32+experts", "1x32")


class Batch(NamedTuple):
    """So many sequences of so many tokens."""

    sequences: int
    length: int

    def __str__(self) -> str:
        return f"{self.sequences}x{self.length}"


@dataclass(frozen=True)
class StepCase:
    """What the steps of a case are.

    Attributes:
        batch: sequences x tokens.
        checkpointing: "no", or one of CHECKPOINTING.
        compiled: whether the model is compiled as a whole.
        layers: whether each of its decoder layers is compiled by itself.
        liger: whether Liger's norms, rope and loss run.
        one_thread: whether backward runs in the thread that asks for it, and not in autograd's own.
        vocabulary: tokens of the model's vocabulary.
    """

    batch: Batch
    checkpointing: str = "no"
    compiled: bool = False
    layers: bool = False
    liger: bool = False
    one_thread: bool = False
    vocabulary: int = VOCABULARY

    def __str__(self) -> str:
        kind = f"checkpointing: {self.checkpointing}, {self.variant}"
        return f"{self.batch}, {kind}, vocabulary {self.vocabulary}"

    @property
    def variant(self) -> str:
        """How the model runs, in words."""
        on = (self.compiled, self.layers, self.liger, self.one_thread)
        words = [word for word, is_on in zip(VARIANTS, on, strict=True) if is_on]
        return "+".join(words) or "eager"

    @property
    def compiles(self) -> bool:
        """Whether anything is compiled."""
        return self.compiled or self.layers


def read_case(text: str, vocabulary: int) -> StepCase:
    """The case that a word of the command line names.

    Args:
        text: such as 4x2048+plain+liger.
        vocabulary: where the word names none.
    Raises:
        ValueError: if the word is none of a case.
    """
    batch, *words = text.split("+")
    checkpointing = [word for word in words if word in CHECKPOINTING]
    variants = {word for word in words if word in VARIANTS}
    sizes = [word.removeprefix("vocabulary=") for word in words if word.startswith("vocabulary=")]
    if variants >= {"compile", "layers"}:
        raise ValueError(f"{text} is no case: compile the model as a whole or its layers, not both")
    known = len(checkpointing) + len(variants) + len(sizes)
    if known != len(words) or len(checkpointing) > 1 or len(sizes) > 1:
        raise ValueError(
            f"{text} is no case: after sequences x tokens, one of {CHECKPOINTING}, "
            f"any of {VARIANTS} and one vocabulary=N may follow, each once, joined by +"
        )
    return StepCase(
        read_batch(batch),
        next(iter(checkpointing), "no"),
        *[word in variants for word in VARIANTS],
        int(next(iter(sizes), vocabulary)),
    )


def read_batch(text: str) -> Batch:
    """A batch written as sequences x tokens.

    Raises:
        ValueError: if it is not written so, or has no sequence or less than two tokens.
    """
    sequences, _, length = text.partition("x")
    batch = Batch(int(sequences), int(length))
    if batch.sequences < 1 or batch.length < 2:
        raise ValueError(f"{text} has no sequence or less than two tokens")
    return batch


def in_groups(cases: list[StepCase]) -> list[list[StepCase]]:
    """The cases of each model, in the order in which they are measured.

    Liger changes transformers' functions, and so every model of the process, and is not taken off.
    So the models without Liger come first.
    """
    models = dict.fromkeys((case.liger, case.vocabulary) for case in cases)
    return [
        [case for case in cases if (case.liger, case.vocabulary) == model]
        for model in sorted(models, key=lambda model: model[0])
    ]
