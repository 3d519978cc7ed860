"""Experts quantized to 4 and 8 bits, in place and while a checkpoint is loaded."""
