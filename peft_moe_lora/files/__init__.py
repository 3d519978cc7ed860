"""Files of adapters and tensors: read, checked, written, described.

Imports no other room.
"""
