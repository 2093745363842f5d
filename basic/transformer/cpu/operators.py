"""The operators for float32 on a CPU: the plain functions' results within rounding, in fewer passes through memory.

torch multiplies the matrices, and kernels compute what is between two multiplications in one pass, in place where they
can. All logits or all scores never exist at once: a tile of them stays in the cache of a core, and scores that the
causal mask hides are skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from basic.common.native.kernel import Kernel
from basic.transformer.attention import AttentionOptions
from basic.transformer.cpu import kernels
from basic.transformer.functional import linear, mean_correction, project_heads

_CHUNK_BYTES = 1 << 20
"""Size of a chunk for each thread: half of the second-level cache of most CPUs."""
_QUERIES = 64
"""Queries whose scores are computed together, with all keys up to the last one's."""
_MIN_NUMBERS = 1 << 15
"""Numbers for which it pays to wake other threads."""


def _run(kernel: Kernel, *arguments: Any) -> None:
    """Call a kernel, in torch's threads if its first tensor is large."""
    num_threads = torch.get_num_threads() if arguments[0].numel() >= _MIN_NUMBERS else 1
    kernel(np.zeros(1, np.int64), *arguments, num_threads=num_threads)


def _chunks(rows: int, row_bytes: int, least: int = 1) -> list[slice]:
    size = max(least, _CHUNK_BYTES * torch.get_num_threads() // row_bytes)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _without_second_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As `once_differentiable` of torch, with which `torch.autograd.grad` leaves the missing terms out silently."""

    @wraps(backward)
    def checked(*arguments: Any):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the operators for a CPU have no second derivative (create_graph=True); compute the model and its loss "
                "inside `with basic.transformer.kernels.dispatch.use_operators(None):`, which takes the plain functions"
            )
        return backward(*arguments)

    return checked


