"""Causal attention in Triton that never writes the scores to memory, forward and backward.

A program of the forward kernel takes a tile of queries and loops over the keys before them, a tile at a time (online
softmax): it keeps the running maximum, sum and weighted values, and rescales them when a larger score appears. For the
backward pass only the logarithm of each query's sum of exponentials (`log_sums`) is saved; the weights are computed
again. Queries and keys come rotated by RoPE; their gradients are rotated back in registers before they are written,
which saves a pass over them.

The causal mask also masks the end of the sequence, since a key beyond the end is after every real query. Loads are
masked (CHECK) only if the sequence length is no multiple of the tile sizes.

With a sliding window (WINDOW > 0), a query attends to the last WINDOW keys, its own included. Tiles outside the window
are skipped, and those that it cuts are masked. With documents packed into a row (PACKED), it attends to no key before
the first token of its own document, whose index is in STARTS.

Neighboring query heads may share a head of keys and values (grouped-query attention, GROUP query heads each). Their
gradients of a key are added up in one program, which loops over the group.

Legend: B batch, T sequence, H query heads, D head size; M queries per tile, N keys per tile. The layout is
(B, T, H, D) with any strides except that the last is 1, so that queries, keys and values can be slices of one packed
tensor.

Source: Dao 2023, "FlashAttention-2", algorithms 1 and 2; Milakov and Gimelshein 2018 (online softmax); Ainslie et al.
2023, "GQA".
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from basic.transformer.kernels.interpreter import INTERPRETED, LOG2_E, dot

# By padded head size: queries per tile, keys per tile, warps, pipeline stages, and registers per thread (None for the
# compiler's choice). Tuned on an H200.
_FORWARD_TILES = {
    16: (64, 32, 4, 3, None), 32: (64, 64, 4, 3, 80), 64: (64, 64, 4, 3, None), 128: (64, 64, 4, 3, None),
    256: (64, 32, 8, 2, None)}  # fmt: skip

_KEY_GRADIENT_TILES = {
    16: (32, 64, 4, 3, None), 32: (32, 64, 4, 3, 96), 64: (32, 64, 4, 3, 128), 128: (64, 64, 4, 2, None),
    256: (32, 32, 8, 2, None)}  # fmt: skip

_QUERY_GRADIENT_TILES = {
    16: (64, 32, 4, 3, None), 32: (64, 32, 4, 4, None), 64: (64, 64, 4, 2, None),
    128: (128, 64, 8, 3, None), 256: (64, 32, 8, 2, None)}  # fmt: skip


@triton.jit
def _load_tile(pointer, rows, stride, columns, T, D: tl.constexpr, WIDTH: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """Load rows of D features, padded with zeros to WIDTH (a power of two)."""
    pointers = pointer + rows[:, None] * stride + columns[None, :]
    if CHECK_ROWS:
        if D == WIDTH:
            return tl.load(pointers, mask=rows[:, None] < T, other=0.0)
        return tl.load(pointers, mask=(rows[:, None] < T) & (columns[None, :] < D), other=0.0)
    if D == WIDTH:
        return tl.load(pointers)
    return tl.load(pointers, mask=columns[None, :] < D, other=0.0)


@triton.jit
def _store_tile(pointer, value, rows, stride, columns, T, D: tl.constexpr):
    mask = (rows[:, None] < T) & (columns[None, :] < D)
    tl.store(pointer + rows[:, None] * stride + columns[None, :], value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _load_vector(pointer, rows, T, CHECK: tl.constexpr):
    """Load one number per row."""
    if CHECK:
        return tl.load(pointer + rows, mask=rows < T, other=0.0)
    return tl.load(pointer + rows)


@triton.jit
def _load_starts(STARTS, batch, rows, T, PACKED: tl.constexpr):
    """The index of the first token of each query's document; that of a query beyond the end is T."""
    if PACKED:
        return tl.load(STARTS + batch * T + rows, mask=rows < T, other=T)
    return rows * 0


