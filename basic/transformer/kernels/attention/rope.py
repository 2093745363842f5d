"""RoPE in Triton on packed queries, keys and values, in one pass over memory, also in place.

Plain tensor operations read the even and odd features separately and stack them again, in several passes. A program
here loads neighboring pairs together, splits them in registers, and writes them back.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(X, OUT, COS, SIN, stride, out_stride, num_rows, num_pairs, num_rotated, T, half, ROWS: tl.constexpr,
            PAIRS: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # A row has the features of all queries and keys of a token, head after head.
    pairs = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    features = tl.program_id(1) * 2 * PAIRS + tl.arange(0, 2 * PAIRS)
    mask = (rows[:, None] < num_rows) & (features[None, :] < 2 * num_pairs)
    rows = rows.to(tl.int64)
    x = tl.load(X + rows[:, None] * stride + features[None, :], mask=mask, other=0.0)
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (ROWS, PAIRS, 2)))
    angle = (rows % T)[:, None] * half + (pairs % half)[None, :]
    is_rotated = (pairs < num_rotated)[None, :]
    cos = tl.load(COS + angle, mask=is_rotated, other=1.0)
    sin = tl.load(SIN + angle, mask=is_rotated, other=0.0)
    y = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, 2 * PAIRS))
    tl.store(OUT + rows[:, None] * out_stride + features[None, :], y.to(x.dtype), mask=mask)


def rotate_packed(x: Tensor, cos: Tensor, sin: Tensor, num_rotated: int, out: Tensor) -> None:
    """Rotate the first heads of x by the angles of their tokens.

    Args:
        x: (B, T, heads, D); heads and D contiguous, B and T with strides as of one dimension.
        cos, sin: of the tokens' angles, float32 (at least T, D / 2).
        num_rotated: number of heads to rotate.
        out: of the shape of x, gets all heads. It may be x itself, whose other heads are then not touched.
    """
    if out is x:
        out = x = x[:, :, :num_rotated]
    B, T, heads, D = x.shape
    num_pairs = heads * D // 2
    pairs = min(triton.next_power_of_2(num_pairs), 256)
    rows = max(1, 1024 // pairs)
    _rotate[triton.cdiv(B * T, rows), triton.cdiv(num_pairs, pairs)](
        x, out, cos, sin, x.stride(1), out.stride(1), B * T, num_pairs, num_rotated * D // 2, T, D // 2, ROWS=rows,
        PAIRS=pairs, num_warps=4)  # fmt: skip
