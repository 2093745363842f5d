"""Gradients of queries in causal attention for Hopper GPUs, in Gluon, with the plan of `hopper`."""

from __future__ import annotations

import math

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from basic.transformer.kernels.attention.hopper import (
    HEAD_SIZE,
    INTEGERS,
    REGISTERS,
    SLOTS,
    TILE,
    barriers,
    copy_keys,
    descriptor,
    forward,
    launch,
    load_starts,
    masked,
    matrix,
    num_items,
    num_key_tiles,
    place,
    store_tile,
    supports,
    tile_memory,
)
from basic.transformer.kernels.interpreter import LOG2_E

__all__ = ["forward", "query_gradients", "supports"]


@gluon.jit
def _rotate_back(x, row, COS, SIN, T):
    """The gradient of a tile before RoPE, from its gradient after RoPE."""
    ROWS: gl.constexpr = x.shape[0]
    PAIRS: gl.constexpr = x.shape[1] // 2
    even, odd = gl.split(gl.reshape(x, [ROWS, PAIRS, 2]))
    LAYOUT: gl.constexpr = even.type.layout
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))[:, None]
    pairs = gl.arange(0, PAIRS, gl.SliceLayout(0, LAYOUT))[None, :]
    mask = rows < T
    cos = gl.load(COS + rows * PAIRS + pairs, mask=mask, other=0.0)
    sin = gl.load(SIN + rows * PAIRS + pairs, mask=mask, other=0.0)
    rotated = gl.reshape(gl.join(even * cos + odd * sin, odd * cos - even * sin), [ROWS, 2 * PAIRS])
    return gl.convert_layout(rotated, x.type.layout)


@gluon.jit
def _for_queries(GROUP: gl.constexpr, gradient, OUT, LOG_SUMS, DELTAS, COS, SIN, STARTS, kept, ring,
                 sizes, scale, out_scale, C: gl.constexpr):  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_SIZE, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_SIZE, HEAD_SIZE // 8], [4, 1], [1, 0])
    DQ, dq_batch, dq_stride, dq_head = gradient
    _, q_tiles, q_ready, q_free = kept
    _, k_tiles, k_ready, k_free = ring[0]
    H, T, tiles, batch_heads = sizes
    q, do = matrix(q_tiles[0].index(GROUP)), matrix(q_tiles[1].index(GROUP))
    zeros = gl.zeros([64, TILE], gl.float32, S_LAYOUT)
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
            sums = batch_head.to(gl.int64) * T
            log_sums = gl.load(LOG_SUMS + sums + rows, mask=rows < T, other=0.0)
            o_rows = row + gl.arange(0, 64, gl.SliceLayout(1, LOADED))[:, None]
            columns = gl.arange(0, HEAD_SIZE, gl.SliceLayout(0, LOADED))[None, :]
            o = OUT + (batch.to(gl.int64) * T * H + head) * HEAD_SIZE + o_rows * (H * HEAD_SIZE) + columns
            o = gl.load(o, mask=o_rows < T, other=0.0)
            mbarrier.wait(q_ready.index(GROUP), turn & 1)
            # The gradient of the softmax subtracts sum(o * do) of its query from every score; the keys' kernel too.
            deltas = gl.sum(o.to(gl.float32) * do.load(LOADED).to(gl.float32), 1)
            deltas = gl.convert_layout(deltas, S_ROWS)
            gl.store(DELTAS + sums + rows, deltas, mask=rows < T)
            dq = gl.zeros([64, HEAD_SIZE], gl.float32, O_LAYOUT)
            for i in range(0, number):
                slot = count % SLOTS
                start = (tile - i) * TILE
                mbarrier.wait(k_ready.index(slot), (count // SLOTS) & 1)
                k, v = matrix(k_tiles[0].index(slot)), matrix(k_tiles[1].index(slot))
                scores = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
                dweights = warpgroup_mma(do, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
                scores = warpgroup_mma_wait(1, [scores])
                weights = gl.exp2(scores * scale - log_sums[:, None])
                cuts = start + TILE > row
                if C.window > 0:
                    cuts = cuts | (start + C.window < row + 64)
                if cuts or C.packed:
                    weights = masked(weights, 0.0, row, start, starts, C)
                dweights = warpgroup_mma_wait(0, [dweights])
                dscores = gl.convert_layout((weights * (dweights - deltas[:, None])).to(k.dtype), P_LAYOUT)
                dq = warpgroup_mma(dscores, k, dq, is_async=True)
                dq = warpgroup_mma_wait(0, [dq])
                mbarrier.arrive(k_free.index(slot))
                count += 1
            mbarrier.arrive(q_free.index(GROUP))
            turn += 1
            dq = _rotate_back(dq * out_scale, row, COS, SIN, T)
            store_tile(DQ + batch.to(gl.int64) * dq_batch + head * dq_head, dq, row, dq_stride, T)


@gluon.jit(do_not_specialize=INTEGERS)
def _query_gradients(q_desc, k_desc, v_desc, do_desc, DQ, dq_batch, dq_stride, dq_head, OUT, LOG_SUMS, DELTAS,
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
    arguments = descriptor(do, TILE.value // 2), dq, *dq.stride()[:3], o, log_sums, deltas, cos, sin
    scale = 1 / math.sqrt(HEAD_SIZE.value)
    launch(_query_gradients, q, k, v, arguments, (LOG2_E * scale, scale), window, starts)
