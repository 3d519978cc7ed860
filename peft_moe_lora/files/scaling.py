"""scaling = lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA."""

import math


def scaling_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    return lora_alpha / _divisor(r, use_rslora)


def alpha_of(scaling: float, r: int, use_rslora: bool) -> float:
    """The lora_alpha that gives a scaling."""
    return tidy(scaling * _divisor(r, use_rslora))


def is_same(one: float, other: float) -> bool:
    """Whether two scalings differ by rounding at most."""
    return math.isclose(one, other, rel_tol=1e-6)


def tidy(alpha: float) -> float:
    """A number as a person would write it: 32, not 32.000000000000004."""
    rounded = float(f"{alpha:.12g}")
    if rounded.is_integer():
        return int(rounded)
    return rounded


def _divisor(r: int, use_rslora: bool) -> float:
    if use_rslora:
        return math.sqrt(r)
    return r
