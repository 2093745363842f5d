"""The operators for float32 on a CPU: the plain functions' results within rounding, in fewer passes through memory.

torch multiplies the matrices, and kernels compute what is between two multiplications in one pass, in place where they
can. All logits or all scores never exist at once: a tile of them stays in the cache of a core, and scores that the
causal mask hides are skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, NamedTuple

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


def _chunks(count: int, item_bytes: int, least: int = 1) -> list[slice]:
    """Slices of equal size that fit into the caches of all threads, but of at least some items."""
    size = max(least, _CHUNK_BYTES * torch.get_num_threads() // item_bytes)
    size = -(-count // -(-count // size))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


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
                _add_product(dweight, logits, x[chunk], chunk)
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
    def forward(ctx: Any, rows: Tensor, weight: Tensor, eps: float):
        y, scales = _normalize(rows, weight, eps)
        ctx.save_for_backward(rows, weight, scales)
        return y

    @staticmethod
    @_without_second_derivative
    def backward(ctx: Any, dy: Tensor):
        rows, weight, scales = ctx.saved_tensors
        dx, dweights = torch.empty_like(rows), rows.new_empty(-(-len(rows) // kernels.ROWS), len(weight))
        _run(kernels.norm_backward, rows, weight, scales, dy.contiguous(), dx, dweights)
        return dx, dweights.sum(0), None


def _normalize(rows: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, scales = torch.empty_like(rows), rows.new_empty(len(rows))
    _run(kernels.norm_forward, rows, weight, eps, y, scales)
    return y, scales


class _SwiGLU(Function):
    """The feed-forward layer of rows (N, d_model) with the joined matrices W1 and W3, and with W2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w13: Tensor, w2: Tensor):
        hidden, y = x.new_empty(len(x), len(w13)), x.new_empty(len(x), len(w2))
        for rows in _chunks(len(x), 8 * len(w13)):
            torch.mm(x[rows], w13.T, out=hidden[rows])
            torch.mm(_gated(hidden[rows]), w2.T, out=y[rows])
        ctx.save_for_backward(x, w13, w2, hidden)
        return y

    @staticmethod
    @_without_second_derivative
    def backward(ctx: Any, dy: Tensor):
        x, w13, w2, hidden = ctx.saved_tensors
        dx, dw13, dw2 = (torch.empty_like(tensor) for tensor in (x, w13, w2))
        for rows in _chunks(len(x), 8 * len(w13)):
            gated = torch.mm(dy[rows], w2)  # its gradient, which the kernel replaces
            dhidden = torch.empty_like(hidden[rows])
            _run(kernels.swiglu_backward, hidden[rows], gated, dhidden)
            torch.mm(dhidden, w13, out=dx[rows])
            _add_product(dw13, dhidden, x[rows], rows)
            _add_product(dw2, dy[rows], gated, rows)
        return dx, dw13, dw2


