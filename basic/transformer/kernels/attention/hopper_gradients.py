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
    REGISTERS,
    SLOTS,
    TILE,
    barriers,
    coalesced,
    copy_keys,
    descriptor,
    forward,
    launch,
    load,
    load_starts,
    load_tile,
    masked,
    masked_inside,
    matrix,
    num_items,
    num_key_tiles,
    opaque,
    place,
    store_tile,
    supports,
    tile_memory,
    visible,
)
from basic.transformer.kernels.interpreter import LOG2_E

__all__ = ["forward", "key_gradients", "query_gradients", "supports"]

QUERIES, KEY_SLOTS = gl.constexpr(64), gl.constexpr(3)
"""Tokens per tile, and slots, of the ring for the gradients of keys and values."""


@gluon.jit
def _load_tables(COS, SIN, row, T, D: gl.constexpr):
    """RoPE's cosines and sines of 64 tokens."""
    PAIRS: gl.constexpr = D // 2
    LAYOUT: gl.constexpr = coalesced(PAIRS, 4)
    rows = row + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))[:, None]
    places = rows * PAIRS + gl.arange(0, PAIRS, gl.SliceLayout(0, LAYOUT))[None, :]
    mask = rows < T
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
def _load_outputs(item, GROUP: gl.constexpr, OUT, LOG_SUMS, sizes, LAYOUT: gl.constexpr, S_ROWS: gl.constexpr,
                  D: gl.constexpr):
    """The output and the `log_sums` of an item's queries."""
    H, T, tiles, batch_heads = sizes
    tile, batch_head, _ = place(item, tiles)
    end = gl.where(batch_head < batch_heads, T, 0)
    batch, head, row = (batch_head // H).to(gl.int64), batch_head % H, tile * TILE + GROUP * 64
    rows = row + gl.arange(0, 64, S_ROWS)
    log_sums = gl.load(LOG_SUMS + batch_head.to(gl.int64) * T + rows, mask=rows < end, other=0.0)
    rows = row + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))[:, None]
    columns = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :]
    o = OUT + (batch * T * H + head) * D + rows * (H * D) + columns
    return gl.load(o, mask=rows < end, other=0.0), log_sums


