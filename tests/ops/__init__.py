"""The kernels against their twins in plain PyTorch; without a GPU in Triton's interpreter."""
