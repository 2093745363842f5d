"""Quantizing to 8-bit floating point in Triton: one pass writes a tensor in both layouts and measures its largest size.

The matrix units multiply 8-bit numbers only along the contiguous dimension of both factors, and a linear layer needs
its input, its weight and its output's gradient along one dimension in one multiplication and along the other in the
next. So a kernel writes each of them twice, as it is and transposed, which is as many bytes as one bfloat16 tensor.

A tensor's scale is known before it is computed (see `basic.transformer.fp8`), so that the kernel which computes it can
write it in 8 bits at once. The kernel also records the largest absolute value, from which the next scale is made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from basic.transformer.kernels import ahead
from basic.transformer.kernels.interpreter import sigmoid, to_be_transposed, to_float8
from basic.transformer.kernels.swiglu import gate_gradients, load_both

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
"""Inputs and weights need precision, gradients range."""
LIMITS = {dtype: torch.finfo(dtype).max for dtype in (FORWARD, BACKWARD)}
INVERSE, SCALE, LARGEST, SATURATED, NONFINITE = range(5)
"""Places in the record of a tensor: 1 / scale, and the scale; its largest absolute value since the scale was set (NaN
if there is one); and counts of the steps with numbers that were too large, or not finite."""
RECORD_SIZE = 8
"""Numbers of a record, float32: cuBLAS reads the first one, whose address must be divisible by 16."""

_TILES = {"quantize": (64, 128, 8, 80), "gate": (4, 512, 4, 64), "gate_gradients": (32, 128, 8, 80)}
"""Rows and columns of a program's tile, warps, and the registers of a thread, of which fewer let more programs run."""


@triton.jit
def _size(x):
    """Absolute values as integers, which have the same order; NaN is the largest."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def _record(sizes, RECORD):
    """Record the largest of a tile of sizes; those of masked numbers must be 0."""
    largest = tl.max(sizes)
    RECORDED = (RECORD + 2).to(tl.pointer_type(tl.int32), bitcast=True)
    tl.atomic_max(RECORDED, largest, mask=largest > tl.load(RECORDED), sem="relaxed")


@triton.jit
def _store_both(x, ROWS, COLUMNS, rows, columns, rows_stride, columns_stride, mask, RECORD):
    """Quantize a tile of float32 and write it to a tensor and to its transpose."""
    y = to_float8(x * tl.load(RECORD + 1), ROWS.dtype.element_ty)
    tl.store(ROWS + rows * rows_stride + columns, y, mask=mask)
    y = to_be_transposed(y, ROWS.dtype.element_ty)
    tl.store(COLUMNS + columns.to(tl.int64) * columns_stride + rows, y, mask=mask)


@triton.jit
def _quantize(X, ROWS, COLUMNS, RECORD, num_rows, num_columns, x_stride, rows_stride, columns_stride,
              M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    rows = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * N + tl.arange(0, N))[None, :]
    mask = (rows < num_rows) & (columns < num_columns)
    x = tl.load(X + rows * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    _record(_size(x), RECORD)
    _store_both(x, ROWS, COLUMNS, rows, columns, rows_stride, columns_stride, mask, RECORD)


def _launch(kernel: str, rows: int, columns: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid and the tile of a kernel."""
    M, N, warps, registers = _TILES[kernel]
    return (triton.cdiv(rows, M), triton.cdiv(columns, N)), {"M": M, "N": N, "num_warps": warps, "maxnreg": registers}


def quantize_into(x: Tensor, rows: Tensor, columns: Tensor, record: Tensor) -> None:
    """Write x (m, n) times its scale to `rows` (m, n) and, transposed, to `columns` (n, m).

    Args:
        x: the last dimension contiguous.
        rows, columns: of `FORWARD` or `BACKWARD`, the last dimension contiguous. A number that is too large, or
            infinite, becomes the largest one; NaN remains.
        record: of x; the largest absolute value is updated.
    """
    grid, tile = _launch("quantize", *x.shape)
    strides = x.stride(0), rows.stride(0), columns.stride(0)
    _quantize[grid](x, rows, columns, record, *x.shape, *strides, **tile)


@triton.jit
def _gate(X, ROWS, RECORD, num_rows, width, x_stride, M: tl.constexpr, N: tl.constexpr):
    rows = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * N + tl.arange(0, N))[None, :]
    mask = (rows < num_rows) & (columns < width)
    x1, x3 = load_both(X, rows, columns, width, x_stride, mask)
    y = x1 * sigmoid(x1) * x3
    _record(_size(y), RECORD)
    tl.store(ROWS + rows * width + columns, to_float8(y * tl.load(RECORD + 1), ROWS.dtype.element_ty), mask=mask)


