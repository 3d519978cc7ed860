"""Weights in 4 and 8 bits: kernels that decode them, and the part of a product that does.

May import launching and ops.
"""
