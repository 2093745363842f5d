"""Causal attention for Hopper GPUs (H100, H200) in Gluon, with the copy engine and specialised warps.

`flash_attention` describes the algorithms, which are the same here, and calls these kernels for head sizes of 64 and 128,
where they are faster. What they do differently is the order of the work:

- A program keeps a tile of 128 queries. Two groups of four warps compute, each with half of it, and one warp only
  starts the copy engine. The tiles of keys and values come in a ring of slots in shared memory. Two barriers a slot say
  when it is `ready` (loaded) and when it is `free` (read by both groups), so that the groups need not wait for each
  other: while one computes exponentials, the other keeps the matrix units busy.
- There are as many programs as multiprocessors. Each takes pairs of tiles, one with much to do and one with little, so
  that all take the same time, and the copy engine loads the next tiles while the last ones end.

The copy engine reads zeros for tokens behind the end.

Legend: as in `flash_attention`; `row` is the first query of a group, `start` the first key of a tile, C are the
`Constants`. `count` is the number of tiles that went through the ring, and `turn` that of tiles kept. A barrier's
phases are 0 and 1 in turn; who waits for phase 1 of a new barrier goes on at once.

Source: Shah et al. 2024, "FlashAttention-3", algorithms 1 and 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from basic.transformer.kernels.interpreter import LOG2_E

REGISTERS = gl.constexpr((240, 24))
"""Of a thread of the second group, and of the copying warp; the first group takes the rest."""
INTEGERS = ["H", "T", "tiles", "batch_heads"]
"""Arguments whose values do not change a kernel's code."""
TILE, SLOTS = gl.constexpr(128), gl.constexpr(2)
"""Tokens per tile, and slots of the ring. Others are slower or do not fit into shared memory."""

load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # since Triton 3.7, and before


@dataclass(frozen=True)
class Constants:
    """What a kernel is compiled for."""

    group: gl.constexpr  # number of query heads that share keys
    window: gl.constexpr
    packed: gl.constexpr
    D: gl.constexpr


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    memory = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(memory.index(i), ARRIVALS)
    return memory


@gluon.jit
def tile_memory(desc, COUNT: gl.constexpr):
    return gl.allocate_shared_memory(desc.dtype, [COUNT] + desc.block_type.shape, desc.layout)  # noqa: RUF005 - unknown to Gluon


@gluon.jit
def matrix(tile):
    """A tile (1, tokens, 1, features) as (tokens, features)."""
    return tile.reshape([tile.shape[1], tile.shape[3]])


@gluon.jit
def num_items(tiles, batch_heads):
    return gl.cdiv(gl.cdiv(tiles, 2) * batch_heads - gl.program_id(0), gl.num_programs(0)) * 2


@gluon.jit
def place(item, tiles):
    """The tile of this program's item, its batch and head, and False for the second of a pair of one tile."""
    pair = gl.program_id(0) + item // 2 * gl.num_programs(0)
    pairs = gl.cdiv(tiles, 2)
    first = pair % pairs
    tile = gl.where(item % 2 == 0, tiles - 1 - first, first)
    return tile, pair // pairs, (item % 2 == 0) | (tiles - 1 - first != first)


@gluon.jit
def num_key_tiles(tile, batch, T, STARTS, C: gl.constexpr):
    """The number of the tiles of keys that a tile of queries attends to."""
    first = 0
    if C.window > 0:
        first = gl.maximum(tile * TILE - C.window + 1, 0)
    if C.packed:
        first = gl.maximum(first, gl.load(STARTS + batch * T + tile * TILE))
    return tile - first // TILE + 1


@gluon.jit
def opaque(x):
    """x. The compiler computes nothing that depends on it before what stands before this."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)


@gluon.jit
def visible(rows, keys, starts, C: gl.constexpr):
    """Whether a query may attend to a key."""
    result = rows >= keys
    if C.window > 0:
        result &= rows - keys < C.window
    if C.packed:
        result &= keys >= starts
    return result


@gluon.jit
def masked(x, other, row, start, starts, C: gl.constexpr):
    """x of queries from `row` and keys from `start`, with `other` where a query may not attend to a key."""
    LAYOUT: gl.constexpr = x.type.layout
    # Opaque: else the compiler computes the mask while it waits for x, and packs it into bits.
    rows = opaque(row - start + gl.arange(0, x.shape[0], gl.SliceLayout(1, LAYOUT)))[:, None]
    keys = gl.arange(0, x.shape[1], gl.SliceLayout(0, LAYOUT))[None, :]
    return gl.where(visible(rows, keys, (starts - start)[:, None], C), x, other)


@gluon.jit
def masked_inside(x, other, row, start, starts, C: gl.constexpr):
    """The same of tiles before the last one, which only a window and documents cut."""
    if C.window > 0 or C.packed:
        REACH: gl.constexpr = 0 if C.packed else C.window  # documents may cut any tile
        if start + REACH < row + 64:
            x = masked(x, other, row, start, starts, C)
    return x


@gluon.jit
def load_starts(STARTS, batch, rows, T, C: gl.constexpr):
    """The index of the first token of each query's document."""
    if C.packed:
        return gl.load(STARTS + batch * T + rows, mask=rows < T, other=T)
    return rows


