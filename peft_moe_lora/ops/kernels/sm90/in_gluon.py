"""Import the launchers of the Gluon kernels, if the installed Triton has what they need.

Gluon is Triton's lower-level language: a kernel names its layouts, its shared memory and its
barriers. It is experimental: its names change between versions of Triton.
"""

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from inspect import signature

logger = logging.getLogger(__name__)

# {module: its names that the kernels use}. "a|b": one of the two is enough; `pieces` uses either
NEEDED = {
    "triton.experimental.gluon": "jit",
    "triton.experimental.gluon.language": """
        BlockedLayout DistributedLinearLayout NVMMADistributedLayout NVMMASharedLayout
        SliceLayout SwizzledSharedLayout allocate_shared_memory arange associative_scan
        atomic_add barrier|thread_barrier cdiv constexpr convert_layout float32 full
        inline_asm_elementwise int16 int32 int64 join load max maximum minimum num_programs
        pointer_type program_id shared_memory_descriptor static_assert static_range store sum
        warp_specialize where zeros""",
    "triton.experimental.gluon.language.nvidia.ampere.async_copy": """
        async_load|async_copy_global_to_shared commit_group mbarrier_arrive wait_group""",
    "triton.experimental.gluon.language.nvidia.hopper": """
        fence_async_shared mbarrier tma warpgroup_mma warpgroup_mma_wait""",
    "triton.experimental.gluon.language.nvidia.hopper.mbarrier": """
        MBarrierLayout arrive expect init wait""",
    "triton.experimental.gluon.language.nvidia.hopper.tma": """
        async_load|async_copy_global_to_shared""",
    "triton.experimental.gluon.nvidia.hopper": "TensorDescriptor",
}
# {(module, function): its parameter that the kernels use}. Triton 3.5 has the name and other
# parameters; drop when the floor is 3.6
PARAMETERS = {("triton.experimental.gluon.language", "warp_specialize"): "functions_and_args"}


def missing() -> str | None:
    """The first thing that the kernels need and Triton does not have, in words; None if none."""
    for module, names in NEEDED.items():
        try:
            found = import_module(module)
        except ImportError as error:
            return str(error)
        for name in names.split():
            if not any(hasattr(found, spelling) for spelling in name.split("|")):
                return f"{module} has no {name}"
    for (module, function), parameter in PARAMETERS.items():
        if parameter not in signature(getattr(import_module(module), function)).parameters:
            return f"{module}.{function} has no {parameter}"
    return None


@cache
def in_gluon(name: str) -> Callable | None:
    """The launcher `name` of the module `name`, or None if Triton does not have what it needs.

    An error while that module is imported is a bug of the module, and is raised.
    """
    lacking = missing()
    if lacking is not None:
        logger.warning(
            "a layer takes up to 15 %% longer on compute capability 9.0 without %s. This kernel "
            "needs Gluon as in Triton 3.6 to 3.9, but here: %s.",
            name,
            lacking,
        )
        return None
    return getattr(import_module(f".{name}", __package__), name)
