"""How a kernel's block sizes are chosen, and how it is launched, recorded and replayed.

May import ops, outside of ops.kernels.
"""
