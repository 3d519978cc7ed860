"""Experts in 4 and 8 bits: quantized in place, or while a checkpoint is loaded.

May import tuner and below.
"""
