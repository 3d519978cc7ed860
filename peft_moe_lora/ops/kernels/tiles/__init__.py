"""Functions that several kernels call, on one tile, and the host functions that go with them.

May import codes, launching and ops.
"""
