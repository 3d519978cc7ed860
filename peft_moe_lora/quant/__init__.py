"""Experts in 4 and 8 bits: quantized in place or while a checkpoint loads.

May import tuner and below.
"""
