"""The operators for float32 on a CPU: the plain functions' results within rounding, in fewer passes through memory.

A chunk of rows, or of heads, is computed at a time and overwritten in place, so that it stays in the cache of a core.
All logits or all scores never exist at once, and scores that the causal mask hides are skipped. Powers are those of 2:
torch's `exp` takes a hundred times as long for numbers below -88, as after a mask, and its `exp2` does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from basic.transformer.attention import AttentionOptions
from basic.transformer.functional import linear, mean_correction, project_heads

_LOG2_E = math.log2(math.e)
_CHUNK_BYTES = 1 << 20
"""Size of a chunk for each thread: half of the second-level cache of most CPUs."""
_QUERIES = 64
"""Queries whose scores are computed together, with all keys up to the last one's."""


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
        is_ignored = (targets == ignore_index).unsqueeze(-1)
        targets = targets.unsqueeze(-1).masked_fill(is_ignored, 0)
        factors = torch.where(is_ignored, 0, inverse_count)
        dx, dweight = (torch.empty_like(x), torch.zeros_like(weight)) if with_gradient else (x, weight)
        losses = x.new_empty(rows, 1)
        # With fewer rows than d_model, adding to the weight's gradient would take longer than to pass over the logits.
        chunks = _chunks(rows, 4 * vocab_size, least=max(128, d_model))
        buffer = x.new_empty(chunks[0].stop, vocab_size)
        for chunk in chunks:
            out = buffer[: chunk.stop - chunk.start]
            logits = torch.addmm(out, x[chunk], weight.T, beta=0, alpha=_LOG2_E, out=out)
            scores, maxima = logits.gather(1, targets[chunk]), logits.amax(1, keepdim=True)
            sums = logits.sub_(maxima).exp2_().sum(1, keepdim=True)
            losses[chunk] = (sums.log2() + (maxima - scores)) / _LOG2_E
            if with_gradient:  # softmax, minus 1 for the target
                logits.mul_(factors[chunk] / sums).scatter_add_(1, targets[chunk], -factors[chunk])
                torch.mm(logits, weight, out=dx[chunk])
                dweight.addmm_(logits.T, x[chunk])
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
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scales = norms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scales)
        return (x * scales).mul_(weight)

    @staticmethod
    @_without_second_derivative
    def backward(ctx: Any, dy: Tensor):
        x, weight, scales = ctx.saved_tensors
        normalized = x * scales
        products = (dy * normalized).reshape(-1, len(weight))
        means = torch.mv(products, weight).div_(-len(weight)).view(scales.shape)
        return normalized.mul_(means).addcmul_(dy, weight).mul_(scales), products.sum(0), None


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor):
        ctx.save_for_backward(gate, value)
        return torch.sigmoid(gate).mul_(gate).mul_(value)

    @staticmethod
    @_without_second_derivative
    def backward(ctx: Any, dy: Tensor):
        gate, value = ctx.saved_tensors
        slopes = torch.sigmoid(gate)
        activations = gate * slopes
        slopes.addcmul_(activations, slopes, value=-1).add_(activations)  # s + g s (1 - s)
        return slopes.mul_(dy).mul_(value), activations.mul_(dy)


