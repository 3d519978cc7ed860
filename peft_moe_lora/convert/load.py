"""PEFT's own adapters on a model's experts, loaded into our layers."""

import tempfile
from pathlib import Path

from peft import PeftModel
from torch import nn

from .base import describe_base
from .convert import convert_adapter


def load_peft_adapter(
    model: nn.Module,
    path,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    b_layout: str = "auto",
    **kwargs,
) -> PeftModel:
    """Load an adapter written by PEFT, or by anything else in a format that is known, as one of ours.

    It is converted in a temporary folder and loaded from there: the fused layers run it, it trains on and is saved as
    ours. Attention and other layers come along.

    Args:
        model: the base model the adapter belongs to; changed in place, as by `PeftModel.from_pretrained`.
        path: folder of the adapter: PEFT's `target_parameters`, per-expert tensors, SGLang's, or ours.
        adapter_name: its name in the model.
        is_trainable: whether it is to be trained further.
        b_layout: order of lora_B, see `convert_adapter`.
        kwargs: passed on to `PeftModel.from_pretrained`.
    Returns: the model with the adapter.
    Raises:
        AdapterError: if the adapter is damaged or for another model; the model is then as it was.
        RefusedError: if the adapter can be read in two ways.
    """
    config = getattr(model, "config", None)
    base = describe_base(
        model,
        getattr(model, "name_or_path", "") or type(model).__name__,
        getattr(config, "model_type", ""),
    )
    with tempfile.TemporaryDirectory() as folder:
        ours = Path(folder, "adapter")
        convert_adapter(path, ours, to="moe_lora", base_config=base, b_layout=b_layout)
        return PeftModel.from_pretrained(
            model, ours, adapter_name, is_trainable=is_trainable, **kwargs
        )
