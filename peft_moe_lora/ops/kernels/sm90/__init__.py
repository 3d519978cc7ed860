"""Kernels in Gluon for compute capability 9.0 alone.

May import tiles, codes, launching and ops.
"""
