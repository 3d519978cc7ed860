"""The `sitecustomize` of every Python process below `peft-moe-lora run`.

`run` copies this file to a folder of its own, so it imports the standard library alone. A process
that never runs experts of PEFT's `target_parameters` imports nothing more. The first of these
experts that a process runs calls `apply_to_peft`.
"""

import functools
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

_HERE = str(Path(__file__).parent)
_OF_PEFT = "peft.tuners.lora.layer"


class _Waiting:
    """A finder that waits for the module of PEFT with the class `ParamWrapper`."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _OF_PEFT:
            return None
        sys.meta_path.remove(cls)  # type: ignore[arg-type]  # a finder may be a class
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                _follow(spec.loader)
                return spec
        return None


def _follow(loader: Any) -> None:
    """Let a loader apply at the first use what it has loaded."""
    run = loader.exec_module

    def run_and_wait(module: ModuleType) -> None:
        run(module)
        wrapper = getattr(module, "ParamWrapper", None)
        # PEFT has the class since 0.17
        if wrapper is not None:
            _apply_at_first_use(wrapper)

    loader.exec_module = run_and_wait


def _apply_at_first_use(wrapper: Any) -> None:
    """Replace PEFT's forward of experts' parameters by one that calls `apply_to_peft` first."""
    own = vars(wrapper)["forward"]

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # where the program has called apply_to_peft itself, this is PEFT's own code
        if vars(wrapper)["forward"] is first:
            wrapper.forward = own
            _apply()
            return wrapper.forward(self, *args, **kwargs)
        return own(self, *args, **kwargs)

    first = sys.modules["torch"].compiler.disable(forward)
    wrapper.forward = first


def _apply() -> None:
    try:
        from peft_moe_lora import apply_to_peft
    except ImportError as error:
        print(
            f"peft-moe-lora run: {sys.executable} cannot import peft_moe_lora ({error}), so PEFT's "
            "own code runs in this process; install it there.",
            file=sys.stderr,
        )
        return
    apply_to_peft()


def _run_the_next() -> None:
    """Run the `sitecustomize` that Python would have found without this one."""
    sys.path[:] = [folder for folder in sys.path if folder != _HERE]
    spec = PathFinder.find_spec("sitecustomize")
    if spec is None or spec.loader is None:
        return
    module = ModuleType("sitecustomize")
    module.__spec__ = spec
    module.__file__ = spec.origin
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, _Waiting)  # type: ignore[arg-type]  # a finder may be a class
    _run_the_next()
