"""What a tuner changes in the PeftModel around it: four methods of this one instance.

`get_nb_trainable_parameters` counts weights in 4 bits in full, `print_trainable_parameters` also
prints the tuner's summary, `save_pretrained` leaves the old adapter or the new one if it is
interrupted, and `create_or_update_model_card` writes our part of the card again. Other PeftModels
keep PEFT's methods.
"""

import inspect
import math
import os
import shutil
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..experts.decoding import parametrizations
from ..experts.layout import is_experts
from ..experts.stored import UnsupportedExperts, stored_weight
from ..files.card import OUR_CARD, write_card
from ..files.tensor_file import read_json
from ..files.writing import written_files
from ..parallel import zero
from ..parallel.sharding import is_divided

_CARD = "README.md"


class CountWithQuantized:
    """`get_nb_trainable_parameters` of one PeftModel, which counts weights, not stored elements.

    PEFT does so for linear layers in 4 bits. `get_model_status` calls it too.
    """

    def __init__(self, peft_model: PeftModel) -> None:
        self.peft_model = peft_model

    def __call__(self) -> tuple[int, int]:
        trainable, total = type(self.peft_model).get_nb_trainable_parameters(self.peft_model)
        return trainable, total + _beyond_parameters(self.peft_model)


class PrintWithSummary:
    """`print_trainable_parameters` of one PeftModel, with the summary on a second line."""

    def __init__(self, peft_model: PeftModel) -> None:
        self.peft_model = peft_model

    def __call__(self) -> None:
        type(self.peft_model).print_trainable_parameters(self.peft_model)
        # PEFT does not annotate which tuner this is
        tuner: Any = self.peft_model.base_model
        print(tuner.summary())


class CardWithOurs:
    """`create_or_update_model_card` of one PeftModel: our section stays in a card written anew.

    transformers' Trainer writes the card of a saved adapter over it, and then calls this method.
    """

    def __init__(self, peft_model: PeftModel) -> None:
        self.peft_model = peft_model

    def __call__(self, output_dir: str) -> None:
        type(self.peft_model).create_or_update_model_card(self.peft_model, output_dir)
        path = Path(output_dir, CONFIG_NAME)
        if not path.is_file():
            # `MoELoraConfig.save_pretrained` writes the section
            return
        config = read_json(path)
        if config.get("peft_type") == "MOE_LORA":
            write_card(output_dir, OUR_CARD, config)


class SaveWhole:
    """`save_pretrained` of one PeftModel: PEFT's own, but its files take their places at the end.

    PEFT writes weights and configuration one after the other over those that are there. It writes
    them into a hidden folder here. If the model is divided among processes, the first one writes.
    """

    def __init__(self, peft_model: PeftModel) -> None:
        self.peft_model = peft_model

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        save = type(self.peft_model).save_pretrained
        call = inspect.signature(save).bind(self.peft_model, save_directory, *args, **kwargs)
        if is_divided(self.peft_model):
            # every process calls, because the shards have to be gathered
            call.arguments["is_main_process"] = dist.get_rank() == 0
        if zero.partitions(self.peft_model):
            call.arguments["is_main_process"] = dist.get_rank() == 0
            if "state_dict" in kwargs and dist.get_rank() > 0:
                # accelerate gathers a state dict, and gives it to the first process alone
                return
        writes = call.arguments.get("is_main_process", True)
        if not writes or os.path.isfile(save_directory):
            save(*call.args, **call.kwargs)
            return
        with written_files(save_directory) as new:
            self._copy_cards(Path(save_directory), new)
            call.arguments["save_directory"] = str(new)
            save(*call.args, **call.kwargs)

    def _copy_cards(self, folder: Path, new: Path) -> None:
        """Copy the model cards, which PEFT and we update."""
        for subfolder in ("", *self.peft_model.peft_config):
            card = folder / subfolder / _CARD
            if card.is_file():
                (new / subfolder).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(card, new / subfolder / _CARD)


def install_around(tuner: nn.Module) -> None:
    """Replace methods of the PeftModel that will contain a tuner by the classes above.

    A tuner has no reference to its PeftModel. So a global hook of torch waits until the tuner is
    registered as a submodule of a PeftModel.
    """
    waiting = weakref.ref(tuner)

    def on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if isinstance(parent, PeftModel) and child is waiting():
            # only this instance is changed; other PeftModels keep PEFT's methods
            peft_model: Any = parent
            peft_model.get_nb_trainable_parameters = CountWithQuantized(parent)
            peft_model.print_trainable_parameters = PrintWithSummary(parent)
            peft_model.save_pretrained = SaveWhole(parent)
            peft_model.create_or_update_model_card = CardWithOurs(parent)
            handle.remove()

    handle = register_module_module_registration_hook(on_registration)
    # inject_adapter_in_model creates no PeftModel and drops the tuner; the hook then ends too
    weakref.finalize(tuner, handle.remove)


def _beyond_parameters(model: nn.Module) -> int:
    """The weights of quantized experts that are more than the elements of their parameters.

    An element of a parameter holds two 4-bit codes.
    """
    more = 0
    for module in model.modules():
        if not is_experts(module):
            continue
        for name in getattr(module, "parametrizations", ()):
            # weights in other forms are counted as they are
            with suppress(UnsupportedExperts):
                weight = stored_weight(module, name)
                more += math.prod(weight.shape) - parametrizations(module, name).original.numel()
    return more
