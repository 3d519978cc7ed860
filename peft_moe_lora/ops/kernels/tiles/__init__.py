"""The pieces that kernels are made of.

May import codes, launching and ops.
"""
