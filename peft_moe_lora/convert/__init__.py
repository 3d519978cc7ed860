"""Adapters between formats, on files: read, converted, merged into a base, inspected and compared.

May import tuner and below.
"""
