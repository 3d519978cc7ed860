"""Random configurations and damaged adapter files: each gives the right numbers or a clear error.

The profiles of hypothesis are in `conftest.py`: how many examples, and which seeds.
"""
