"""Weights in 4 and 8 bits: kernels that decode them, and a product that decodes in its K loop.

May import launching and ops.
"""
