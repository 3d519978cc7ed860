"""The programs that serve adapters beside their base model, and the ranks they take."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Server:
    """A program that serves adapters.

    Attributes:
        name: as its users write it.
        command: what starts it, with the fields {base}, {rank} and {adapter}.
        ranks: the ranks it can allocate adapters at, ascending; empty where it takes any rank.
    """

    name: str
    command: str
    ranks: tuple[int, ...] = ()

    def allocated(self, rank: int) -> int | None:
        """The rank it has to allocate for an adapter of a rank; None where that is too high."""
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