@triton.jit
def _first_key(first_row, starts, N: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr):
    """The first key of the first tile of keys that a tile of queries attends to."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(first_row - WINDOW + 1, 0)
    if PACKED:
        first = tl.maximum(first, tl.min(starts, 0))
    return first // N * N


@triton.jit
def _cuts(first_key, first_row, M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr):
    """Whether the mask may cut the tile of these keys and queries."""
    if PACKED:
        return first_key >= 0
    if WINDOW == 0:
        return first_key + N > first_row
    return (first_key + N > first_row) | (first_key + WINDOW < first_row + M)


@triton.jit
def _visible(rows, keys, starts, WINDOW: tl.constexpr, PACKED: tl.constexpr):
    """Whether a query may attend to a key."""
    visible = rows >= keys
    if WINDOW > 0:
        visible &= rows - keys < WINDOW
    if PACKED:
        visible &= keys >= starts
    return visible


@triton.jit
def _forward(Q, K, V, OUT, LOG_SUMS,
             q_batch, q_stride, q_head, k_batch, k_stride, k_head, v_batch, v_stride, v_head, o_batch, o_stride, o_head,
             H, T, scale, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
             CHECK: tl.constexpr, WINDOW: tl.constexpr, STARTS, PACKED: tl.constexpr):  # fmt: skip
    # The last tiles have the most keys. They start first, so that none of them runs alone at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    Q += batch * q_batch + head * q_head
    K += batch * k_batch + head // GROUP * k_head
    V += batch * v_batch + head // GROUP * v_head
    OUT += batch * o_batch + head * o_head
    rows, columns = tile * M + tl.arange(0, M), tl.arange(0, WIDTH)
    q = _load_tile(Q, rows, q_stride, columns, T, D, WIDTH, CHECK)
    # Below all scores, and far above those that are masked: a query all of whose keys in a tile are masked gets weights
    # of 0 from it. With a maximum as low as the masked scores, the multiply-add below would give their rounding error.
    maximum = tl.full([M], -1e20, tl.float32)
    total = tl.zeros([M], tl.float32)
    weighted = tl.zeros([M, WIDTH], tl.float32)
    starts = _load_starts(STARTS, batch, rows, T, PACKED)
    for start in range(_first_key(tile * M, starts, N, WINDOW, PACKED), tl.minimum((tile + 1) * M, T), N):
        keys = start + tl.arange(0, N)
        k = _load_tile(K, keys, k_stride, columns, T, D, WIDTH, CHECK)
        scores = dot(q, tl.trans(k))
        if _cuts(start, tile * M, M, N, WINDOW, PACKED):
            visible = _visible(rows[:, None], keys[None, :], starts[:, None], WINDOW, PACKED)
            scores = tl.where(visible, scores, -1e30)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_maximum[:, None])  # one multiply-add per score
        rescale = tl.exp2(maximum - new_maximum)
        total = total * rescale + tl.sum(weights, 1)
        v = _load_tile(V, keys, v_stride, columns, T, D, WIDTH, CHECK)
        weighted = dot(weights.to(v.dtype), v, weighted * rescale[:, None])
        maximum = new_maximum
    _store_tile(OUT, weighted / total[:, None], rows, o_stride, columns, T, D)
    tl.store(LOG_SUMS + tl.program_id(1).to(tl.int64) * T + rows, maximum + tl.log2(total), mask=rows < T)


@triton.jit
def _rotate_back(x, rows, COS, SIN, T, D: tl.constexpr, WIDTH: tl.constexpr):
    """The gradient of a tile before RoPE, from its gradient after RoPE."""
    pairs = tl.arange(0, WIDTH // 2)
    mask = (rows[:, None] < T) & (pairs[None, :] < D // 2)
    cos = tl.load(COS + rows[:, None] * (D // 2) + pairs[None, :], mask=mask, other=0.0)
    sin = tl.load(SIN + rows[:, None] * (D // 2) + pairs[None, :], mask=mask, other=0.0)
    even, odd = tl.split(tl.reshape(x, (x.shape[0], WIDTH // 2, 2)))
    return tl.reshape(tl.join(even * cos + odd * sin, odd * cos - even * sin), (x.shape[0], WIDTH))


@triton.jit
def _key_gradients(Q, K, V, DO, DK, DV, LOG_SUMS, DELTAS, COS, SIN,
                   q_batch, q_stride, q_head, k_batch, k_stride, k_head, v_batch, v_stride, v_head,
                   do_batch, do_stride, do_head, dk_batch, dk_stride, dk_head, dv_batch, dv_stride, dv_head,
                   H, T, scale, out_scale, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
                   M: tl.constexpr, N: tl.constexpr, CHECK: tl.constexpr, WINDOW: tl.constexpr, STARTS, ENDS,
                   PACKED: tl.constexpr):  # fmt: skip
    kv_heads = H // GROUP
    batch, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    head = kv_head * GROUP  # the first of those that share this key
    Q += batch * q_batch + head * q_head
    K += batch * k_batch + kv_head * k_head
    V += batch * v_batch + kv_head * v_head
    DO += batch * do_batch + head * do_head
    DK += batch * dk_batch + kv_head * dk_head
    DV += batch * dv_batch + kv_head * dv_head
    LOG_SUMS += (batch * H + head) * T
    DELTAS += (batch * H + head) * T
    tile = tl.program_id(0)
    keys, columns = tile * N + tl.arange(0, N), tl.arange(0, WIDTH)
    k = _load_tile(K, keys, k_stride, columns, T, D, WIDTH, CHECK)
    v = _load_tile(V, keys, v_stride, columns, T, D, WIDTH, CHECK)
    dk = tl.zeros([N, WIDTH], tl.float32)
    dv = tl.zeros([N, WIDTH], tl.float32)
    # One loop, with a mask that only the diagonal needs. With two loops over both sums, the assembler lets no matrix
    # multiplication begin before the last one has ended (its note C7515), and the kernel takes 1/6 to 1/3 longer.
    last = T if WINDOW == 0 else tl.minimum(T, (tile + 1) * N + WINDOW - 1)
    if PACKED:  # no query behind the document of the last key attends to these
        last = tl.minimum(last, tl.load(ENDS + batch * T + tl.minimum((tile + 1) * N, T) - 1))
    for _ in range(GROUP):
        for start in range(tile * N // M * M, last, M):
            rows = start + tl.arange(0, M)
            # Queries beyond the end are loaded as zeros, and add zeros.
            q = _load_tile(Q, rows, q_stride, columns, T, D, WIDTH, CHECK)
            do = _load_tile(DO, rows, do_stride, columns, T, D, WIDTH, CHECK)
            log_sums = _load_vector(LOG_SUMS, rows, T, CHECK)
            deltas = _load_vector(DELTAS, rows, T, CHECK)
            # Transposed, (N, M), so that only q and do need to be transposed.
            scores = dot(k, tl.trans(q))
            dweights = dot(v, tl.trans(do))
            weights = tl.exp2(scores * scale - log_sums[None, :])
            starts = _load_starts(STARTS, batch, rows, T, PACKED)
            visible = _visible(rows[None, :], keys[:, None], starts[None, :], WINDOW, PACKED)
            weights = tl.where(visible, weights, 0.0)
            dscores = weights * (dweights - deltas[None, :])
            dv = dot(weights.to(do.dtype), do, dv)
            dk = dot(dscores.to(q.dtype), q, dk)
        Q += q_head
        DO += do_head
        LOG_SUMS += T
        DELTAS += T
    dk = _rotate_back(dk * out_scale, keys, COS, SIN, T, D, WIDTH)
    _store_tile(DK, dk, keys, dk_stride, columns, T, D)
    _store_tile(DV, dv, keys, dv_stride, columns, T, D)


@triton.jit
def _query_gradients(Q, K, V, OUT, DO, DQ, LOG_SUMS, DELTAS, COS, SIN,
                     q_batch, q_stride, q_head, k_batch, k_stride, k_head, v_batch, v_stride, v_head,
                     o_batch, o_stride, o_head, do_batch, do_stride, do_head, dq_batch, dq_stride, dq_head,
                     H, T, scale, out_scale, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
                     M: tl.constexpr, N: tl.constexpr, CHECK: tl.constexpr, WINDOW: tl.constexpr, STARTS,
                     PACKED: tl.constexpr):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    Q += batch * q_batch + head * q_head
    K += batch * k_batch + head // GROUP * k_head
    V += batch * v_batch + head // GROUP * v_head
    OUT += batch * o_batch + head * o_head
    DO += batch * do_batch + head * do_head
    DQ += batch * dq_batch + head * dq_head
    LOG_SUMS += tl.program_id(1).to(tl.int64) * T
    DELTAS += tl.program_id(1).to(tl.int64) * T
    rows, columns = tile * M + tl.arange(0, M), tl.arange(0, WIDTH)
    q = _load_tile(Q, rows, q_stride, columns, T, D, WIDTH, CHECK)
    do = _load_tile(DO, rows, do_stride, columns, T, D, WIDTH, CHECK)
    log_sums = _load_vector(LOG_SUMS, rows, T, CHECK)
    # The gradient of the softmax subtracts sum(o * do) of its query from every score; the keys' kernel needs it too.
    o = _load_tile(OUT, rows, o_stride, columns, T, D, WIDTH, CHECK)
    deltas = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTAS + rows, deltas, mask=rows < T)
    dq = tl.zeros([M, WIDTH], tl.float32)
    starts = _load_starts(STARTS, batch, rows, T, PACKED)
    for start in range(_first_key(tile * M, starts, N, WINDOW, PACKED), tl.minimum((tile + 1) * M, T), N):
        keys = start + tl.arange(0, N)
        k = _load_tile(K, keys, k_stride, columns, T, D, WIDTH, CHECK)
        v = _load_tile(V, keys, v_stride, columns, T, D, WIDTH, CHECK)
        weights = tl.exp2(dot(q, tl.trans(k)) * scale - log_sums[:, None])
        if _cuts(start, tile * M, M, N, WINDOW, PACKED):
            visible = _visible(rows[:, None], keys[None, :], starts[:, None], WINDOW, PACKED)
            weights = tl.where(visible, weights, 0.0)
        dscores = weights * (dot(do, tl.trans(v)) - deltas[:, None])
        dq = dot(dscores.to(k.dtype), k, dq)
    dq = _rotate_back(dq * out_scale, rows, COS, SIN, T, D, WIDTH)
    _store_tile(DQ, dq, rows, dq_stride, columns, T, D)


def forward(q: Tensor, k: Tensor, v: Tensor, window: int = 0, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Causal attention.

    Args:
        q: (B, T, H, D), the last dimension contiguous, D even and at most 256.
        k, v: the same, or with fewer heads, each shared by a group of neighboring query heads.
        window: number of keys that a query attends to, its own included; 0 for all.
        starts: int32 (B, T), contiguous: index of the first token of each token's document; None for one document.

    Returns:
        The output (B, T, H, D), contiguous, and `log_sums` (B, H, T): the base-2 logarithm of each query's sum of
        exponentials, float32.
    """
    B, T, H, D = q.shape
    o = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    log_sums = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if (hopper := _hopper(q, k, v, window=window, starts=starts)) is not None:
        hopper.forward(q, k, v, o, log_sums, window)
        return o, log_sums
    constants = _constants(q, k, _FORWARD_TILES, window, starts)
    scale = LOG2_E / math.sqrt(D)  # the kernels use exp2
    _forward[triton.cdiv(T, constants["M"]), B * H](
        q, k, v, o, log_sums, *_strides(q, k, v, o), H, T, scale, **constants
    )
    return o, log_sums


