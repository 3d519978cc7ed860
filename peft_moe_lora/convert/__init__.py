"""Adapter files: read in any known format, converted, merged, inspected and compared.

May import from tuner, functional, experts, files and ops.
"""
