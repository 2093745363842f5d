"""Muon in Triton: symmetric products of which one half is computed, and the passes over the weights before and after.

As in the AdamW kernel, numbers that change from step to step are read from device memory, and one launch updates many
matrices; all of them have one shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from basic.transformer.kernels.adamw import select
from basic.transformer.kernels.interpreter import INTERPRETED, dot

_BLOCK = 2048
_MAX_MATRICES = 16
"""Per launch: addresses are arguments of the kernel, and every program searches them."""
# Rows and columns of a program's tile of the product, and the columns of x that it multiplies at a time.
_TILE, _TILE_K = (32, 32) if INTERPRETED else (128, 64)


@triton.jit
def _symmetric_product(
    X, SCALES, OUT, rows, columns, batch_stride, row_stride, column_stride, a, b, c,
    POLYNOMIAL: tl.constexpr, SCALED: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    i, j, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if j > i:  # the mirror image of tile (j, i)
        return
    X += batch * batch_stride
    rows_i, rows_j = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    k = tl.arange(0, TILE_K)
    X_I = X + rows_i[:, None] * row_stride + k[None, :] * column_stride
    X_J = X + rows_j[None, :] * row_stride + k[:, None] * column_stride
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, columns, TILE_K):
        mask_k = start + k < columns
        x_i = tl.load(X_I, mask=(rows_i[:, None] < rows) & mask_k[None, :], other=0.0)
        x_j = tl.load(X_J, mask=(rows_j[None, :] < rows) & mask_k[:, None], other=0.0)
        total = dot(x_i, x_j, total)
        X_I += TILE_K * column_stride
        X_J += TILE_K * column_stride
    offsets = batch * rows * rows + rows_i[:, None] * rows + rows_j[None, :]
    mask = (rows_i[:, None] < rows) & (rows_j[None, :] < rows)
    if POLYNOMIAL:  # X is symmetric
        x = tl.load(X + rows_i[:, None] * row_stride + rows_j[None, :] * column_stride, mask=mask, other=0.0)
        x = x.to(tl.float32)
        if SCALED:
            scale = tl.load(SCALES + batch)
            x *= scale * scale
            total = total * (scale * scale) * (scale * scale)
        total = b * x + c * total + tl.where(rows_i[:, None] == rows_j[None, :], a, 0.0)
        if SCALED:
            total *= scale
    result = total.to(OUT.dtype.element_ty)
    tl.store(OUT + offsets, result, mask=mask)
    if j < i:
        mirrored = batch * rows * rows + rows_j[:, None] * rows + rows_i[None, :]
        tl.store(OUT + mirrored, tl.trans(result), mask=(rows_j[:, None] < rows) & (rows_i[None, :] < rows))


def symmetric_product(
    x: Tensor, coefficients: tuple[float, float, float] | None = None, scales: Tensor | None = None
) -> Tensor:
    """See `dispatch.symmetric_product`; x has any strides, and scales are float32."""
    batch, rows, columns = x.shape
    out = torch.empty((batch, rows, rows), dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(rows, _TILE)
    _symmetric_product[(tiles, tiles, batch)](
        x, out if scales is None else scales, out, rows, columns, *x.stride(), *(coefficients or (0.0, 0.0, 1.0)),
        POLYNOMIAL=coefficients is not None, SCALED=scales is not None, TILE=_TILE, TILE_K=_TILE_K,
        num_warps=8, num_stages=3)  # fmt: skip
    return out


@triton.jit
def _step_momenta(GRADIENTS, MOMENTA, DIRECTIONS, WEIGHT, KEEP, size, BLOCK: tl.constexpr):
    which = tl.program_id(1)
    GRADIENT, MOMENTUM = select(GRADIENTS, which), select(MOMENTA, which)
    DIRECTIONS += which.to(tl.int64) * size
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    weight, keep = tl.load(WEIGHT), tl.load(KEEP)
    gradient = tl.load(GRADIENT + offsets, mask=mask).to(tl.float32)
    gradient = tl.where(weight != 0, gradient * weight, 0.0)
    momentum = keep * tl.load(MOMENTUM + offsets, mask=mask) + gradient
    tl.store(MOMENTUM + offsets, momentum, mask=mask)
    tl.store(DIRECTIONS + offsets, (keep * momentum + gradient).to(DIRECTIONS.dtype.element_ty), mask=mask)


def step_momenta(
    gradients: Sequence[Tensor], momenta: Sequence[Tensor], weight: Tensor, keep: Tensor, dtype: torch.dtype
) -> Tensor:
    """See `basic.transformer.muon.step_momenta`; all tensors are contiguous, and the momenta float32."""
    directions = torch.empty((len(momenta), *momenta[0].shape), dtype=dtype, device=momenta[0].device)
    size = momenta[0].numel()
    for start in range(0, len(momenta), _MAX_MATRICES):
        chunk = slice(start, start + _MAX_MATRICES)
        _step_momenta[(triton.cdiv(size, _BLOCK), len(momenta[chunk]))](
            tuple(gradients[chunk]), tuple(momenta[chunk]), directions[chunk], weight, keep, size, BLOCK=_BLOCK,
            num_warps=8)  # fmt: skip
    return directions


@triton.jit
def _step_weights(
    WEIGHTS, COPIES, UPDATES, SCALES, UPDATE_RATE, DECAY_RATE, size, COLUMNS: tl.constexpr, NUM_SCALES: tl.constexpr,
    AXIS: tl.constexpr, CAUTIOUS: tl.constexpr, HAVE_COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1)
    WEIGHT, COPY = select(WEIGHTS, which), select(COPIES, which)
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    weight = tl.load(WEIGHT + offsets, mask=mask, other=0.0)
    update = tl.load(UPDATES + which.to(tl.int64) * size + offsets, mask=mask, other=0.0).to(tl.float32)
    if AXIS == 0:
        update *= tl.load(SCALES + which * NUM_SCALES + offsets // COLUMNS, mask=mask, other=0.0)
    elif AXIS == 1:
        update *= tl.load(SCALES + which * NUM_SCALES + offsets % COLUMNS, mask=mask, other=0.0)
    decayed = weight
    if CAUTIOUS:
        decayed = tl.where(update * weight >= 0, weight, 0.0)
    weight -= tl.load(UPDATE_RATE) * update + tl.load(DECAY_RATE) * decayed
    tl.store(WEIGHT + offsets, weight, mask=mask)
    if HAVE_COPIES:
        tl.store(COPY + offsets, weight.to(COPY.dtype.element_ty), mask=mask)


def step_weights(
    weights: Sequence[Tensor], copies: Sequence[Tensor], updates: Tensor, scales: Tensor | None, axis: int,
    update_rate: Tensor, decay_rate: Tensor, *, cautious: bool,
) -> None:  # fmt: skip
    """See `basic.transformer.muon.step_weights`; all tensors are contiguous, and weights and scales float32."""
    size, columns = weights[0].numel(), weights[0].shape[1]
    for start in range(0, len(weights), _MAX_MATRICES):
        chunk = slice(start, start + _MAX_MATRICES)
        _step_weights[(triton.cdiv(size, _BLOCK), len(weights[chunk]))](
            tuple(weights[chunk]), tuple((copies or weights)[chunk]), updates[chunk],
            update_rate if scales is None else scales[chunk], update_rate, decay_rate, size, COLUMNS=columns,
            NUM_SCALES=0 if scales is None else scales.shape[1], AXIS=-1 if scales is None else axis,
            CAUTIOUS=cautious, HAVE_COPIES=len(copies) > 0, BLOCK=_BLOCK, num_warps=8)  # fmt: skip
