"""The sizes of every tiny model and module, and how close two results have to be.

E experts, H width of the experts' input, I their intermediate width, R rank, TOP_K experts a token.
"""

# all different, so that no transpose can hide
H, I, E, TOP_K, R = 32, 24, 5, 2, 4  # noqa: E741 I is the glossary's letter

VOCAB = 64

# fp32 sums of at most a few hundred products, in another order: measured differences are below
# 5e-6; a missing row or a wrong expert gives 1e-2 and more
FP32 = 2e-5
# the same products of the same numbers: memory with another alignment may get another kernel,
# which adds in another order
SAME = 1e-6
# 8 bits of mantissa, rounded a handful of times
BF16 = 4e-2
