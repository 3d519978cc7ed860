"""How a kernel is chosen, launched, recorded and replayed.

May import ops.
"""