class _LinearCrossEntropy(Function):
    """The loss and both gradients in one pass: the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, num_targets: Tensor | None,
        with_gradient: bool
    ):  # fmt: skip
        (rows, d_model), vocab_size = x.shape, len(weight)
        correction = mean_correction(targets, ignore_index, x.dtype)
        inverse_count = correction / rows if num_targets is None else 1 / num_targets
        is_ignored = targets == ignore_index
        targets = targets.masked_fill(is_ignored, 0)
        factors = torch.where(is_ignored, 0, inverse_count)
        dx, dweight = (torch.empty_like(x), torch.empty_like(weight)) if with_gradient else (x, weight)
        losses = x.new_empty(rows)
        # With fewer rows than d_model, adding to the weight's gradient would take longer than to pass over the logits.
        chunks = _chunks(rows, 4 * vocab_size, least=max(128, d_model))
        buffer = x.new_empty(chunks[0].stop, vocab_size)
        for chunk in chunks:
            logits = torch.mm(x[chunk], weight.T, out=buffer[: chunk.stop - chunk.start])
            _run(kernels.cross_entropy, logits, targets[chunk], factors[chunk], losses[chunk], with_gradient)
            if with_gradient:
                torch.mm(logits, weight, out=dx[chunk])
                torch.addmm(dweight, logits.T, x[chunk], beta=float(chunk.start > 0), out=dweight)
        if with_gradient:
            ctx.save_for_backward(dx, dweight)
        losses.masked_fill_(is_ignored, 0)
        return losses.mean() * correction if num_targets is None else losses.sum() * inverse_count

    @staticmethod
    @_without_second_derivative
    def backward(ctx: Any, gradient: Tensor):
        dx, dweight = ctx.saved_tensors
        if gradient != 1:
            dx, dweight = dx * gradient, dweight * gradient
        return dx, dweight, None, None, None, None


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float):
        rows = x.reshape(-1, len(weight)).contiguous()
        y, scales = torch.empty_like(rows), rows.new_empty(len(rows))
        _run(kernels.norm_forward, rows, weight.contiguous(), eps, y, scales)
        ctx.save_for_backward(rows, weight, scales)
        return y.view(x.shape)

    @staticmethod
    @_without_second_derivative
    def backward(ctx: Any, dy: Tensor):
        rows, weight, scales = ctx.saved_tensors
        dx, dweights = torch.empty_like(rows), rows.new_empty(-(-len(rows) // kernels.ROWS), len(weight))
        _run(
            kernels.norm_backward, rows, weight.contiguous(), scales, dy.reshape(rows.shape).contiguous(), dx, dweights
        )
        return dx.view(dy.shape), dweights.sum(0), None


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gates_values: Tensor):
        rows = gates_values.view(-1, gates_values.shape[-1])
        y = rows.new_empty(len(rows), rows.shape[1] // 2)
        _run(kernels.swiglu_forward, rows, y)
        ctx.save_for_backward(rows)
        return y.view(*gates_values.shape[:-1], -1)

    @staticmethod
    @_without_second_derivative
    def backward(ctx: Any, dy: Tensor):
        (rows,) = ctx.saved_tensors
        gradient = torch.empty_like(rows)
        _run(kernels.swiglu_backward, rows, dy.reshape(len(rows), -1).contiguous(), gradient)
        return gradient.view(*dy.shape[:-1], -1)


class _Attention(Function):
    """Causal attention of projected heads (B, T, queries + keys + values, D).

    Source: Dao et al. 2022, "FlashAttention", algorithms 1 and 4, with all keys of a query in one tile.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int, num_rotated: int, group: int, *settings: Any):
        (cos, sin), window, starts = settings
        (B, T, _, D), H = qkv.shape, num_heads
        heads = qkv.new_empty(3, H, B, T, D)
        # Of the scores as logarithms to the base of 2.
        how = cos, sin, H, num_rotated, group, math.log2(math.e) * D**-0.5
        _run(kernels.split_heads, qkv, *how, heads)
        q, k, v = heads.flatten(1, 2)
        o, log_sums = qkv.new_empty(H, B, T, D), qkv.new_empty(H * B, T)
        for items, rows, cols, numbers in _tiles(H * B, T, window):
            scores = torch.bmm(q[items, rows], k[items, cols].mT)
            _run(kernels.attention_weights, scores, *numbers, window, starts, log_sums)
            o.flatten(0, 1)[items, rows] = torch.bmm(scores, v[items, cols])
        ctx.save_for_backward(heads, log_sums, starts)
        ctx.how, ctx.window = how, window
        ctx.mark_non_differentiable(heads)
        ctx.set_materialize_grads(False)
        return o, heads

    @staticmethod
    @_without_second_derivative
    def backward(ctx: Any, do: Tensor, _dheads: None):
        heads, log_sums, starts = ctx.saved_tensors
        _, H, B, T, D = heads.shape
        q, k, v = heads.flatten(1, 2)
        do = do.reshape(H * B, T, D)
        dheads = torch.empty_like(heads)
        dq, dk, dv = dheads.flatten(1, 2)
        if ctx.window:
            dheads[1:] = 0
        # The last queries come first: without a window they see all keys, so that the others add to their gradients.
        for items, rows, cols, numbers in reversed(list(_tiles(H * B, T, ctx.window))):
            weights = torch.bmm(q[items, rows], k[items, cols].mT)
            dscores = torch.bmm(do[items, rows], v[items, cols].mT)
            _run(kernels.attention_gradients, weights, dscores, *numbers, ctx.window, starts, log_sums)
            dq[items, rows] = torch.bmm(dscores, k[items, cols])
            for sums, left, right in ((dv, weights, do), (dk, dscores, q)):
                products = torch.bmm(left.mT, right[items, rows])
                if rows.stop == T and not ctx.window:
                    sums[items, cols] = products
                else:
                    sums[items, cols] += products
        dqkv = heads.new_empty(B, T, H + 2 * (H // ctx.how[4]), D)
        _run(kernels.join_heads, dheads, *ctx.how, dqkv)
        return dqkv, None, None, None, None, None, None


def _tiles(num_items: int, T: int, window: int) -> Iterator[tuple[slice, slice, slice, tuple[int, int, int]]]:
    """A tile's items (heads of sequences), queries and keys that some of these see, and the first of each."""
    for start in range(0, T, _QUERIES):
        rows = slice(start, min(start + _QUERIES, T))
        cols = slice(max(0, start - window + 1) if window else 0, rows.stop)
        for items in _chunks(num_items, 4 * _QUERIES * (cols.stop - cols.start)):
            yield items, rows, cols, (items.start, rows.start, cols.start)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, num_targets: Tensor | None
) -> Tensor:
    """The mean cross-entropy of the logits x W^T for x (rows, d_model) and checked targets (rows,)."""
    # Asked here: inside the function gradients are always off.
    with_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(x, weight, targets, ignore_index, num_targets, with_gradient)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `functional.rms_norm`."""
    return _RMSNorm.apply(x, weight, eps)


def swiglu(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """See `functional.swiglu`."""
    gated: Any = _SwiGLU.apply(linear(x, w1, w3))
    return linear(gated, w2)


def causal_self_attention(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, options: AttentionOptions) -> Tensor:
    """See `functional.causal_self_attention`; x is (B, T, d_model), without earlier tokens."""
    H = options.num_heads
    qkv = project_heads(x, w_q, w_k, w_v, options).contiguous()
    num_kv_heads = (qkv.shape[2] - H) // 2
    num_rotated = 0 if options.rope is None else H + num_kv_heads
    cos, sin = (table.contiguous() for table in options.rope or 2 * (x.new_empty(0, 0),))
    starts = options.document_starts
    starts = torch.empty(len(x), 0, dtype=torch.int64) if starts is None else starts.expand(x.shape[:2]).contiguous()
    group = H // num_kv_heads
    o, heads = _Attention.apply(qkv, H, num_rotated, group, (cos, sin), options.window or 0, starts)
    if options.extend_cache is not None:
        options.extend_cache(*heads[1:, ::group].transpose(1, 2))
    return o.permute(1, 2, 0, 3).flatten(2)


def step_adamw(parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, *numbers: float) -> None:
    """See `dispatch.step_adamw`; the tensors are contiguous."""
    _run(kernels.adamw, *(x.view(-1) for x in (parameter, gradient, first, second)), *numbers)
