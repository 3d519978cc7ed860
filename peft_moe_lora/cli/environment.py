"""`peft-moe-lora env`."""

import platform
from importlib.metadata import PackageNotFoundError, version

from .answers import Answer

# packages whose versions `env` prints
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "safetensors")


def env() -> Answer:
    """Print the versions, the GPU and the backend in use, for bug reports."""
    import torch

    from .. import __version__
    from ..functional import select_backend

    found: dict[str, str | None] = {
        "peft_moe_lora": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for name in PACKAGES:
        found[name] = _version(name)
    found |= {"cuda": None, "gpu": None}
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda")
        major, minor = torch.cuda.get_device_capability()
        gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        found["cuda"] = torch.version.cuda
        found["gpu"] = f"{gpus}, capability {major}.{minor}"
    found["backend"] = select_backend("auto", device)
    return Answer(found)


def _version(name: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
