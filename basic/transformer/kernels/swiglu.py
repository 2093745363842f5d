"""SwiGLU's gate in Triton: SiLU(W1 x) * W3 x, from both packed side by side, with one read of each number.

The gradient of W2 needs the output again. The backward kernel, which reads both inputs anyway, computes it again
instead of keeping it: this saves 1/7 of all activations, for one more write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_both(X, rows, columns, width, x_stride, mask):
    """x1 and x3 of a tile, in float32."""
    x1 = tl.load(X + rows * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    x3 = tl.load(X + rows * x_stride + columns + width, mask=mask, other=0.0).to(tl.float32)
    return x1, x3


@triton.jit
def gate_gradients(x1, x3, dy, gate):
    """The gradients of x1 and x3, and the output; the gate is sigmoid(x1)."""
    silu = x1 * gate
    return dy * x3 * (gate + silu * (1 - gate)), dy * silu, silu * x3


@triton.jit
def _forward(X, Y, num_rows, width, x_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (rows < num_rows) & (columns < width)
    x1, x3 = load_both(X, rows, columns, width, x_stride, mask)
    tl.store(Y + rows * width + columns, (x1 * tl.sigmoid(x1) * x3).to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(X, DY, DX, num_rows, width, x_stride, dy_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (rows < num_rows) & (columns < width)
    x1, x3 = load_both(X, rows, columns, width, x_stride, mask)
    dy = tl.load(DY + rows * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
    dx1, dx3, y = gate_gradients(x1, x3, dy, tl.sigmoid(x1))
    tl.store(DY + rows * dy_stride + columns, y.to(DY.dtype.element_ty), mask=mask)
    out = DX + rows * 2 * width + columns
    tl.store(out, dx1.to(DX.dtype.element_ty), mask=mask)
    tl.store(out + width, dx3.to(DX.dtype.element_ty), mask=mask)


def forward(x: Tensor) -> Tensor:
    """silu(x[:, :width]) * x[:, width:] of x (rows, 2 width), with a contiguous last dimension."""
    y = torch.empty((x.shape[0], x.shape[1] // 2), dtype=x.dtype, device=x.device)
    grid, tile = _launch_shape(*y.shape)
    _forward[grid](x, y, *y.shape, x.stride(0), **tile)
    return y


def backward(x: Tensor, dy: Tensor) -> Tensor:
    """The gradient of x, (rows, 2 width); dy is overwritten with the output of `forward`."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, tile = _launch_shape(*dy.shape)
    _backward[grid](x, dy, dx, *dy.shape, x.stride(0), dy.stride(0), **tile)
    return dx


def _launch_shape(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    columns = min(triton.next_power_of_2(width), 512)
    if width % columns and width % 64 == 0:
        columns = max(c for c in (64, 128, 256, 512) if width % c == 0)  # so that no lane is idle
    tile_rows = max(1, 2048 // columns)
    return (triton.cdiv(rows, tile_rows), triton.cdiv(width, columns)), {
        "ROWS": tile_rows,
        "COLUMNS": columns,
        "num_warps": 4,
    }
