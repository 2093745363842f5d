"""Cross-entropy in Triton that overwrites the logits with their gradient.

The logits are the largest tensor of a training step, and the backward pass needs only softmax minus one-hot of them.
The kernel reads each row twice: for its maximum and sum, and to overwrite it with its gradient. The output layer is
computed in chunks of rows (see `operators.linear_cross_entropy`), so that only one chunk's logits exist at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from basic.transformer.kernels.interpreter import LOG2_E

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _overwrite(LOGITS, TARGETS, LOSSES, INVERSE_COUNT, stride, vocab_size, ignore_index, DEPTH: tl.constexpr,
               COLUMNS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * stride
    target = tl.load(TARGETS + row)
    # A target outside the vocabulary must not read what is beside the row; it makes the loss NaN.
    is_known = (target >= 0) & (target < vocab_size)
    target_score = tl.load(LOGITS + target, mask=is_known, other=float("nan")).to(tl.float32)
    ignored = target == ignore_index
    inverse_count = tl.where(ignored, 0.0, tl.load(INVERSE_COUNT))
    columns = tl.arange(0, DEPTH)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    # Each lane keeps the maximum and the sum of its own columns; they are combined at the end. A lane reads DEPTH
    # columns at a time, because each new maximum costs an exponential too.
    maxima = tl.full([COLUMNS], -1e30, tl.float32)
    sums = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, vocab_size, DEPTH * COLUMNS):
        # Keep it in the cache for the second read, after which it may be evicted.
        x = tl.load(LOGITS + start + columns, mask=start + columns < vocab_size, other=-float("inf"),
                    eviction_policy="evict_last").to(tl.float32) * _LOG2_E  # fmt: skip
        new_maxima = tl.maximum(maxima, tl.max(x, 0))
        sums = sums * tl.exp2(maxima - new_maxima) + tl.sum(tl.exp2(x - new_maxima[None, :]), 0)
        maxima = new_maxima
    maximum = tl.max(maxima, 0)
    log2_sum = maximum + tl.log2(tl.sum(sums * tl.exp2(maxima - maximum), 0))
    tl.store(LOSSES + row, tl.where(ignored, 0.0, log2_sum / _LOG2_E - target_score))
    # No thread may overwrite what another thread has not read yet.
    tl.debug_barrier()
    for start in range(0, vocab_size, DEPTH * COLUMNS):
        inside = start + columns < vocab_size
        x = tl.load(LOGITS + start + columns, mask=inside, other=-float("inf"),
                    eviction_policy="evict_first").to(tl.float32)  # fmt: skip
        gradient = tl.exp2(x * _LOG2_E - log2_sum) - tl.where(start + columns == target, 1.0, 0.0)
        tl.store(LOGITS + start + columns, (gradient * inverse_count).to(LOGITS.dtype.element_ty), mask=inside)


def overwrite_with_gradient(
    logits: Tensor, targets: Tensor, losses: Tensor, inverse_count: Tensor, ignore_index: int
) -> None:
    """Compute each row's loss, and overwrite the logits with the gradient of the mean loss over all rows.

    Args:
        logits: (rows, vocab_size), the last dimension contiguous; overwritten.
        targets: int64 (rows,); a row whose target is outside the vocabulary gets the loss NaN.
        losses: output, float32 (rows,).
        inverse_count: float32 (), 1 / the number of rows in the mean, those of other chunks included.
        ignore_index: a row with this target gets the loss 0 and no gradient.
    """
    rows, vocab_size = logits.shape
    depth, columns, warps = _choose_tile(vocab_size)
    _overwrite[(rows,)](
        logits, targets, losses, inverse_count, logits.stride(0), vocab_size, ignore_index,
        DEPTH=depth, COLUMNS=columns, num_warps=warps)  # fmt: skip


def _choose_tile(vocab_size: int) -> tuple[int, int, int]:
    """Columns per lane and lanes per iteration, and warps; tuned on an H200."""
    if vocab_size < 2048:
        return 1, triton.next_power_of_2(vocab_size), 4
    return (4, 1024, 4) if vocab_size < 20_000 else (4, 2048, 8)