def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sums: Tensor, do: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    cos: Tensor, sin: Tensor, window: int = 0, starts: Tensor | None = None
) -> None:  # fmt: skip
    """Compute the gradients of queries and keys before their rotation, and of values.

    Args:
        q, k, v, o, log_sums: inputs and outputs of `forward`.
        do: gradient of the output.
        dq, dk, dv: outputs, of the shapes of q, k, v, the last dimension contiguous.
        cos, sin: that queries and keys were rotated by, float32 (at least T, D / 2), contiguous.
        window, starts: as for `forward`.
    """
    B, T, H, D = q.shape
    scales = LOG2_E / math.sqrt(D), 1 / math.sqrt(D)
    deltas = torch.empty_like(log_sums)
    if (hopper := _hopper(q, k, v, do, window=window, starts=starts)) is not None:
        hopper.query_gradients(q, k, v, o, log_sums, deltas, do, dq, cos, sin, window)
        hopper.key_gradients(q, k, v, log_sums, deltas, do, dk, dv, cos, sin, window)
        return
    ends = q
    if starts is not None:  # index of the first token behind each token's document
        positions = torch.arange(T, dtype=torch.int32, device=q.device).expand(B, T).contiguous()
        ends = torch.searchsorted(starts, positions, right=True, out_int32=True)
    constants = _constants(q, k, _QUERY_GRADIENT_TILES, window, starts)
    _query_gradients[triton.cdiv(T, constants["M"]), B * H](
        q, k, v, o, do, dq, log_sums, deltas, cos, sin, *_strides(q, k, v, o, do, dq), H, T, *scales, **constants
    )
    constants = _constants(q, k, _KEY_GRADIENT_TILES, window, starts)
    _key_gradients[triton.cdiv(T, constants["N"]), B * k.shape[2]](
        q, k, v, do, dk, dv, log_sums, deltas, cos, sin, *_strides(q, k, v, do, dk, dv), H, T, *scales, **constants,
        ENDS=ends)  # fmt: skip


