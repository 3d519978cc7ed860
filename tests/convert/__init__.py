"""Conversion between adapter formats, on files: write, read, inspect, verify, merge."""
