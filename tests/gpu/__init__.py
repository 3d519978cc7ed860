"""The layer on a CUDA device; nothing here runs without one."""
