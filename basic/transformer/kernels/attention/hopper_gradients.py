"""Gradients of causal attention for Hopper GPUs in Gluon, with the plan of `hopper`.

The kernel for keys and values keeps a tile of them, and the tiles of queries and of the output's gradient come in the
ring, 64 tokens each. Its scores are transposed, (keys, queries), so that nothing but tiles of the ring is ever read
transposed; the two numbers of each query come as vectors with the tiles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from basic.transformer.kernels.attention.hopper import (
    INTEGERS,
    coalesced,
    copy_keys,
    descriptor,
    exist,
    first_row,
    forward,
    kept_slot,
    launch,
    load,
    load_tile,
    masked,
    masked_inside,
    matrix,
    num_items,
    opaque,
    own_queries,
    part,
    place,
    skip,
    specialize,
    store_tile,
    stream,
    supports,
    take,
    tile_memory,
    visible,
)
from basic.transformer.kernels.interpreter import LOG2_E

__all__ = ["forward", "key_gradients", "query_gradients", "supports"]

# As in `hopper`.
_QUERY_GRADIENT_SHAPES = {64: (3, 64, 6, 2), 128: (2, 64, 4, 1)}
_KEY_GRADIENT_SHAPES = {64: (3, 64, 6, 2), 128: (2, 64, 3, 1)}


@gluon.jit
def _load_tables(COS, SIN, row, T, D: gl.constexpr):
    """RoPE's cosines and sines of 64 tokens."""
    PAIRS: gl.constexpr = D // 2
    LAYOUT: gl.constexpr = coalesced(PAIRS, 4)
    rows = row + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))[:, None]
    places = rows * PAIRS + gl.arange(0, PAIRS, gl.SliceLayout(0, LAYOUT))[None, :]
    mask = exist(rows, T)
    return gl.load(COS + places, mask=mask, other=0.0), gl.load(SIN + places, mask=mask, other=0.0)


