"""Loads an adapter in any known format into a model, as an adapter of this package."""

import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from ..files.tensor_file import FilePath
from .base import describe_base
from .convert import convert_adapter
from .formats import OURS


def load_peft_adapter(
    model: nn.Module,
    path: FilePath,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    b_layout: str = "auto",
    **kwargs: Any,
) -> PeftModel:
    """Load an adapter of PEFT, or of another program in a known format, into a fused model.

    The adapter is converted into a temporary folder and loaded from there. The fused layers run it.
    It can be trained further, and it is saved in this package's own format. LoRA on attention and
    other layers is loaded too.

    Args:
        model: the base model that the adapter belongs to; changed in place, as by
            `PeftModel.from_pretrained`.
        path: folder of the adapter, in any format that `convert_adapter` reads.
        adapter_name: the adapter's name in the model.
        is_trainable: whether it will be trained further.
        b_layout: order of lora_B, see `convert_adapter`.
        kwargs: passed on to `PeftModel.from_pretrained`.
    Returns: the model with the adapter.
    Raises:
        AdapterError: if the adapter is damaged or for another model; the model is then unchanged.
        RefusedError: if the adapter can be read in two ways.
    """
    name = getattr(model, "name_or_path", "") or type(model).__name__
    base = describe_base(model, name, getattr(model, "config", None))
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder, "adapter")
        convert_adapter(path, converted, to=OURS.name, base_config=base, b_layout=b_layout)
        return PeftModel.from_pretrained(
            model, converted, adapter_name, is_trainable=is_trainable, **kwargs
        )
