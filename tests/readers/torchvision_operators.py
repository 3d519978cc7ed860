"""Names of torchvision's operators, so that it can be imported without its compiled library."""

import importlib.util
from pathlib import Path

import torch

_NAMES = (
    "nms",
    "qnms",
    "qroi_align",
    "roi_align",
    "roi_pool",
    "ps_roi_align",
    "ps_roi_pool",
    "deform_conv2d",
    "_roi_align_backward",
    "_roi_pool_backward",
    "_ps_roi_align_backward",
    "_ps_roi_pool_backward",
    "_deform_conv2d_backward",
)
# kept, because the operators go with it
_LIBRARIES: list[torch.library.Library] = []


def define_operators() -> None:
    """Give torch the operators' names where a torchvision of another build of torch is installed.

    Calling such an operator raises.
    """
    if _LIBRARIES or _is_whole_or_absent():
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in _NAMES:
        library.define(f"{name}(Tensor x) -> Tensor")
    _LIBRARIES.append(library)


def _is_whole_or_absent() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    try:
        torch.ops.load_library(Path(spec.origin).parent / "_C.so")
    except OSError:
        return False
    return True
