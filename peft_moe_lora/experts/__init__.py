"""What an experts module is, read from the module itself.

May import ops.
"""
