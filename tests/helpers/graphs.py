"""What torch.compile makes of a call: its graphs, its breaks, and the operators in them."""

from collections import Counter

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters


class Graphs:
    """Compiles a function, and keeps what AOTAutograd hands to a compiler.

    Attributes:
        forward, backward: the graphs of both directions, in the order of their compilation.
    """

    def __init__(self):
        torch.compiler.reset()
        counters.clear()
        self.forward = []
        self.backward = []

    def compile(self, function, **options):
        """torch.compile of a function, whose graphs are run operator by operator."""
        return torch.compile(function, backend=self.backend(), **options)

    def backend(self):
        """The `backend` of torch.compile that keeps the graphs of both directions."""
        return aot_autograd(
            fw_compiler=self._keeping(self.forward), bw_compiler=self._keeping(self.backward)
        )

    @staticmethod
    def _keeping(graphs):
        def keep(module, inputs):
            graphs.append(module)
            return make_boxed_func(module.forward)

        return keep

    @staticmethod
    def breaks():
        """{reason: number} of the graph breaks since this object was made."""
        return dict(counters["graph_break"])


def own_operators(*graphs):
    """{name: number} of this package's operators in graphs."""
    nodes = [node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    targets = [str(node.target) for node in nodes]
    ours = [target for target in targets if target.startswith("peft_moe_lora.")]
    return dict(Counter(target.split(".")[1] for target in ours))