@triton.jit
def _gate_gradients(X, DY, DX_ROWS, DX_COLUMNS, DX_RECORD, COLUMNS, RECORD, num_rows, width, x_stride,
                    M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    rows = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * N + tl.arange(0, N))[None, :]
    mask = (rows < num_rows) & (columns < width)
    x1, x3 = load_both(X, rows, columns, width, x_stride, mask)
    dy = tl.load(DY + rows * width + columns, mask=mask, other=0.0).to(tl.float32)
    dx1, dx3, y = gate_gradients(x1, x3, dy, sigmoid(x1))
    # In an order that needs few registers.
    y8 = to_float8(y * tl.load(RECORD + 1), COLUMNS.dtype.element_ty)
    y8 = to_be_transposed(y8, COLUMNS.dtype.element_ty)
    tl.store(COLUMNS + columns.to(tl.int64) * num_rows + rows, y8, mask=mask)
    _record(_size(y), RECORD)
    _store_both(dx1, DX_ROWS, DX_COLUMNS, rows, columns, 2 * width, num_rows, mask, DX_RECORD)
    _store_both(dx3, DX_ROWS, DX_COLUMNS, rows, columns + width, 2 * width, num_rows, mask, DX_RECORD)
    _record(tl.maximum(_size(dx1), _size(dx3)), DX_RECORD)


# These operators update a record without saying so: nothing else in a step's graph reads what they change.


def _empty(x: Tensor, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty((rows, columns), dtype=dtype), x.new_empty((columns, rows), dtype=dtype)


@ahead.operator("basic::quantize")
def quantize(x: Tensor, record: Tensor, is_gradient: bool = False) -> tuple[Tensor, Tensor]:
    """x (m, n) in 8 bits, and its transpose (n, m); see `quantize_into`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, columns = _empty(x, *x.shape, BACKWARD if is_gradient else FORWARD)
    quantize_into(x, rows, columns, record)
    return rows, columns


@quantize.register_fake
def _(x: Tensor, record: Tensor, is_gradient: bool = False) -> tuple[Tensor, Tensor]:
    return _empty(x, *x.shape, BACKWARD if is_gradient else FORWARD)


@ahead.operator("basic::quantized_gate")
def quantized_gate(x: Tensor, record: Tensor) -> Tensor:
    """silu(x1) * x3 of x (m, 2 n), which has x1 and x3 side by side, in 8 bits, (m, n)."""
    m, n = x.shape[0], x.shape[1] // 2
    y = x.new_empty((m, n), dtype=FORWARD)
    grid, tile = _launch("gate", m, n)
    _gate[grid](x, y, record, m, n, x.stride(0), **tile)
    return y


@quantized_gate.register_fake
def _(x: Tensor, record: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] // 2), dtype=FORWARD)


@ahead.operator("basic::quantized_gate_backward")
def quantized_gate_backward(x: Tensor, dy: Tensor, dx_record: Tensor, record: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x in 8 bits, (m, 2 n) and (2 n, m), from that of the output; and the output again, (n, m)."""
    m, n = dy.shape
    dx_rows, dx_columns = _empty(x, m, 2 * n, BACKWARD)
    columns = x.new_empty((n, m), dtype=FORWARD)
    grid, tile = _launch("gate_gradients", m, n)
    _gate_gradients[grid](
        x, dy.contiguous(), dx_rows, dx_columns, dx_record, columns, record, m, n, x.stride(0),
        **tile)  # fmt: skip
    return dx_rows, dx_columns, columns


@quantized_gate_backward.register_fake
def _(x: Tensor, dy: Tensor, dx_record: Tensor, record: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    m, n = dy.shape
    return *_empty(x, m, 2 * n, BACKWARD), x.new_empty((n, m), dtype=FORWARD)


@torch.library.custom_op("basic::multiply_float8", mutates_args=())
def multiply(a: Tensor, b: Tensor, a_record: Tensor, b_record: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """A B^T of A (m, k) and B (n, k) in 8 bits.

    Args:
        a_record, b_record: of A and B.
        dtype: of the result.
        fast: add up in fewer bits than float32 has.
    """
    scales = {"scale_a": a_record[INVERSE], "scale_b": b_record[INVERSE]}
    return torch._scaled_mm(a, b.t(), **scales, out_dtype=dtype, use_fast_accum=fast)


@multiply.register_fake
def _(a: Tensor, b: Tensor, a_record: Tensor, b_record: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)
