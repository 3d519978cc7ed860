"""The programs that serve adapters together with their base model, and the ranks they accept."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Server:
    """A program that serves adapters.

    Attributes:
        name: the program's name.
        command: the command that starts it, with the fields {base}, {rank} and {adapter}; other
            braces are doubled.
        ranks: the values that its maximum rank can have, ascending; empty if it accepts any rank.
    """

    name: str
    command: str
    ranks: tuple[int, ...] = ()

    def allocated(self, rank: int) -> int | None:
        """The maximum rank to start it with for an adapter of `rank`; None if that is too high."""
        if not self.ranks:
            return rank
        return next((allowed for allowed in self.ranks if allowed >= rank), None)


VLLM = Server(
    "vLLM",
    "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules adapter={adapter}",
    (1, 8, 16, 32, 64, 128, 256, 320, 512),
)
SGLANG = Server(
    "SGLang",
    "python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {rank}"
    " --lora-paths adapter={adapter}",
)


def mixed_vllm(stacked: bool) -> Server:
    """vLLM as it is started for an adapter in the layout that is not its own for the model.

    Args:
        stacked: whether the adapter holds all experts in one tensor (3-D).
    """
    is_3d = "false"
    if stacked:
        is_3d = "true"
    entry = f'{{{{"name": "adapter", "path": "{{adapter}}", "is_3d_lora_weight": {is_3d}}}}}'
    command = (
        "vllm serve {base} --enable-lora --max-lora-rank {rank} --enable-mixed-moe-lora-format"
        f" --lora-modules '{entry}'"
    )
    return replace(VLLM, command=command)
