"""The adapter formats, one file each: how tensors are named and ordered, and what readers accept.

`moe_lora` is our own: A [r*E, K] and B [N, r*E], both expert-major. `peft` is PEFT's
target_parameters, B rank-major: column j*E + e. `per_expert` has 2-D tensors of every expert.
`vllm_3d` is `peft` within the limits of vLLM. `sglang_3d` has A [E, r, K] and B [E, N, r], and so
has `mlx`, in the files and under the names of mlx-lm.
"""

from .format import PREFIX, Format
from .gguf import Gguf
from .mlx import Mlx
from .ours import Ours
from .peft import Peft
from .peft_legacy import LEGACY_NAME
from .peft_order import B_LAYOUTS
from .per_expert import PerExpert
from .sglang_3d import Sglang3d
from .vllm_3d import Vllm3d

__all__ = [
    "B_LAYOUTS",
    "DEFAULT_FORMAT",
    "FORMATS",
    "LEGACY_NAME",
    "OURS",
    "PREFIX",
    "READERS",
    "WRITABLE",
    "Format",
]

OURS = Ours()
_PEFT = Peft()
_PER_EXPERT = PerExpert()
_SGLANG_3D = Sglang3d()

# the formats that can be written and read, by the name that a user gives
FORMATS: dict[str, Format] = {
    form.name: form for form in (OURS, _PEFT, _PER_EXPERT, Vllm3d(), _SGLANG_3D, Mlx())
}
# all that can be written: llama.cpp's files are not read
_GGUF = Gguf()
WRITABLE: dict[str, Format] = {**FORMATS, _GGUF.name: _GGUF}
# the formats whose patterns are compared with a file's keys, the most specific first; vllm_3d
# is missing because it has peft's keys, and mlx because its files are read as sglang_3d
READERS: tuple[Format, ...] = (OURS, _PER_EXPERT, _SGLANG_3D, _PEFT)
# PEFT and most servers read this format
DEFAULT_FORMAT = _PER_EXPERT.name
