"""Kernels that run on compute capability 9.0 only, written in Gluon.

May import tiles, codes and launching, and ops outside of ops.kernels.
"""