@gluon.jit
def _rotate_back(x, tables):
    """The gradient of a tile before RoPE, from its gradient after RoPE."""
    even, odd = gl.split(gl.reshape(x, [64, x.shape[1] // 2, 2]))
    cos, sin = tables
    cos, sin = gl.convert_layout(cos, even.type.layout), gl.convert_layout(sin, even.type.layout)
    rotated = gl.reshape(gl.join(even * cos + odd * sin, odd * cos - even * sin), x.shape)
    return gl.convert_layout(rotated, x.type.layout)


@gluon.jit
def _load_outputs(item, GROUP: gl.constexpr, OUT, LOG_SUMS, sizes, S_ROWS: gl.constexpr, C: gl.constexpr):
    """The output and the `log_sums` of an item's queries."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // C.D, C.D // 8], [4, 1], [1, 0])
    H, T, _, _ = sizes
    tile, batch_head = place(item, sizes)
    end = gl.where(item < num_items(sizes), T, 0)
    batch, head = (batch_head // H).to(gl.int64), batch_head % H
    row = first_row(tile, sizes, C) + part(GROUP, item, C) * 64
    rows = row + gl.arange(0, 64, S_ROWS)
    log_sums = gl.load(LOG_SUMS + batch_head.to(gl.int64) * T + rows, mask=exist(rows, end), other=0.0)
    rows = row + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))[:, None]
    columns = gl.arange(0, C.D, gl.SliceLayout(0, LAYOUT))[None, :]
    o = OUT + (batch * T * H + head) * C.D + rows * (H * C.D) + columns
    return gl.load(o, mask=exist(rows, end), other=0.0), log_sums


@gluon.jit
def _add_keys(dq, q, do, slot, tiles, log_sums, deltas, o, row, start, scale, FIRST: gl.constexpr,
              C: gl.constexpr):  # fmt: skip
    """dq and deltas after a tile of keys; FIRST: the last one that a query attends to, which comes first."""
    k, v = matrix(tiles[0].index(slot)), matrix(tiles[1].index(slot))
    zeros = gl.zeros([64, C.tokens], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.tokens, 16]))
    scores = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dweights = warpgroup_mma(do, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if FIRST:
        # The gradient of the softmax subtracts sum(o * do) of its query from every score; the keys' kernel too.
        deltas = gl.sum(o.to(gl.float32) * do.load(o.type.layout).to(gl.float32), 1)
        deltas = gl.convert_layout(deltas, log_sums.type.layout)
    scores = warpgroup_mma_wait(1, [scores])
    weights = gl.exp2(scores * scale - log_sums[:, None])
    weights = masked(weights, 0.0, row, start, C) if FIRST else masked_inside(weights, 0.0, row, start, C)
    dweights = warpgroup_mma_wait(0, [dweights])
    dscores = (weights * (dweights - deltas[:, None])).to(k.dtype)
    dq = warpgroup_mma(gl.convert_layout(dscores, gl.DotOperandLayout(0, dq.type.layout, 2)), k, dq, is_async=True)
    return warpgroup_mma_wait(0, [dq]), deltas


@gluon.jit
def _for_queries(GROUP: gl.constexpr, arguments, C: gl.constexpr):
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.tokens, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.D, 16])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    kept, ring, sizes, own = arguments
    gradient, OUT, LOG_SUMS, DELTAS, COS, SIN, scale, out_scale = own
    DQ, dq_batch, dq_stride, dq_head = gradient
    _, q_tiles, q_ready, q_free = kept
    _, k_tiles, _, k_free = ring
    _, T, _, _ = sizes
    o, log_sums = _load_outputs(0, GROUP, OUT, LOG_SUMS, sizes, S_ROWS, C)
    count = 0
    for item in range(0, num_items(sizes)):
        batch_head, batch, head, row, last, number = own_queries(GROUP, item, sizes, C)
        rows = row + gl.arange(0, 64, S_ROWS)
        dq = gl.zeros([64, C.D], gl.float32, O_LAYOUT)
        q_slot, q_phase = kept_slot(GROUP, item, C)
        q, do = matrix(q_tiles[0].index(q_slot)), matrix(q_tiles[1].index(q_slot))
        mbarrier.wait(q_ready.index(q_slot), q_phase)
        first = gl.minimum(last - row // C.tokens, number - 1)
        count = skip(ring, count, first, C)
        slot = take(ring, count, C)
        start = (last - first) * C.tokens
        dq, deltas = _add_keys(dq, q, do, slot, k_tiles, log_sums, log_sums, o, row, start, scale, True, C)
        mbarrier.arrive(k_free.index(slot))
        count += 1
        gl.store(DELTAS + batch_head.to(gl.int64) * T + rows, deltas, mask=exist(rows, T))
        for i in range(first + 1, number):
            slot = take(ring, count, C)
            start = (last - i) * C.tokens
            dq, deltas = _add_keys(dq, q, do, slot, k_tiles, log_sums, deltas, deltas, row, start, scale, False, C)
            mbarrier.arrive(k_free.index(slot))
            count += 1
        mbarrier.arrive(q_free.index(q_slot))
        # What the next item needs first is loaded while this one ends.
        tables = _load_tables(COS, SIN, row, T, C.D)
        o, log_sums = _load_outputs(item + 1, GROUP, OUT, LOG_SUMS, sizes, S_ROWS, C)
        dq = _rotate_back(dq * out_scale, tables)
        store_tile(DQ + batch.to(gl.int64) * dq_batch + head * dq_head, dq, row, dq_stride, T)


@gluon.jit(do_not_specialize=INTEGERS)
def _query_gradients(q_desc, do_desc, k_desc, v_desc, DQ, dq_batch, dq_stride, dq_head, OUT, LOG_SUMS, DELTAS,
                     COS, SIN, H, T, tiles, batch_heads, scale, out_scale,
                     C: gl.constexpr):  # fmt: skip
    ONE: gl.constexpr = 1
    KEPT: gl.constexpr = C.parts * C.kept_slots
    kept, ring = stream((q_desc, do_desc), KEPT, ONE), stream((k_desc, v_desc), C.slots, C.parts)
    own = (DQ, dq_batch, dq_stride, dq_head), OUT, LOG_SUMS, DELTAS, COS, SIN, scale, out_scale
    COMPUTE: gl.constexpr = _for_queries
    COPY: gl.constexpr = copy_keys
    NO_LAG: gl.constexpr = 0
    specialize(COMPUTE, COPY, NO_LAG, (kept, ring, (H, T, tiles, batch_heads), own), C)


def query_gradients(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sums: Tensor, deltas: Tensor, do: Tensor, dq: Tensor, cos: Tensor,
    sin: Tensor, window: int
) -> None:  # fmt: skip
    """Compute `dq`, and `deltas` (B, H, T), which the gradients of keys need; see `flash_attention.backward`."""
    shape, scale = _QUERY_GRADIENT_SHAPES[q.shape[3]], 1 / math.sqrt(q.shape[3])
    descriptors = *(descriptor(x, 64) for x in (q, do)), *(descriptor(x, shape[1]) for x in (k, v))
    arguments = *descriptors, dq, *dq.stride()[:3], o, log_sums, deltas, cos, sin
    launch(_query_gradients, arguments, q, k, q.shape[2], (LOG2_E * scale, scale), window, shape)


@gluon.jit
def _query_tiles(tile, T, C: gl.constexpr):
    """The first and the number of the tiles of queries that attend to a tile of keys."""
    KEYS: gl.constexpr = C.parts * 64
    end = T
    if C.window > 0:
        end = gl.minimum(end, tile * KEYS + KEYS + C.window - 1)
    first = tile * C.parts
    return first, gl.cdiv(end, 64) - first


@gluon.jit
def _copy_queries(NO_LAG: gl.constexpr, arguments, C: gl.constexpr):
    """The copying warp of the kernel that keeps keys and values."""
    kept, ring, sizes, own = arguments
    descs, vector_tiles, sums_stride = own[0]
    _, _, q_ready, _ = ring
    H, T, _, _ = sizes
    count = 0
    for item in range(0, num_items(sizes)):
        tile, batch_head = place(item, sizes)
        batch, head = batch_head // (H // C.group), batch_head % (H // C.group)
        for i in gl.static_range(C.parts):
            slot, phase = kept_slot(i, item, C)
            load(kept, slot, phase, (batch, (tile * C.parts + part(i, item, C)) * 64, head))
        first, number = _query_tiles(tile, T, C)
        for q_head in range(head * C.group, (head + 1) * C.group):
            for j in range(0, number):
                slot, start = count % C.slots, (first + j) * 64
                load(ring, slot, (count // C.slots) & 1, (batch, start, q_head), 0, 2 * 64 * 4)
                corner = ((batch * H + q_head) * sums_stride + start,)
                for i in gl.static_range(2):
                    load_tile(descs[i], corner, q_ready.index(slot), vector_tiles[i].index(slot))
                count += 1


@gluon.jit
def _for_keys(GROUP: gl.constexpr, arguments, C: gl.constexpr):
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    kept, ring, sizes, own = arguments
    vectors, k_gradient, v_gradient, COS, SIN, scale, out_scale = own
    DK, dk_batch, dk_stride, dk_head = k_gradient
    DV, dv_batch, dv_stride, dv_head = v_gradient
    dtype: gl.constexpr = DK.dtype.element_ty
    _, k_tiles, k_ready, k_free = kept
    _, q_tiles, _, q_free = ring
    _, vector_tiles, _ = vectors
    H, T, _, _ = sizes
    zeros = gl.zeros([64, 64], gl.float32, S_LAYOUT)
    inverse_scale = 1 / scale
    count = 0
    for item in range(0, num_items(sizes)):
        tile, batch_head = place(item, sizes)
        batch, head = batch_head // (H // C.group), batch_head % (H // C.group)
        own_part = part(GROUP, item, C)
        key = (tile * C.parts + own_part) * 64
        first, number = _query_tiles(tile, T, C)
        skipped = gl.where(key < T, gl.minimum(own_part, number), number)  # queries before all of these keys
        k_slot, k_phase = kept_slot(GROUP, item, C)
        k, v = matrix(k_tiles[0].index(k_slot)), matrix(k_tiles[1].index(k_slot))
        mbarrier.wait(k_ready.index(k_slot), k_phase)
        dk = gl.zeros([64, C.D], gl.float32, O_LAYOUT)
        dv = gl.zeros([64, C.D], gl.float32, O_LAYOUT)
        for shared in range(0, C.group):  # noqa: B007
            count = skip(ring, count, skipped, C)
            for i in range(skipped, number):
                slot = take(ring, count, C)
                start = (first + i) * 64
                q, do = matrix(q_tiles[0].index(slot)), matrix(q_tiles[1].index(slot))
                # What is subtracted from each column is there before the products are added to it. Opaque: else the
                # compiler copies registers between the two products, and waits for the first.
                log_sums = opaque(zeros - vector_tiles[0].index(slot).load(COLUMNS)[None, :] * inverse_scale)
                deltas = opaque(zeros - vector_tiles[1].index(slot).load(COLUMNS)[None, :])
                scores = warpgroup_mma(k, q.permute((1, 0)), log_sums, is_async=True)
                dweights = warpgroup_mma(v, do.permute((1, 0)), deltas, is_async=True)
                scores = warpgroup_mma_wait(1, [scores])
                weights = gl.exp2(scores * scale)
                # Behind the end there are no queries, but numbers of the next head in the vectors.
                cuts = (start < key + 64) | (start + 64 > T)
                if C.window > 0:
                    cuts = cuts | (key + C.window < start + 64)
                if cuts:
                    keys = opaque(key - start + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT)))[:, None]
                    rows = gl.arange(0, 64, COLUMNS)
                    seen = visible(rows[None, :], keys, C) & (rows[None, :] < T - start)
                    weights = gl.where(seen, weights, 0.0)
                dv = warpgroup_mma(gl.convert_layout(weights.to(dtype), P_LAYOUT), do, dv, is_async=True)
                dweights = warpgroup_mma_wait(1, [dweights])
                dscores = (weights * dweights).to(dtype)
                dk = warpgroup_mma(gl.convert_layout(dscores, P_LAYOUT), q, dk, is_async=True)
                dk, dv = warpgroup_mma_wait(0, [dk, dv])
                mbarrier.arrive(q_free.index(slot))
                count += 1
        mbarrier.arrive(k_free.index(k_slot))
        tables = _load_tables(COS, SIN, key, T, C.D)
        store_tile(DV + batch.to(gl.int64) * dv_batch + head * dv_head, dv, key, dv_stride, T)
        dk = _rotate_back(dk * out_scale, tables)
        store_tile(DK + batch.to(gl.int64) * dk_batch + head * dk_head, dk, key, dk_stride, T)


@gluon.jit(do_not_specialize=[*INTEGERS, "sums_stride"])
def _key_gradients(q_desc, do_desc, k_desc, v_desc, sums_desc, deltas_desc, sums_stride, DK, dk_batch, dk_stride,
                   dk_head, DV, dv_batch, dv_stride, dv_head, COS, SIN, H, T, tiles, batch_heads, scale,
                   out_scale, C: gl.constexpr):  # fmt: skip
    ONE: gl.constexpr = 1
    KEPT: gl.constexpr = C.parts * C.kept_slots
    kept, ring = stream((k_desc, v_desc), KEPT, ONE), stream((q_desc, do_desc), C.slots, C.parts)
    vector_tiles = tile_memory(sums_desc, C.slots), tile_memory(deltas_desc, C.slots)
    vectors = (sums_desc, deltas_desc), vector_tiles, sums_stride
    k_gradient, v_gradient = (DK, dk_batch, dk_stride, dk_head), (DV, dv_batch, dv_stride, dv_head)
    own = vectors, k_gradient, v_gradient, COS, SIN, scale, out_scale
    COMPUTE: gl.constexpr = _for_keys
    COPY: gl.constexpr = _copy_queries
    NO_LAG: gl.constexpr = 0
    specialize(COMPUTE, COPY, NO_LAG, (kept, ring, (H, T, tiles, batch_heads), own), C)


def key_gradients(
    q: Tensor, k: Tensor, v: Tensor, log_sums: Tensor, deltas: Tensor, do: Tensor, dk: Tensor, dv: Tensor, cos: Tensor,
    sin: Tensor, window: int
) -> None:  # fmt: skip
    """Compute `dk` and `dv`; see `flash_attention.backward`."""
    B, T, H, D = q.shape
    scale = 1 / math.sqrt(D)
    if padding := -T % 4:  # the copy engine reads from addresses that are divisible by 16
        log_sums, deltas = (torch.cat((x, x.new_zeros(B, H, padding)), 2) for x in (log_sums, deltas))
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    vectors = (TensorDescriptor(x, [x.numel()], [1], [64], layout) for x in (log_sums, deltas))
    descriptors = *(descriptor(x, 64) for x in (q, do, k, v)), *vectors
    arguments = *descriptors, T + padding, dk, *dk.stride()[:3], dv, *dv.stride()[:3], cos, sin
    scales, shape = (LOG2_E * scale, scale), _KEY_GRADIENT_SHAPES[D]
    launch(_key_gradients, arguments, q, k, k.shape[2], scales, window, shape)
