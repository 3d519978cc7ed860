"""<bias[e], dout[t]> of each row: what the down projection's bias adds to the gradient of a routing weight."""

import triton
import triton.language as tl


@triton.jit
def bias_times_dout(
    bias_ptr, dout_ptr, row_token_ptr, expert_offsets_ptr, rows, routed, E, H,
    stride_biase, stride_biasn, stride_dm, stride_dh, E_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """<bias[e], dout[t]> of each of `rows`: what the down bias has in the gradient of its routing weight."""
    experts = tl.arange(0, E_PADDED)
    ends = tl.load(expert_offsets_ptr + 1 + experts, mask=experts < E, other=2**31 - 1)
    e = tl.sum((ends[None, :] <= rows[:, None]).to(tl.int32), axis=1).to(tl.int64)[:, None]
    tokens = tl.load(row_token_ptr + rows, mask=routed, other=0).to(tl.int64)[:, None]
    products = tl.zeros((rows.shape[0], BLOCK), dtype=tl.float32)
    for h in range(0, H, BLOCK):
        cols = (h + tl.arange(0, BLOCK))[None, :]
        mask = routed[:, None] & (cols < H)
        bias = tl.load(bias_ptr + e * stride_biase + cols * stride_biasn, mask=mask, other=0.0)
        dout = tl.load(dout_ptr + tokens * stride_dm + cols * stride_dh, mask=mask, other=0.0)
        products += bias.to(tl.float32) * dout.to(tl.float32)
    return tl.sum(products, axis=1)
