"""Weights in 4 and 8 bits, decoded in a kernel or ahead of one.

May import launching and ops.
"""