@cache
def _hopper_kernels(device: torch.device | None) -> Any:
    """The kernels for Hopper GPUs if this is one and Triton is of the version that they were tested with, else None."""
    if INTERPRETED or not triton.__version__.startswith("3.6.") or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    from basic.transformer.kernels.attention import hopper_gradients  # imported late: it needs Gluon

    return hopper_gradients


def _hopper(*tensors: Tensor, window: int, starts: Tensor | None) -> Any:
    """The kernels for Hopper GPUs if they support these (B, T, heads, D), else None."""
    if starts is not None:  # documents cut most tiles, and smaller tiles leave out more of what is cut
        return None
    # Tensors without memory are those of kernels that are compiled ahead, for the current device.
    hopper = _hopper_kernels(tensors[0].device if tensors[0].is_cuda else None)
    return hopper if hopper is not None and hopper.supports(*tensors, window=window) else None


def _constants(q: Tensor, k: Tensor, tiles: dict[int, tuple], window: int, starts: Tensor | None) -> dict[str, Any]:
    """The keyword arguments of a kernel's launch, from one of the tables above."""
    T, H, D = q.shape[1:]
    width = max(16, triton.next_power_of_2(D))  # matrix units need at least 16 features
    M, N, warps, stages, registers = tiles[width]
    constants = {"GROUP": H // k.shape[2], "D": D, "WIDTH": width, "M": M, "N": N, "CHECK": T % max(M, N) > 0}
    constants |= {"WINDOW": window, "STARTS": q if starts is None else starts, "PACKED": starts is not None}
    return constants | {"num_warps": warps, "num_stages": stages, "maxnreg": registers}


def _strides(*tensors: Tensor) -> list[int]:
    """The strides of batch, sequence and head of each tensor."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]
