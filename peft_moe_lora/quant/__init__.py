"""Quantizes experts to 4 and 8 bits, in place or while a checkpoint is loaded.

May import tuner and below.
"""
