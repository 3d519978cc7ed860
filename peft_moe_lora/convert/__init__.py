"""Reads adapter files in any known format; converts, merges, inspects and compares them.

May import from tuner, functional, experts, files and ops.
"""