def _gated(hidden: Tensor) -> Tensor:
    """SiLU(gates) * values for rows (N, gates + values)."""
    y = hidden.new_empty(len(hidden), hidden.shape[1] // 2)
    _run(kernels.swiglu_forward, hidden, y)
    return y


def _add_product(total: Tensor, left: Tensor, right: Tensor, chunk: slice) -> None:
    """Add left^T right of a chunk to the sum over all chunks, which the first one overwrites."""
    torch.addmm(total, left.T, right, beta=float(chunk.start > 0), out=total)


class _Heads(NamedTuple):
    """What attention computes with its projections, which are (B, T, queries + keys + values, d_head)."""

    num_heads: int
    num_kv_heads: int
    d_head: int
    cos: Tensor
    """(T, d_head / 2), or (T, 0) for no rotation."""
    sin: Tensor
    window: int
    """0 for all tokens before one."""
    starts: Tensor
    """(B, T) or, if a sequence is one document, (B, 0)."""

    @property
    def rotation(self) -> tuple[Tensor, Tensor, float]:
        """Angles, and scale of the queries: scores become logarithms to the base of 2."""
        return self.cos, self.sin, math.log2(math.e) * self.d_head**-0.5

    def sequences(self, B: int, T: int) -> list[slice]:
        """Chunks of sequences whose projections, and scores of a tile, fit into the caches."""
        width = (self.num_heads + 2 * self.num_kv_heads) * self.d_head
        return _chunks(B, 4 * T * max(width, self.num_heads * min(T, _QUERIES)))

    def tiles(self, count: int, T: int) -> Iterator[tuple[slice, slice, slice]]:
        """Heads of a number of sequences, queries, and the keys that some of these may attend to."""
        for start in range(0, T, _QUERIES):
            rows = slice(start, min(start + _QUERIES, T))
            cols = slice(max(0, start - self.window + 1) if self.window else 0, rows.stop)
            for heads in _chunks(self.num_heads, 4 * count * (rows.stop - rows.start) * (cols.stop - cols.start)):
                yield heads, rows, cols


class _Attention(Function):
    """Causal attention of features (B, T, d_model); without a weight, these are the projections.

    Source: Dao et al. 2022, "FlashAttention", algorithms 1 and 4, with all keys of a query in one tile.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, how: _Heads):
        (B, T, _), H, D = x.shape, how.num_heads, how.d_head
        q, k, v = (x.new_empty(B, H, T, D) for _ in range(3))
        log_sums, o = x.new_empty(B, H, T), x.new_empty(B, T, H, D)
        for chunk in how.sequences(B, T):
            qkv = x[chunk] if weight is None else x[chunk] @ weight.T
            _run(
                kernels.split_heads,
                qkv.view(-1, T, H + 2 * how.num_kv_heads, D),
                *how.rotation,
                q[chunk],
                k[chunk],
                v[chunk],
            )
            for heads, rows, cols in how.tiles(len(qkv), T):
                q_, k_, v_, sums = (x[chunk, heads].flatten(0, 1) for x in (q, k, v, log_sums))
                scores = torch.bmm(q_[:, rows], k_[:, cols].mT)
                where = rows.start, cols.start, how.window, how.starts[chunk]
                _run(kernels.attention_weights, scores, *where, sums)
                attended = torch.bmm(scores, v_[:, cols])
                o[chunk].transpose(1, 2)[:, heads, rows] = attended.unflatten(0, (len(qkv), -1))
        ctx.save_for_backward(x, weight, q, k, v, log_sums)
        ctx.how = how
        ctx.mark_non_differentiable(k, v)
        ctx.set_materialize_grads(False)
        return o.flatten(2), k, v

    @staticmethod
    @_without_second_derivative
    def backward(ctx: Any, do: Tensor, _dk: None, _dv: None):
        x, weight, q, k, v, log_sums = ctx.saved_tensors
        (B, H, T, D), how = q.shape, ctx.how
        dx = torch.empty_like(x)
        dweight = None if weight is None else torch.empty_like(weight)
        for chunk in how.sequences(B, T):
            dq, dk, dv = torch.empty_like(q[chunk]), torch.empty_like(k[chunk]), torch.empty_like(v[chunk])
            if how.window:
                dk.zero_()
                dv.zero_()
            chunk_do = do[chunk].unflatten(2, (H, D)).transpose(1, 2).contiguous()
            # The last queries come first: without a window they see all keys, and the others add to the gradients.
            for heads, rows, cols in reversed(list(how.tiles(len(dq), T))):
                q_, k_, v_, sums = (x[chunk, heads].flatten(0, 1) for x in (q, k, v, log_sums))
                dq_, dk_, dv_, do_ = (x[:, heads].flatten(0, 1) for x in (dq, dk, dv, chunk_do))
                weights = torch.bmm(q_[:, rows], k_[:, cols].mT)
                dscores = torch.bmm(do_[:, rows], v_[:, cols].mT)
                where = rows.start, cols.start, how.window, how.starts[chunk]
                _run(kernels.attention_gradients, weights, dscores, *where, sums)
                dq_[:, rows] = torch.bmm(dscores, k_[:, cols])
                for total, left, right in ((dv_, weights, do_), (dk_, dscores, q_)):
                    products = torch.bmm(left.mT, right[:, rows])
                    if rows.stop == T and not how.window:
                        total[:, cols] = products
                    else:
                        total[:, cols] += products
            width = H + 2 * how.num_kv_heads
            dqkv = dx[chunk] if weight is None else x.new_empty(len(dq), T, width * D)
            _run(kernels.join_heads, dq, dk, dv, *how.rotation, dqkv.view(-1, T, width, D))
            if dweight is not None:
                torch.mm(dqkv.flatten(0, 1), weight, out=dx[chunk].flatten(0, 1))
                _add_product(dweight, dqkv.flatten(0, 1), x[chunk].flatten(0, 1), chunk)
        return dx, dweight, None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, num_targets: Tensor | None
) -> Tensor:
    """The mean cross-entropy of the logits x W^T for x (rows, d_model) and checked targets (rows,)."""
    # Asked here: inside the function gradients are always off.
    with_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(x, weight, targets, ignore_index, num_targets, with_gradient)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `functional.rms_norm`."""
    rows, weight = x.reshape(-1, len(weight)).contiguous(), weight.contiguous()
    y = _RMSNorm.apply(rows, weight, eps) if torch.is_grad_enabled() else _normalize(rows, weight, eps)[0]
    return y.view(x.shape)


def swiglu(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """See `functional.swiglu`."""
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled():
        y = _SwiGLU.apply(rows, torch.cat((w1, w3)), w2)
    else:
        y = linear(_gated(linear(rows, w1, w3)), w2)
    return y.view(*x.shape[:-1], -1)


def causal_self_attention(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, options: AttentionOptions) -> Tensor:
    """See `functional.causal_self_attention`; x is (B, T, d_model) of any dtype, without earlier tokens."""
    d_head = len(w_q) // options.num_heads
    cos, sin = (table.float().contiguous() for table in options.rope or 2 * (torch.empty(x.shape[1], 0),))
    starts = options.document_starts
    starts = (
        torch.empty(len(x), 0, dtype=torch.int64) if starts is None else starts.expand(x.shape[:2]).long().contiguous()
    )
    how = _Heads(options.num_heads, len(w_k) // d_head, d_head, cos, sin, options.window or 0, starts)
    if options.change_heads is None and x.dtype == torch.float32:
        o, k, v = _Attention.apply(x.contiguous(), torch.cat((w_q, w_k, w_v)).float(), how)
    else:
        o, k, v = _Attention.apply(project_heads(x, w_q, w_k, w_v, options).flatten(2).float(), None, how)
    if options.extend_cache is not None:
        group = how.num_heads // how.num_kv_heads
        options.extend_cache(k[:, ::group].to(x.dtype), v[:, ::group].to(x.dtype))
    return o.to(x.dtype)


def step_adamw(
    tensors: list[tuple[Tensor, ...]], rates: list[float], root_factors: list[float], *numbers: float
) -> None:
    """See `dispatch.step_adamw`; the tensors are contiguous."""
    addresses = np.array([[tensor.data_ptr() for tensor in each] for each in tensors])
    sizes = np.array([parameter.numel() for parameter, *_ in tensors])
    num_threads = torch.get_num_threads() if sizes.sum() >= _MIN_NUMBERS else 1
    arrays = np.zeros_like(sizes), addresses, sizes, np.array(rates), np.array(root_factors)
    kernels.adamw(*arrays, *numbers, num_threads=num_threads)