class _Attention(Function):
    """Causal attention of packed heads (heads, D, B, T), whose rotations and sums run along neighbouring tokens.

    Source: Dao et al. 2022, "FlashAttention", algorithms 1 and 4, with all keys of a query in one tile.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, angles: tuple[Tensor, Tensor] | None, num_heads: int, window: int, starts: Tensor | None
    ):
        (heads, D, B, T), H = qkv.shape, num_heads
        num_rotated = (heads + H) // 2
        qk = _rotate(qkv[:num_rotated], angles, qkv.new_empty(num_rotated, D, B, T))
        q, k, v = _items(qk[:H]), _items(qk[H:], H), _items(qkv[num_rotated:], H)
        o, log_sums = qkv.new_empty(H, D, B, T), qkv.new_empty(H, B, T, 1)
        for item, rows, cols, bias in _tiles(H, B, T, window, starts):
            scores = _scores(q[item][..., rows], k[item][..., cols], bias)
            maxima = scores.amax(-1, keepdim=True)
            sums = scores.sub_(maxima).exp2_().sum(-1, keepdim=True)
            torch.div(torch.bmm(v[item][..., cols], scores.mT), sums.mT, out=_items(o)[item][..., rows])
            torch.add(maxima, sums.log2_(), out=log_sums[item][:, rows])
        ctx.save_for_backward(qk, qkv[num_rotated:], o, log_sums, starts)
        ctx.angles, ctx.window = angles, window
        ctx.mark_non_differentiable(qk)
        ctx.set_materialize_grads(False)
        return o, qk

    @staticmethod
    @_without_second_derivative
    def backward(ctx: Any, do: Tensor, _dqk: None):
        qk, values, o, log_sums, starts = ctx.saved_tensors
        H, D, B, T = o.shape
        KV, scale = len(values), D**-0.5
        deltas = (do * o).sum(1).unsqueeze(-1)
        q, k, v, do = _items(qk[:H]), _items(qk[H:], H), _items(values, H), _items(do)
        dqkv = qk.new_empty(H + 2 * KV, D, B, T)
        gradients = qk.new_zeros(3, H, D, B, T)
        dq, dk, dv = (_items(x) for x in gradients)
        for item, rows, cols, bias in _tiles(H, B, T, ctx.window, starts):
            q_tile, do_tile = q[item][..., rows], do[item][..., rows]
            weights = _scores(q_tile, k[item][..., cols], bias).sub_(log_sums[item][:, rows]).exp2_()
            dv[item][..., cols] += torch.bmm(do_tile, weights)
            dscores = torch.bmm(do_tile.mT, v[item][..., cols]).sub_(deltas[item][:, rows]).mul_(weights)
            dq[item][..., rows] = torch.bmm(k[item][..., cols], dscores.mT)
            dk[item][..., cols] += torch.bmm(q_tile, dscores)
        if KV < H:
            gradients = torch.cat((gradients[0], gradients[1:].unflatten(1, (KV, -1)).sum(2).flatten(0, 1)))
        gradients = gradients.view(dqkv.shape)
        back = None if ctx.angles is None else (ctx.angles[0] * scale, ctx.angles[1] * -scale)
        _rotate(gradients[: H + KV], back, dqkv[: H + KV])
        if back is None:
            dqkv[: H + KV] *= scale
        dqkv[H + KV :] = gradients[H + KV :]
        return dqkv, None, None, None, None


def _items(x: Tensor, num_heads: int = 0) -> Tensor:
    """(heads, D, B, T) as (heads, B, D, T); heads of keys are repeated for each head of queries."""
    if num_heads > len(x):
        x = x.repeat_interleave(num_heads // len(x), 0)
    return x.transpose(1, 2)


def _rotate(x: Tensor, angles: tuple[Tensor, Tensor] | None, out: Tensor) -> Tensor:
    """RoPE of heads (heads, D, B, T) that have the first features of all pairs, then the second ones."""
    if angles is None:
        return out.copy_(x)
    cos, sin = angles
    first, second = x.unflatten(1, (2, -1)).unbind(1)
    new_first, new_second = out.unflatten(1, (2, -1)).unbind(1)
    torch.mul(first, cos, out=new_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=new_second).addcmul_(first, sin)
    return out


def _tiles(
    H: int, B: int, T: int, window: int, starts: Tensor | None
) -> Iterator[tuple[tuple[Any, Any], slice, slice, Tensor]]:
    """A tile's heads and sequences, its queries, the keys that some of them see, and the bias of the last scores."""
    row_bytes = 4 * min(_QUERIES, T) * T
    # A tile has several sequences or several heads, whichever are more.
    if B >= H:
        items = [(head, chunk) for head in range(H) for chunk in _chunks(B, row_bytes)]
    else:
        items = [(chunk, sequence) for sequence in range(B) for chunk in _chunks(H, row_bytes)]
    for start in range(0, T, _QUERIES):
        rows = slice(start, min(start + _QUERIES, T))
        cols = slice(max(0, start - window + 1) if window else 0, rows.stop)
        queries = torch.arange(rows.start, rows.stop).unsqueeze(-1)
        # Without a window and documents, all queries see all keys before the first query.
        keys = torch.arange(rows.start if not window and starts is None else cols.start, cols.stop)
        hidden = (keys > queries) | (keys <= queries - (window or T))
        for item in items:
            by_item = hidden if starts is None else hidden | (keys < starts[item[1]][..., rows, None])
            yield item, rows, cols, torch.where(by_item, -torch.inf, 0.0)


def _scores(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """Scores (items, queries, keys) as logarithms to the base of 2."""
    out = q.new_empty(len(q), q.shape[-1], k.shape[-1])
    torch.baddbmm(out, q.mT, k, beta=0, alpha=_LOG2_E * q.shape[1] ** -0.5, out=out)
    out[..., -bias.shape[-1] :] += bias
    return out


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
    gated: Any = _SwiGLU.apply(*linear(x, w1, w3).chunk(2, -1))
    return linear(gated, w2)


def causal_self_attention(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, options: AttentionOptions) -> Tensor:
    """See `functional.causal_self_attention`; x is (B, T, d_model), without earlier tokens."""
    (B, T, _), D = x.shape, len(w_q) // options.num_heads
    num_rotated = (len(w_q) + len(w_k)) // D
    angles = None
    if options.rope is not None:
        angles = tuple(table.T.contiguous().unsqueeze(1) for table in options.rope)

    def halves(heads: Tensor) -> Tensor:
        """Heads (..., D, n) with the first features of all pairs before the second ones: scores stay the same."""
        return heads if angles is None else heads.unflatten(-2, (-1, 2)).transpose(-3, -2).flatten(-3, -2)

    if options.change_heads is None:
        weight = torch.cat((w_q, w_k)).unflatten(0, (-1, D))
        weight = torch.cat((halves(weight).flatten(0, 1), w_v))
        qkv = (weight @ x.flatten(0, 1).T).view(-1, D, B, T)
    else:
        changed = project_heads(x, w_q, w_k, w_v, options).permute(2, 0, 3, 1)
        qkv = torch.cat((halves(changed[:num_rotated]), changed[num_rotated:])).transpose(1, 2).contiguous()
    starts = None if options.document_starts is None else options.document_starts.expand(B, T)
    o, qk = _Attention.apply(qkv, angles, options.num_heads, options.window or 0, starts)
    if options.extend_cache is not None:
        k, v = qk[options.num_heads :].permute(2, 0, 3, 1), qkv[num_rotated:].permute(2, 0, 3, 1)
        if angles is not None:
            k = k.unflatten(-1, (2, -1)).transpose(-2, -1).flatten(-2)
        options.extend_cache(k, v)
    return o.view(-1, B * T).T.unflatten(0, (B, T))
