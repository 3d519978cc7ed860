"""<bias[e], dout[t]> of each row: what the bias of `down` adds to a routing weight's gradient."""

import triton
import triton.language as tl


@triton.jit
def bias_times_dout(
    bias, dout, row_token_ptr, expert_offsets_ptr, rows, routed, E, H, E_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """<bias[e], dout[t]> for each of `rows` [M]: [M] fp32, 0 where `routed` [M] is false.

    BLOCK columns of bias [E, H] and dout [T, H] are read at a time.
    """
    experts = tl.arange(0, E_PADDED)
    ends = tl.load(expert_offsets_ptr + 1 + experts, mask=experts < E, other=2**31 - 1)
    # the expert of a row is the number of experts whose rows end before it
    e = tl.sum((ends[None, :] <= rows[:, None]).to(tl.int32), axis=1).to(tl.int64)[:, None]
    tokens = tl.load(row_token_ptr + rows, mask=routed, other=0).to(tl.int64)[:, None]
    products = tl.zeros((rows.shape[0], BLOCK), dtype=tl.float32)
    for h in range(0, H, BLOCK):
        cols = (h + tl.arange(0, BLOCK))[None, :]
        mask = routed[:, None] & (cols < H)
        b = tl.load(bias.ptr + e * bias.stride_e + cols * bias.stride_n, mask=mask, other=0.0)
        d = tl.load(dout.ptr + tokens * dout.stride_m + cols * dout.stride_k, mask=mask, other=0.0)
        products += b.to(tl.float32) * d.to(tl.float32)
    return tl.sum(products, axis=1)
