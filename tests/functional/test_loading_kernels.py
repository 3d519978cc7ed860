"""The C functions that launch kernels are built in parallel, but one thread at a time loads them.

The kernels are fakes, so no GPU is needed.
"""

import threading
import time

import pytest

from peft_moe_lora.ops.kernels.launching import launch

KERNELS = 8


class Library:
    """Modules of one name, as CPython loads them: a second load writes into the module loaded last.

    Attributes:
        module: the functions of the module that was loaded last.
        files: names of the files that were loaded before.
        most: the most threads that have built at once.
    """

    def __init__(self):
        self.module = {}
        self.files = set()
        self.most = 0
        self.building = 0

    def load(self, src, metadata):
        self.building += 1
        self.most = max(self.most, self.building)
        if src in self.files:
            self.module["launch"] = src
        else:
            self.files.add(src)
            self.module = {"launch": src}
        module = self.module
        # here another thread may run
        time.sleep(0.02)
        self.building -= 1
        return module["launch"]


class Kernel:
    """A kernel of Triton's: `warmup` compiles it, and reading `run` loads its C function."""

    metadata = None

    def __init__(self, src, library):
        self.src = src
        self.library = library
        self.loaded = None

    def warmup(self, *operands, grid, **constants):
        return self

    @property
    def run(self):
        if self.loaded is None:
            self.loaded = self.library.load(self.src, None)
        return self.loaded


@pytest.fixture
def library(monkeypatch):
    found = Library()
    active = type("", (), {"launcher_cls": staticmethod(found.load)})
    monkeypatch.setattr(launch, "driver", type("", (), {"active": active}))
    return found


needs_compiling_ahead = pytest.mark.skipif(
    not launch.COMPILES_AHEAD, reason="this Triton compiles nothing ahead"
)


def compile_at_once(kernels):
    launches = [(kernel, (1, 1, 1), (), (), lambda: ((), (), {})) for kernel in kernels]
    launch._compile_at_once(launches, -1)


@needs_compiling_ahead
def test_every_kernel_gets_its_own_function(library):
    # pairs of kernels share a file, as kernels of one signature do
    kernels = [Kernel(f"file {i % 4}", library) for i in range(KERNELS)]
    compile_at_once(kernels)
    assert [kernel.loaded for kernel in kernels] == [kernel.src for kernel in kernels]
    assert library.most > 1, "nothing was built in parallel: the test proves nothing"


@needs_compiling_ahead
def test_two_threads_do_not_load_at_once(library):
    """As the threads of autograd on two devices."""
    sets = [[Kernel(f"file {i % 4}", library) for i in range(KERNELS)] for _ in range(2)]
    threads = [threading.Thread(target=compile_at_once, args=(kernels,)) for kernels in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for kernels in sets:
        assert [kernel.loaded for kernel in kernels] == [kernel.src for kernel in kernels]
