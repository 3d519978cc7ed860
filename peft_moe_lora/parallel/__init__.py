"""Parameters that several processes share: what is sharded, and how gradients become equal.

May import config, experts, files and below.
"""
