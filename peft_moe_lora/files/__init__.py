"""Reads, checks, writes and describes files of adapters and tensors.

Imports no other room.
"""
