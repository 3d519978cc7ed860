"""Counts the experts modules that PEFT's own configuration adapts and this package computes.

`peft-moe-lora run` asks for the counts in the environment variable `VARIABLE`, which names a folder
that exists. Every process that computes experts writes a file into it.
"""

import json
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from weakref import WeakSet

import torch
from torch import nn

from ..functional import select_backend

# `cli/run.py`, which must not import this package, has the same name
VARIABLE = "PEFT_MOE_LORA_COUNTS"


class _Counting:
    """The counts of this process, which are written whenever they change.

    They are not left to the end of the process, because a process may be killed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = os.getpid()
        self._seen: WeakSet[nn.Module] = WeakSet()
        self._by_backend: Counter[str] = Counter()

    def awaits(self, module: nn.Module) -> bool:
        return module not in self._seen

    def note(self, module: nn.Module, device: torch.device) -> None:
        if self._process != os.getpid():
            # a fork has the counts of its parent
            self.__init__(self._folder)  # type: ignore[misc]  # it starts again
        if module in self._seen:
            return
        self._seen.add(module)
        self._by_backend[select_backend("auto", device)] += 1
        # no count is worth the training that it counts
        with suppress(OSError):
            path = self._folder / f"{self._process}.json"
            path.write_text(json.dumps(self._by_backend), encoding="utf-8")


_counting: _Counting | None = None


def start_if_asked() -> None:
    """Count from now on, if the environment names a folder."""
    global _counting
    folder = os.environ.get(VARIABLE)
    if folder and _counting is None:
        _counting = _Counting(Path(folder))


def awaits(module: nn.Module) -> bool:
    """Whether an experts module has yet to be counted."""
    return _counting is not None and _counting.awaits(module)


def note(module: nn.Module, device: torch.device) -> None:
    """Count an experts module that this package has computed on a device; once for each module."""
    if _counting is not None:
        _counting.note(module, device)
