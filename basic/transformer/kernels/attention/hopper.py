"""Causal attention for Hopper GPUs (H100, H200) in Gluon, with the copy engine and specialized warps.

`flash_attention` describes the algorithms, which are the same here, and calls these kernels for head sizes of 64 and
128, where they are faster. What they do differently is the order of the work:

- A program keeps a tile of queries, whose parts of 64 are each computed by a group of four warps; one more warp only
  starts the copy engine. The tiles of keys and values come in a ring of slots in shared memory. Two barriers a slot say
  when it is `ready` (loaded) and when it is `free` (read by all groups), so that the groups need not wait for each
  other: while one computes exponentials, another keeps the matrix units busy.
- There are as many programs as multiprocessors. Each takes pairs of tiles, one with much to do and one with little, so
  that all take the same time, and the copy engine loads the next tiles while the last ones end. In the second of a pair
  the groups change places, since the last part of a tile has the most keys.

The copy engine reads zeros for tokens before the start and behind the end.

Legend: as in `flash_attention`; `row` is the first query of a group, `start` the first key of a tile, C are the
`Constants`. `count` is the number of tiles that went through the ring, and `item` that of tiles kept. A barrier's
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

INTEGERS = ["H", "T", "tiles", "batch_heads"]
"""Arguments whose values do not change a kernel's code."""

# By head size: parts of a kept tile, tokens per tile of the ring, slots of the ring, and slots for each kept part.
# Tuned on an H200. At 64, exponentials take as long as products, so that it takes three groups to hide them.
_FORWARD_SHAPES = {64: (3, 64, 8, 2), 128: (2, 128, 2, 1)}

load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # since Triton 3.7, and before


@dataclass(frozen=True)
class Constants:
    """What a kernel is compiled for."""

    group: gl.constexpr  # number of query heads that share keys
    window: gl.constexpr
    D: gl.constexpr
    parts: gl.constexpr
    tokens: gl.constexpr
    slots: gl.constexpr
    kept_slots: gl.constexpr


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
def num_items(sizes):
    """How many tiles this program takes: pairs, but for the one in the middle of all."""
    _, _, tiles, batch_heads = sizes
    pairs = gl.cdiv(gl.cdiv(tiles * batch_heads, 2) - gl.program_id(0), gl.num_programs(0))
    last = gl.program_id(0) + (pairs - 1) * gl.num_programs(0)
    return 2 * pairs - gl.where(2 * last + 1 == tiles * batch_heads, 1, 0)


@gluon.jit
def place(item, sizes):
    """The tile of this program's item, and its batch and head as one number."""
    _, _, tiles, batch_heads = sizes
    pair = gl.program_id(0) + item // 2 * gl.num_programs(0)
    index = gl.where(item % 2 == 0, pair, tiles * batch_heads - 1 - pair)
    return tiles - 1 - index % tiles, index // tiles


@gluon.jit
def part(GROUP: gl.constexpr, item, C: gl.constexpr):
    """The part of an item that a group computes."""
    return gl.where(item % 2 == 0, GROUP, C.parts - 1 - GROUP)


@gluon.jit
def first_row(tile, sizes, C: gl.constexpr):
    """The first query of a tile. The last tile is full; the first one, with few keys, may begin before the sequence."""
    _, T, tiles, _ = sizes
    return (gl.cdiv(T, 64) - (tiles - tile) * C.parts) * 64


@gluon.jit
def key_tiles(row, C: gl.constexpr):
    """The last tile of keys that a tile of queries attends to, and the number of them."""
    first = 0
    if C.window > 0:
        first = gl.maximum(row - C.window + 1, 0)
    last = (row + C.parts * 64 - 1) // C.tokens
    return last, last - first // C.tokens + 1


