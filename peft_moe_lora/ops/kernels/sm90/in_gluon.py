"""Kernels in Gluon, Triton's language of layouts and barriers, where this Triton's is the one they are written in."""

import logging
from functools import cache
from importlib import import_module

logger = logging.getLogger(__name__)


@cache
def in_gluon(name: str):
    """The launcher `name` of the module of that name, or None: Gluon is an experiment of Triton's still."""
    try:
        return getattr(import_module(f".{name}", __package__), name)
    except (ImportError, AttributeError) as error:
        logger.warning(
            "a layer takes up to 15 %% longer, without %s for compute capability 9.0: %s.",
            name,
            error,
        )
        return None
