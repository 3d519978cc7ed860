"""Adapters that another library made and keeps, computed by this package.

May import layers, config, functional, experts, files and below.
"""
