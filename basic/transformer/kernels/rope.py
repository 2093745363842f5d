"""RoPE in Triton on packed queries, keys and values, in place and in one pass over memory.

Plain tensor operations read the even and odd features separately and stack them again, in several passes. A program
here loads neighbouring pairs together, splits them in registers, and writes them back.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(X, COS, SIN, stride, num_rows, num_pairs, T, half, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # A row has the features of all queries and keys of a token, head after head.
    pairs = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    features = tl.program_id(1) * 2 * PAIRS + tl.arange(0, 2 * PAIRS)
    mask = (rows[:, None] < num_rows) & (features[None, :] < 2 * num_pairs)
    X += rows[:, None].to(tl.int64) * stride + features[None, :]
    x = tl.load(X, mask=mask, other=0.0)
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (ROWS, PAIRS, 2)))
    angle = (rows % T)[:, None] * half + (pairs % half)[None, :]
    cos = tl.load(COS + angle)
    sin = tl.load(SIN + angle)
    y = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, 2 * PAIRS))
    tl.store(X, y.to(x.dtype), mask=mask)


def rotate_packed(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate the heads of x by the angles of their tokens, in place.

    Args:
        x: (B, T, heads, D); heads and D contiguous, B and T with strides as of one dimension.
        cos, sin: of the tokens' angles, float32 (at least T, D / 2).
    """
    B, T, heads, D = x.shape
    num_pairs = heads * D // 2
    pairs = min(triton.next_power_of_2(num_pairs), 256)
    rows = max(1, 1024 // pairs)
    _rotate[triton.cdiv(B * T, rows), triton.cdiv(num_pairs, pairs)](
        x, cos, sin, x.stride(1), B * T, num_pairs, T, D // 2, ROWS=rows, PAIRS=pairs, num_warps=4)  # fmt: skip
