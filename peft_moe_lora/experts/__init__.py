"""What an experts module is and how it stores its weights, read from the module itself.

May import ops.
"""
