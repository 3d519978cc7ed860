"""PEFT's layers on the linear layers of bitsandbytes, in 4 and 8 bits, with the faster forward."""

from peft.tuners.lora import bnb
from torch import nn

from .fast_linear import FastForward


class Linear4bit(FastForward, bnb.Linear4bit):
    """`peft.tuners.lora.Linear4bit`."""


class Linear8bitLt(FastForward, bnb.Linear8bitLt):
    """`peft.tuners.lora.Linear8bitLt`."""


SUBCLASSES: dict[type[nn.Module], type[nn.Module]] = {
    bnb.Linear4bit: Linear4bit,
    bnb.Linear8bitLt: Linear8bitLt,
}