@gluon.constexpr_function
def coalesced(D, neighbours):
    """The layout of 64 rows of D numbers, of which a thread has neighbours, and a warp the rows it has in a product."""
    width = neighbours.bit_length() - 1
    columns = [[0, 1 << i] for i in range(D.bit_length() - 1)]
    lanes, registers = columns[width : width + 2], columns[:width] + columns[width + 2 :]
    rows = [[1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([*registers, [8, 0]], [*lanes, *rows], [[16, 0], [32, 0]], [], [64, D])


@gluon.jit
def store_tile(X, value, row, stride, T):
    # In the layout of a product, a warp would touch eight rows for four bytes a thread.
    value = gl.convert_layout(value.to(X.dtype.element_ty), coalesced(value.shape[1], 8))
    LAYOUT: gl.constexpr = value.type.layout
    rows = row + gl.arange(0, value.shape[0], gl.SliceLayout(1, LAYOUT))[:, None]
    columns = gl.arange(0, value.shape[1], gl.SliceLayout(0, LAYOUT))[None, :]
    gl.store(X + rows * stride + columns, value, mask=rows < T)


@gluon.jit
def load(stream, slot, phase, corner, MORE_BYTES: gl.constexpr = 0):
    """Load a stream's tiles at a corner, of tokens and head, into a slot as soon as it is free."""
    descs, tiles, ready, free = stream
    mbarrier.wait(free.index(slot), phase ^ 1)
    mbarrier.expect(ready.index(slot), len(descs) * descs[0].block_type.shape[1] * descs[0].block_type.shape[3] * 2 + MORE_BYTES)
    for i in gl.static_range(len(descs)):
        load_tile(descs[i], corner, ready.index(slot), tiles[i].index(slot))


@gluon.jit
def copy_keys(kept, ring, STARTS, sizes, C: gl.constexpr):
    """The copying warp of a kernel that keeps queries; the streams of the ring are of keys and values."""
    H, T, tiles, batch_heads = sizes
    count = 0
    turn = 0
    for item in range(0, num_items(tiles, batch_heads)):
        tile, batch_head, exists = place(item, tiles)
        if exists:
            batch, head = batch_head // H, batch_head % H
            for i in gl.static_range(2):
                load(kept, i, turn & 1, (batch, tile * TILE + i * 64, head, 0))
            turn += 1
            number = num_key_tiles(tile, batch, T, STARTS, C)
            for i in range(0, number):
                for j in gl.static_range(len(ring)):
                    corner = batch, (tile - i) * TILE, head // C.group, 0
                    load(ring[j], count % SLOTS, (count // SLOTS) & 1, corner)
                count += 1


@gluon.jit
def _softmax(scores, maximum, total, scale):
    new_maximum = gl.maximum(maximum, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_maximum[:, None])
    rescale = gl.exp2(maximum - new_maximum)
    return weights, new_maximum, total * rescale + gl.sum(weights, 1), rescale


@gluon.jit
def _attend(GROUP: gl.constexpr, OUT, LOG_SUMS, STARTS, kept, ring, sizes, scale, C: gl.constexpr):
    """A group of warps. It begins the product with the next keys before it waits for that with the last values."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    dtype: gl.constexpr = OUT.dtype.element_ty
    _, q_tiles, q_ready, q_free = kept
    _, k_tiles, k_ready, k_free = ring[0]
    _, v_tiles, v_ready, v_free = ring[1]
    H, T, tiles, batch_heads = sizes
    q = matrix(q_tiles[0].index(GROUP))
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
            maximum = gl.full([64], -1e20, gl.float32, S_ROWS)  # see flash_attention
            total = gl.zeros([64], gl.float32, S_ROWS)
            output = gl.zeros([64, C.D], gl.float32, O_LAYOUT)
            # The last tile of keys comes first: in general, only this one has a mask.
            mbarrier.wait(q_ready.index(GROUP), turn & 1)
            slot, phase = count % SLOTS, (count // SLOTS) & 1
            mbarrier.wait(k_ready.index(slot), phase)
            k = matrix(k_tiles[0].index(slot))
            scores = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, [scores])
            mbarrier.arrive(k_free.index(slot))
            scores = masked(scores, -1e30, row, tile * TILE, starts, C)
            weights, maximum, total, rescale = _softmax(scores, maximum, total, scale)
            p = gl.convert_layout(weights.to(dtype), P_LAYOUT)
            for i in range(1, number):
                v_slot, v_phase = slot, phase
                count += 1
                slot, phase = count % SLOTS, (count // SLOTS) & 1
                mbarrier.wait(k_ready.index(slot), phase)
                k = matrix(k_tiles[0].index(slot))
                scores = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
                mbarrier.wait(v_ready.index(v_slot), v_phase)
                output = warpgroup_mma(p, matrix(v_tiles[0].index(v_slot)), output, is_async=True)
                scores = warpgroup_mma_wait(1, [scores])
                mbarrier.arrive(k_free.index(slot))
                scores = masked_inside(scores, -1e30, row, (tile - i) * TILE, starts, C)
                weights, maximum, total, rescale = _softmax(scores, maximum, total, scale)
                output = warpgroup_mma_wait(0, [output])
                mbarrier.arrive(v_free.index(v_slot))
                output = output * gl.convert_layout(rescale, O_ROWS)[:, None]
                p = gl.convert_layout(weights.to(dtype), P_LAYOUT)
            mbarrier.arrive(q_free.index(GROUP))
            mbarrier.wait(v_ready.index(slot), phase)
            output = warpgroup_mma(p, matrix(v_tiles[0].index(slot)), output, is_async=True)
            output = warpgroup_mma_wait(0, [output])
            mbarrier.arrive(v_free.index(slot))
            count += 1
            turn += 1
            gl.store(LOG_SUMS + batch_head.to(gl.int64) * T + rows, maximum + gl.log2(total), mask=rows < T)
            output = output * gl.convert_layout(1 / total, O_ROWS)[:, None]
            store_tile(OUT + (batch.to(gl.int64) * T * H + head) * C.D, output, row, H * C.D, T)


@gluon.jit(do_not_specialize=INTEGERS)
def _forward(q_desc, k_desc, v_desc, OUT, LOG_SUMS, STARTS, H, T, tiles, batch_heads, scale, C: gl.constexpr):
    kept = (q_desc,), (tile_memory(q_desc, 2),), barriers(2, 1), barriers(2, 1)
    keys = (k_desc,), (tile_memory(k_desc, SLOTS),), barriers(SLOTS, 1), barriers(SLOTS, 2)
    values = (v_desc,), (tile_memory(v_desc, SLOTS),), barriers(SLOTS, 1), barriers(SLOTS, 2)
    ring = keys, values
    sizes = H, T, tiles, batch_heads
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    gl.warp_specialize([
        (_attend, (FIRST, OUT, LOG_SUMS, STARTS, kept, ring, sizes, scale, C)),
        (_attend, (SECOND, OUT, LOG_SUMS, STARTS, kept, ring, sizes, scale, C)),
        (copy_keys, (kept, ring, STARTS, sizes, C)),
    ], [4, 1], REGISTERS)  # fmt: skip


def supports(*tensors: Tensor) -> bool:
    """Whether the kernels support these (B, T, heads, D): the copy engine wants addresses divisible by 16 bytes."""
    return all(
        x.shape[3] in (64, 128)
        and x.element_size() == 2
        and x.data_ptr() % 16 == 0
        and all(stride > 0 and stride % 8 == 0 for stride in x.stride()[:3])
        for x in tensors
    )


def descriptor(x: Tensor, tokens: int) -> TensorDescriptor:
    """Of tiles of one head."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, tokens, 1, x.shape[3]], layout)


def launch(
    kernel: Any, arguments: tuple, q: Tensor, k: Tensor, kept_heads: int, scales: tuple[float, ...], window: int,
    starts: Tensor | None
) -> None:  # fmt: skip
    """Launch a kernel that keeps tiles of `kept_heads` heads, with its own arguments before those that all have."""
    B, T, H, D = q.shape
    tiles = triton.cdiv(T, TILE.value)
    multiprocessors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    programs = min(triton.cdiv(tiles, 2) * B * kept_heads, multiprocessors)
    constants = Constants(*map(gl.constexpr, (H // k.shape[2], window, starts is not None, D)))
    starts = q if starts is None else starts
    kernel[(programs,)](*arguments, starts, H, T, tiles, B * kept_heads, *scales, constants, num_warps=4)


def forward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sums: Tensor, window: int, starts: Tensor | None) -> None:
    """Like `flash_attention.forward`, with the outputs given."""
    tokens = TILE.value
    descriptors = descriptor(q, tokens // 2), descriptor(k, tokens), descriptor(v, tokens)
    scale = LOG2_E / math.sqrt(q.shape[3])
    launch(_forward, (*descriptors, o, log_sums), q, k, q.shape[2], (scale,), window, starts)