@gluon.jit
def _add_keys(dq, q, do, k, v, log_sums, deltas, o, row, start, starts, scale, KEYS: gl.constexpr, FIRST: gl.constexpr,
              C: gl.constexpr):  # fmt: skip
    """dq and deltas after a tile of keys, or the first KEYS of it; FIRST: of the last tile, which comes first."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, dq.type.layout, 2)
    if KEYS < TILE:
        k, v = k.slice(0, KEYS), v.slice(0, KEYS)
    zeros = gl.zeros([64, KEYS], gl.float32, S_LAYOUT)
    scores = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dweights = warpgroup_mma(do, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if FIRST:
        # The gradient of the softmax subtracts sum(o * do) of its query from every score; the keys' kernel too.
        deltas = gl.sum(o.to(gl.float32) * do.load(o.type.layout).to(gl.float32), 1)
        deltas = gl.convert_layout(deltas, log_sums.type.layout)
    scores = warpgroup_mma_wait(1, [scores])
    weights = gl.exp2(scores * scale - gl.convert_layout(log_sums, S_ROWS)[:, None])
    if FIRST:
        weights = masked(weights, 0.0, row, start, gl.convert_layout(starts, S_ROWS), C)
    else:
        weights = masked_inside(weights, 0.0, row, start, starts, C)
    dweights = warpgroup_mma_wait(0, [dweights])
    dscores = (weights * (dweights - gl.convert_layout(deltas, S_ROWS)[:, None])).to(k.dtype)
    dq = warpgroup_mma(gl.convert_layout(dscores, P_LAYOUT), k, dq, is_async=True)
    return warpgroup_mma_wait(0, [dq]), deltas


@gluon.jit
def _for_queries(GROUP: gl.constexpr, gradient, OUT, LOG_SUMS, DELTAS, COS, SIN, STARTS, kept, ring,
                 sizes, scale, out_scale, C: gl.constexpr):  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.D, 16])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    LAST_KEYS: gl.constexpr = (GROUP + 1) * 64  # of the last tile: the first group sees half of it
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // C.D, C.D // 8], [4, 1], [1, 0])
    DQ, dq_batch, dq_stride, dq_head = gradient
    _, q_tiles, q_ready, q_free = kept
    _, k_tiles, k_ready, k_free = ring[0]
    H, T, tiles, batch_heads = sizes
    q, do = matrix(q_tiles[0].index(GROUP)), matrix(q_tiles[1].index(GROUP))
    o, log_sums = _load_outputs(0, GROUP, OUT, LOG_SUMS, sizes, LOADED, S_ROWS, C.D)
    count = 0
    turn = 0
    for item in range(0, num_items(tiles, batch_heads)):
        tile, batch_head, exists = place(item, tiles)
        if exists:
            batch, head = batch_head // H, batch_head % H
            row = tile * TILE + GROUP * 64
            number = num_key_tiles(tile, batch, T, STARTS, C)
            rows = row + gl.arange(0, 64, S_ROWS)
            starts = load_starts(STARTS, batch, rows, T, C)
            dq = gl.zeros([64, C.D], gl.float32, O_LAYOUT)
            mbarrier.wait(q_ready.index(GROUP), turn & 1)
            slot = count % SLOTS
            mbarrier.wait(k_ready.index(slot), (count // SLOTS) & 1)
            k, v = matrix(k_tiles[0].index(slot)), matrix(k_tiles[1].index(slot))
            dq, deltas = _add_keys(dq, q, do, k, v, log_sums, log_sums, o, row, tile * TILE, starts, scale, LAST_KEYS,
                                   True, C)  # fmt: skip
            mbarrier.arrive(k_free.index(slot))
            count += 1
            gl.store(DELTAS + batch_head.to(gl.int64) * T + rows, deltas, mask=rows < T)
            for i in range(1, number):
                slot = count % SLOTS
                mbarrier.wait(k_ready.index(slot), (count // SLOTS) & 1)
                k, v = matrix(k_tiles[0].index(slot)), matrix(k_tiles[1].index(slot))
                dq, deltas = _add_keys(dq, q, do, k, v, log_sums, deltas, deltas, row, (tile - i) * TILE, starts, scale,
                                       TILE, False, C)  # fmt: skip
                mbarrier.arrive(k_free.index(slot))
                count += 1
            mbarrier.arrive(q_free.index(GROUP))
            turn += 1
            # What the next item needs first is loaded while this one ends.
            tables = _load_tables(COS, SIN, row, T, C.D)
            o, log_sums = _load_outputs(item + 1, GROUP, OUT, LOG_SUMS, sizes, LOADED, S_ROWS, C.D)
            dq = _rotate_back(dq * out_scale, tables)
            store_tile(DQ + batch.to(gl.int64) * dq_batch + head * dq_head, dq, row, dq_stride, T)
        else:
            o, log_sums = _load_outputs(item + 1, GROUP, OUT, LOG_SUMS, sizes, LOADED, S_ROWS, C.D)


@gluon.jit(do_not_specialize=INTEGERS)
def _query_gradients(q_desc, do_desc, k_desc, v_desc, DQ, dq_batch, dq_stride, dq_head, OUT, LOG_SUMS, DELTAS,
                     COS, SIN, STARTS, H, T, tiles, batch_heads, scale, out_scale,
                     C: gl.constexpr):  # fmt: skip
    kept = (q_desc, do_desc), (tile_memory(q_desc, 2), tile_memory(do_desc, 2)), barriers(2, 1), barriers(2, 1)
    keys_and_values = tile_memory(k_desc, SLOTS), tile_memory(v_desc, SLOTS)
    ring = (((k_desc, v_desc), keys_and_values, barriers(SLOTS, 1), barriers(SLOTS, 2)),)
    gradient = DQ, dq_batch, dq_stride, dq_head
    sizes = H, T, tiles, batch_heads
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    gl.warp_specialize([
        (_for_queries, (FIRST, gradient, OUT, LOG_SUMS, DELTAS, COS, SIN, STARTS, kept, ring, sizes,
                        scale, out_scale, C)),
        (_for_queries, (SECOND, gradient, OUT, LOG_SUMS, DELTAS, COS, SIN, STARTS, kept, ring, sizes,
                        scale, out_scale, C)),
        (copy_keys, (kept, ring, STARTS, sizes, C)),
    ], [4, 1], REGISTERS)  # fmt: skip


def query_gradients(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sums: Tensor, deltas: Tensor, do: Tensor, dq: Tensor, cos: Tensor,
    sin: Tensor, window: int, starts: Tensor | None
) -> None:  # fmt: skip
    """Compute `dq`, and `deltas` (B, H, T), which the gradients of keys need; see `flash_attention.backward`."""
    tokens, scale = TILE.value, 1 / math.sqrt(q.shape[3])
    descriptors = *(descriptor(x, tokens // 2) for x in (q, do)), *(descriptor(x, tokens) for x in (k, v))
    arguments = *descriptors, dq, *dq.stride()[:3], o, log_sums, deltas, cos, sin
    launch(_query_gradients, arguments, q, k, q.shape[2], (LOG2_E * scale, scale), window, starts)


@gluon.jit
def _query_tiles(tile, batch, T, ENDS, C: gl.constexpr):
    """The first and the number of the tiles of queries that attend to a tile of keys."""
    end = T
    if C.window > 0:
        end = gl.minimum(end, tile * TILE + TILE + C.window - 1)
    if C.packed:  # no query behind the document of the last key
        end = gl.minimum(end, gl.load(ENDS + batch * T + gl.minimum(tile * TILE + TILE, T) - 1))
    first = tile * TILE // QUERIES
    return first, gl.cdiv(end, QUERIES) - first


@gluon.jit
def _copy_queries(kept, ring, vectors, sums_stride, ENDS, sizes, C: gl.constexpr):
    """The copying warp of the kernel that keeps keys and values."""
    descs, vector_tiles = vectors
    _, _, q_ready, _ = ring
    H, T, tiles, batch_heads = sizes
    count = 0
    turn = 0
    for item in range(0, num_items(tiles, batch_heads)):
        tile, batch_head, exists = place(item, tiles)
        if exists:
            batch, head = batch_head // (H // C.group), batch_head % (H // C.group)
            for i in gl.static_range(2):
                load(kept, i, turn & 1, (batch, tile * TILE + i * 64, head, 0))
            turn += 1
            first, number = _query_tiles(tile, batch, T, ENDS, C)
            for q_head in range(head * C.group, (head + 1) * C.group):
                for j in range(0, number):
                    slot, start = count % KEY_SLOTS, (first + j) * QUERIES
                    load(ring, slot, (count // KEY_SLOTS) & 1, (batch, start, q_head, 0), 2 * QUERIES * 4)
                    corner = ((batch * H + q_head) * sums_stride + start,)
                    for i in gl.static_range(2):
                        load_tile(descs[i], corner, q_ready.index(slot), vector_tiles[i].index(slot))
                    count += 1


@gluon.jit
def _for_keys(GROUP: gl.constexpr, k_gradient, v_gradient, COS, SIN, STARTS, ENDS, kept, ring, vectors, sizes, scale,
              out_scale, C: gl.constexpr):  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUERIES, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    DK, dk_batch, dk_stride, dk_head = k_gradient
    DV, dv_batch, dv_stride, dv_head = v_gradient
    dtype: gl.constexpr = DK.dtype.element_ty
    _, k_tiles, k_ready, k_free = kept
    _, q_tiles, q_ready, q_free = ring
    _, vector_tiles = vectors
    H, T, tiles, batch_heads = sizes
    k, v = matrix(k_tiles[0].index(GROUP)), matrix(k_tiles[1].index(GROUP))
    zeros = gl.zeros([64, QUERIES], gl.float32, S_LAYOUT)
    inverse_scale = 1 / scale
    SKIPPED: gl.constexpr = GROUP * 64 // QUERIES  # tiles of queries before all keys of the second group
    count = 0
    turn = 0
    for item in range(0, num_items(tiles, batch_heads)):
        tile, batch_head, exists = place(item, tiles)
        if exists:
            batch, head = batch_head // (H // C.group), batch_head % (H // C.group)
            key = tile * TILE + GROUP * 64
            first, number = _query_tiles(tile, batch, T, ENDS, C)
            mbarrier.wait(k_ready.index(GROUP), turn & 1)
            dk = gl.zeros([64, C.D], gl.float32, O_LAYOUT)
            dv = gl.zeros([64, C.D], gl.float32, O_LAYOUT)
            for shared in range(0, C.group):  # noqa: B007
                for skipped in gl.static_range(SKIPPED):  # noqa: B007
                    mbarrier.wait(q_ready.index(count % KEY_SLOTS), (count // KEY_SLOTS) & 1)
                    mbarrier.arrive(q_free.index(count % KEY_SLOTS))
                    count += 1
                for i in range(SKIPPED, number):
                    slot = count % KEY_SLOTS
                    start = (first + i) * QUERIES
                    q, do = matrix(q_tiles[0].index(slot)), matrix(q_tiles[1].index(slot))
                    mbarrier.wait(q_ready.index(slot), (count // KEY_SLOTS) & 1)
                    # What is subtracted from each column is there before the products are added to it. Opaque: else the
                    # compiler copies registers between the two products, and waits for the first.
                    log_sums = opaque(zeros - vector_tiles[0].index(slot).load(COLUMNS)[None, :] * inverse_scale)
                    deltas = opaque(zeros - vector_tiles[1].index(slot).load(COLUMNS)[None, :])
                    scores = warpgroup_mma(k, q.permute((1, 0)), log_sums, is_async=True)
                    dweights = warpgroup_mma(v, do.permute((1, 0)), deltas, is_async=True)
                    scores = warpgroup_mma_wait(1, [scores])
                    weights = gl.exp2(scores * scale)
                    # Behind the end there are no queries, but numbers of the next head in the vectors.
                    cuts = (start < key + 64) | (start + QUERIES > T)
                    if C.window > 0:
                        cuts = cuts | (key + C.window < start + QUERIES)
                    if cuts or C.packed:
                        keys = opaque(key - start + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT)))[:, None]
                        rows = gl.arange(0, QUERIES, COLUMNS)
                        starts = load_starts(STARTS, batch, start + rows, T, C) - start
                        seen = visible(rows[None, :], keys, starts[None, :], C) & (rows[None, :] < T - start)
                        weights = gl.where(seen, weights, 0.0)
                    dv = warpgroup_mma(gl.convert_layout(weights.to(dtype), P_LAYOUT), do, dv, is_async=True)
                    dweights = warpgroup_mma_wait(1, [dweights])
                    dscores = (weights * dweights).to(dtype)
                    dk = warpgroup_mma(gl.convert_layout(dscores, P_LAYOUT), q, dk, is_async=True)
                    dk, dv = warpgroup_mma_wait(0, [dk, dv])
                    mbarrier.arrive(q_free.index(slot))
                    count += 1
            mbarrier.arrive(k_free.index(GROUP))
            turn += 1
            tables = _load_tables(COS, SIN, key, T, C.D)
            store_tile(DV + batch.to(gl.int64) * dv_batch + head * dv_head, dv, key, dv_stride, T)
            dk = _rotate_back(dk * out_scale, tables)
            store_tile(DK + batch.to(gl.int64) * dk_batch + head * dk_head, dk, key, dk_stride, T)


@gluon.jit(do_not_specialize=[*INTEGERS, "sums_stride"])
def _key_gradients(q_desc, do_desc, k_desc, v_desc, sums_desc, deltas_desc, sums_stride, DK, dk_batch, dk_stride,
                   dk_head, DV, dv_batch, dv_stride, dv_head, COS, SIN, ENDS, STARTS, H, T, tiles, batch_heads, scale,
                   out_scale, C: gl.constexpr):  # fmt: skip
    kept = (k_desc, v_desc), (tile_memory(k_desc, 2), tile_memory(v_desc, 2)), barriers(2, 1), barriers(2, 1)
    queries = tile_memory(q_desc, KEY_SLOTS), tile_memory(do_desc, KEY_SLOTS)
    ring = (q_desc, do_desc), queries, barriers(KEY_SLOTS, 1), barriers(KEY_SLOTS, 2)
    vectors = (sums_desc, deltas_desc), (tile_memory(sums_desc, KEY_SLOTS), tile_memory(deltas_desc, KEY_SLOTS))
    k_gradient, v_gradient = (DK, dk_batch, dk_stride, dk_head), (DV, dv_batch, dv_stride, dv_head)
    sizes = H, T, tiles, batch_heads
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    gl.warp_specialize([
        (_for_keys, (FIRST, k_gradient, v_gradient, COS, SIN, STARTS, ENDS, kept, ring, vectors, sizes, scale,
                     out_scale, C)),
        (_for_keys, (SECOND, k_gradient, v_gradient, COS, SIN, STARTS, ENDS, kept, ring, vectors, sizes, scale,
                     out_scale, C)),
        (_copy_queries, (kept, ring, vectors, sums_stride, ENDS, sizes, C)),
    ], [4, 1], REGISTERS)  # fmt: skip


def key_gradients(
    q: Tensor, k: Tensor, v: Tensor, log_sums: Tensor, deltas: Tensor, do: Tensor, dk: Tensor, dv: Tensor, cos: Tensor,
    sin: Tensor, window: int, starts: Tensor | None, ends: Tensor
) -> None:  # fmt: skip
    """Compute `dk` and `dv`; see `flash_attention.backward`."""
    (B, T, H, _), kept, scale = q.shape, TILE.value // 2, 1 / math.sqrt(q.shape[3])
    if padding := -T % 4:  # the copy engine reads from addresses that are divisible by 16
        log_sums, deltas = (torch.cat((x, x.new_zeros(B, H, padding)), 2) for x in (log_sums, deltas))
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    vectors = (TensorDescriptor(x, [x.numel()], [1], [QUERIES.value], layout) for x in (log_sums, deltas))
    descriptors = *(descriptor(x, QUERIES.value) for x in (q, do)), *(descriptor(x, kept) for x in (k, v)), *vectors
    arguments = *descriptors, T + padding, dk, *dk.stride()[:3], dv, *dv.stride()[:3], cos, sin, ends
    launch(_key_gradients, arguments, q, k, k.shape[2], (LOG2_E * scale, scale), window, starts)