@gluon.jit
def own_queries(GROUP: gl.constexpr, item, sizes, C: gl.constexpr):
    """Of a group's queries: batch and head as one number and as two, the first row, and `key_tiles` of its tile."""
    H, _, _, _ = sizes
    tile, batch_head = place(item, sizes)
    batch, head = batch_head // H, batch_head % H
    row = first_row(tile, sizes, C)
    last, number = key_tiles(row, C)
    row += part(GROUP, item, C) * 64
    return batch_head, batch, head, row, last, number


@gluon.jit
def kept_slot(GROUP: gl.constexpr, item, C: gl.constexpr):
    """The slot of what a group keeps, and its phase."""
    return GROUP * C.kept_slots + item % C.kept_slots, (item // C.kept_slots) & 1


@gluon.jit
def take(ring, count, C: gl.constexpr):
    """The slot of the next tile, which is ready."""
    _, _, ready, _ = ring
    mbarrier.wait(ready.index(count % C.slots), (count // C.slots) & 1)
    return count % C.slots


@gluon.jit
def skip(ring, count, number, C: gl.constexpr):
    """Pass over a number of tiles."""
    _, _, _, free = ring
    for _ in range(0, number):
        mbarrier.arrive(free.index(take(ring, count, C)))
        count += 1
    return count


@gluon.jit
def opaque(x):
    """x. The compiler computes nothing that depends on it before what stands before this."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)


@gluon.jit
def visible(rows, keys, C: gl.constexpr):
    """Whether a query may attend to a key."""
    result = rows >= keys
    if C.window > 0:
        result &= rows - keys < C.window
    return result


@gluon.jit
def masked(x, other, row, start, C: gl.constexpr):
    """x of queries from `row` and keys from `start`, with `other` where a query may not attend to a key."""
    LAYOUT: gl.constexpr = x.type.layout
    # Opaque: else the compiler computes the mask while it waits for x, and packs it into bits.
    rows = opaque(row - start + gl.arange(0, x.shape[0], gl.SliceLayout(1, LAYOUT)))[:, None]
    keys = gl.arange(0, x.shape[1], gl.SliceLayout(0, LAYOUT))[None, :]
    return gl.where(visible(rows, keys, C), x, other)


@gluon.jit
def masked_inside(x, other, row, start, C: gl.constexpr):
    """The same of tiles before the last one, which only a window cuts."""
    if C.window > 0:  # noqa: SIM102 - the other condition is not known to the compiler
        if start + C.window < row + 64:
            x = masked(x, other, row, start, C)
    return x


@gluon.jit
def exist(rows, T):
    return (rows >= 0) & (rows < T)


@gluon.constexpr_function
def coalesced(D, neighbors):
    """The layout of 64 rows of D numbers, of which a thread has neighbors, and a warp the rows it has in a product."""
    width = neighbors.bit_length() - 1
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
    gl.store(X + rows * stride + columns, value, mask=exist(rows, T))


@gluon.jit
def load(stream, slot, phase, corner, LAG: gl.constexpr = 0, MORE_BYTES: gl.constexpr = 0):
    """Load a stream's tiles into a slot as soon as it is free, each LAG tokens behind the one before it."""
    descs, tiles, ready, free = stream
    batch, token, head = corner
    BYTES: gl.constexpr = descs[0].block_type.shape[1] * descs[0].block_type.shape[3] * 2
    mbarrier.wait(free.index(slot), phase ^ 1)
    mbarrier.expect(ready.index(slot), len(descs) * BYTES + MORE_BYTES)
    for i in gl.static_range(len(descs)):
        load_tile(descs[i], (batch, token + i * LAG, head, 0), ready.index(slot), tiles[i].index(slot))


@gluon.jit
def copy_keys(LAG: gl.constexpr, arguments, C: gl.constexpr):
    """The copying warp of a kernel that keeps queries. With LAG, values come one tile after their keys."""
    kept, ring, sizes, _ = arguments
    H, _, _, _ = sizes
    count = 0
    for item in range(0, num_items(sizes)):
        tile, batch_head = place(item, sizes)
        batch, head = batch_head // H, batch_head % H
        row = first_row(tile, sizes, C)
        for i in gl.static_range(C.parts):
            slot, phase = kept_slot(i, item, C)
            load(kept, slot, phase, (batch, row + part(i, item, C) * 64, head))
        last, number = key_tiles(row, C)
        for i in range(0, number + LAG):
            corner = batch, (last - i) * C.tokens, head // C.group
            load(ring, count % C.slots, (count // C.slots) & 1, corner, LAG * C.tokens)
            count += 1


@gluon.jit
def _run(function: gl.constexpr, NUMBER: gl.constexpr, arguments, C: gl.constexpr):
    function(NUMBER, arguments, C)


@gluon.jit
def specialize(compute: gl.constexpr, copy: gl.constexpr, LAG: gl.constexpr, arguments, constants: gl.constexpr):
    """Let groups of warps compute and one warp copy. The first group has the registers that the others leave."""
    A: gl.constexpr = 0
    B: gl.constexpr = 1
    C: gl.constexpr = 2
    if constants.parts == 2:
        gl.warp_specialize([
            (_run, (compute, A, arguments, constants)), (_run, (compute, B, arguments, constants)),
            (_run, (copy, LAG, arguments, constants)),
        ], [4, 1], [240, 24])  # fmt: skip
    if constants.parts == 3:
        gl.warp_specialize([
            (_run, (compute, A, arguments, constants)), (_run, (compute, B, arguments, constants)),
            (_run, (compute, C, arguments, constants)), (_run, (copy, LAG, arguments, constants)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip


@gluon.jit
def stream(descs, SLOTS: gl.constexpr, READERS: gl.constexpr):
    """Slots for the tiles of two descriptors that are loaded together, and their barriers."""
    tiles = tile_memory(descs[0], SLOTS), tile_memory(descs[1], SLOTS)
    return descs, tiles, barriers(SLOTS, 1), barriers(SLOTS, READERS)


@gluon.jit
def _thread_sums(x):
    """The sums of what each thread has of a row, (64, 4)."""
    return gl.sum(gl.sum(x.reshape([64, x.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _softmax(scores, maximum, total, scale):
    new_maximum = gl.maximum(maximum, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_maximum[:, None])
    rescale = gl.exp2(maximum - new_maximum)
    total *= gl.convert_layout(rescale, gl.SliceLayout(1, total.type.layout))[:, None]
    return weights, new_maximum, total + _thread_sums(weights), rescale


@gluon.jit
def _attend(GROUP: gl.constexpr, arguments, C: gl.constexpr):
    """A group of warps. It begins the product with the next keys before it waits for that with the last values."""
    kept, ring, sizes, own = arguments
    OUT, LOG_SUMS, scale = own
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.tokens, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    dtype: gl.constexpr = OUT.dtype.element_ty
    _, q_tiles, q_ready, q_free = kept
    _, tiles, _, free = ring
    H, T, _, _ = sizes
    zeros = gl.zeros([64, C.tokens], gl.float32, S_LAYOUT)
    count = 0
    for item in range(0, num_items(sizes)):
        batch_head, batch, head, row, last, number = own_queries(GROUP, item, sizes, C)
        rows = row + gl.arange(0, 64, S_ROWS)
        maximum = gl.full([64], -1e20, gl.float32, S_ROWS)  # see flash_attention
        total = _thread_sums(zeros)
        output = gl.zeros([64, C.D], gl.float32, O_LAYOUT)
        q_slot, q_phase = kept_slot(GROUP, item, C)
        q = matrix(q_tiles[0].index(q_slot))
        mbarrier.wait(q_ready.index(q_slot), q_phase)
        # The last tile of keys comes first: in general, only this one has a mask.
        first = gl.minimum(last - row // C.tokens, number - 1)
        count = skip(ring, count, first, C)
        slot = take(ring, count, C)
        k = matrix(tiles[0].index(slot))
        scores = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, [scores])
        mbarrier.arrive(free.index(slot))
        scores = masked(scores, -1e30, row, (last - first) * C.tokens, C)
        weights, maximum, total, rescale = _softmax(scores, maximum, total, scale)
        p = gl.convert_layout(weights.to(dtype), P_LAYOUT)
        for i in range(first + 1, number):
            count += 1
            slot = take(ring, count, C)
            k, v = matrix(tiles[0].index(slot)), matrix(tiles[1].index(slot))
            scores = warpgroup_mma(q, k.permute((1, 0)), scores, use_acc=False, is_async=True)
            output = warpgroup_mma(p, v, output, is_async=True)
            scores = warpgroup_mma_wait(1, [scores])
            scores = masked_inside(scores, -1e30, row, (last - i) * C.tokens, C)
            weights, maximum, total, rescale = _softmax(scores, maximum, total, scale)
            output = warpgroup_mma_wait(0, [output])
            mbarrier.arrive(free.index(slot))
            output = output * gl.convert_layout(rescale, O_ROWS)[:, None]
            p = gl.convert_layout(weights.to(dtype), P_LAYOUT)
        mbarrier.arrive(q_free.index(q_slot))
        slot = take(ring, count + 1, C)
        output = warpgroup_mma(p, matrix(tiles[1].index(slot)), output, is_async=True)
        total = gl.convert_layout(gl.sum(total, 1), S_ROWS)
        gl.store(LOG_SUMS + batch_head.to(gl.int64) * T + rows, maximum + gl.log2(total), mask=exist(rows, T))
        output = warpgroup_mma_wait(0, [output])
        mbarrier.arrive(free.index(slot))
        count += 2
        output = output * gl.convert_layout(1 / total, O_ROWS)[:, None]
        store_tile(OUT + (batch.to(gl.int64) * T * H + head) * C.D, output, row, H * C.D, T)


@gluon.jit(do_not_specialize=INTEGERS)
def _forward(q_desc, k_desc, v_desc, OUT, LOG_SUMS, H, T, tiles, batch_heads, scale, C: gl.constexpr):
    KEPT: gl.constexpr = C.parts * C.kept_slots
    kept = (q_desc,), (tile_memory(q_desc, KEPT),), barriers(KEPT, 1), barriers(KEPT, 1)
    ring = stream((k_desc, v_desc), C.slots, C.parts)
    arguments = kept, ring, (H, T, tiles, batch_heads), (OUT, LOG_SUMS, scale)
    ATTEND: gl.constexpr = _attend
    COPY: gl.constexpr = copy_keys
    LAG: gl.constexpr = 1
    specialize(ATTEND, COPY, LAG, arguments, C)


def supports(*tensors: Tensor, window: int) -> bool:
    """Whether the kernels support these (B, T, heads, D): the copy engine wants addresses divisible by 16 bytes."""
    return all(
        (x.shape[3] == 128 or (x.shape[3] == 64 and window == 0))  # 64 with a window was not measured
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
    shape: tuple[int, ...]
) -> None:  # fmt: skip
    """Launch a kernel that keeps tiles of `kept_heads` heads, with its own arguments before those that all have."""
    B, T, H, D = q.shape
    tiles = triton.cdiv(T, 64 * shape[0])
    multiprocessors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    programs = min(triton.cdiv(tiles * B * kept_heads, 2), multiprocessors)
    constants = Constants(*map(gl.constexpr, (H // k.shape[2], window, D, *shape)))
    kernel[(programs,)](*arguments, H, T, tiles, B * kept_heads, *scales, constants, num_warps=4)


def forward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sums: Tensor, window: int) -> None:
    """Like `flash_attention.forward`, with the outputs given."""
    shape = _FORWARD_SHAPES[q.shape[3]]
    descriptors = descriptor(q, 64), descriptor(k, shape[1]), descriptor(v, shape[1])
    scale = LOG2_E / math.sqrt(q.shape[3])
    launch(_forward, (*descriptors, o, log_sums), q, k, q.shape[2], (scale,), window, shape)
