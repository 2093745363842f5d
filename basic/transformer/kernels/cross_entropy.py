"""Output layer and cross-entropy as one: the gradient of the loss takes the place of the logits in memory.

The logits are the largest tensor of a training step, and what the backward pass needs of them is softmax minus one-hot.
So a kernel reads each row twice, once for its maximum and sum and once to overwrite it with its gradient. In chunks of
rows, only one chunk's logits exist at a time.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(math.log2(math.e))
"""Exponentials are to the base 2, which is the hardware's own."""


@triton.jit
def _overwrite(LOGITS, TARGETS, LOSSES, stride, vocab_size, inverse_count, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * stride
    target = tl.load(TARGETS + row)
    target_score = tl.load(LOGITS + target).to(tl.float32)
    columns = tl.arange(0, PARTS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    # Each lane keeps the maximum and the sum of its own columns; they are joined once, at the end. It looks at some
    # of them at a time, because each new maximum costs an exponential too.
    maxima = tl.full([COLUMNS], -1e30, tl.float32)
    sums = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, vocab_size, PARTS * COLUMNS):
        # It is read once more soon; behind that, nothing reads it before it has left the cache anyway.
        x = tl.load(LOGITS + start + columns, mask=start + columns < vocab_size, other=-float("inf"),
                    eviction_policy="evict_last").to(tl.float32) * LOG2_E  # fmt: skip
        new_maxima = tl.maximum(maxima, tl.max(x, 0))
        sums = sums * tl.exp2(maxima - new_maxima) + tl.sum(tl.exp2(x - new_maxima[None, :]), 0)
        maxima = new_maxima
    maximum = tl.max(maxima, 0)
    log2_sum = maximum + tl.log2(tl.sum(sums * tl.exp2(maxima - maximum), 0))
    tl.store(LOSSES + row, log2_sum / LOG2_E - target_score)
    # No thread may overwrite what another still has to read.
    tl.debug_barrier()
    for start in range(0, vocab_size, PARTS * COLUMNS):
        inside = start + columns < vocab_size
        x = tl.load(LOGITS + start + columns, mask=inside, other=-float("inf"),
                    eviction_policy="evict_first").to(tl.float32)  # fmt: skip
        gradient = tl.exp2(x * LOG2_E - log2_sum) - tl.where(start + columns == target, 1.0, 0.0)
        tl.store(LOGITS + start + columns, (gradient * inverse_count).to(LOGITS.dtype.element_ty), mask=inside)


def overwrite_with_gradient(logits: Tensor, targets: Tensor, losses: Tensor, count: int) -> None:
    """Write each row's loss, and put the gradient of the mean over `count` rows in place of the logits.

    Args:
        logits: (rows, vocab_size), the last dimension contiguous; overwritten.
        targets: int64 (rows,), inside the vocabulary.
        losses: float32 (rows,); overwritten.
        count: rows in the mean, those of other chunks included.
    """
    rows, vocab_size = logits.shape
    parts, columns, warps = _tile(vocab_size)
    _overwrite[(rows,)](
        logits, targets, losses, logits.stride(0), vocab_size, 1.0 / count,
        PARTS=parts, COLUMNS=columns, num_warps=warps)  # fmt: skip


def _tile(vocab_size: int) -> tuple[int, int, int]:
    """Parts and columns looked at together, and warps; found by trying them on an H200."""
    if vocab_size < 2048:
        return 1, triton.next_power_of_2(vocab_size), 4
    return (4, 1024, 4) if vocab_size < 20_000 else (4, 2048, 8)
