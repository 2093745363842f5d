"""The operators for float32 on a CPU: the plain functions' results within rounding, in fewer passes through memory.

torch multiplies the matrices, but for those of attention, which is a kernel of its own. Other kernels compute what is
between two multiplications in one pass, in place where they can. All logits or all scores never exist at once: a tile
of them stays in the cache of a core, and scores that the causal mask hides are skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from basic.common.native.instructions import TILE_COLUMNS, TILE_ROWS
from basic.common.native.kernel import Kernel
from basic.transformer.attention import AttentionOptions
from basic.transformer.cpu import attention_kernels, kernels
from basic.transformer.cpu.attention_kernels import QUERIES
from basic.transformer.functional import linear, mean_correction, project_heads, rotate_pairs

_LOGITS_BYTES = 1 << 22
"""Of a chunk of logits: what the caches of most CPUs hold."""
_MIN_NUMBERS = 1 << 15
"""Numbers for which it pays to wake other threads."""


def _run(kernel: Kernel, *arguments: Any) -> None:
    """Call a kernel, in torch's threads if its first tensor is large."""
    tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
    num_threads = torch.get_num_threads() if tensor.numel() >= _MIN_NUMBERS else 1
    kernel(np.zeros(2, np.int64), *arguments, num_threads=num_threads)


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
        factors = torch.where(is_ignored, 0, inverse_count).to(x.dtype)
        dx, dweight = (torch.empty_like(x), torch.empty_like(weight)) if with_gradient else (x, weight)
        losses = x.new_empty(rows)
        # With fewer rows than d_model, adding to the weight's gradient would take longer than to pass over the logits.
        size = max(128, d_model, _LOGITS_BYTES // (4 * vocab_size))
        size = -(-rows // -(-rows // size))
        # Longer rows than the vocabulary: in a column of numbers 8 KB apart, all would share few slots of a cache.
        buffer = x.new_empty(size, vocab_size + 16)
        for start in range(0, rows, size):
            chunk = slice(start, min(start + size, rows))
            buffer = buffer[: chunk.stop - start]
            logits = torch.mm(x[chunk], weight.T, out=buffer[:, :vocab_size])
            _run(
                kernels.cross_entropy, buffer, targets[chunk], factors[chunk], losses[chunk], vocab_size, with_gradient
            )
            if with_gradient:
                torch.mm(logits, weight, out=dx[chunk])
                torch.addmm(dweight, logits.T, x[chunk], beta=float(start > 0), out=dweight)
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
        hidden = x @ w13.T
        ctx.save_for_backward(x, w13, w2, hidden)
        return _gated(hidden) @ w2.T

    @staticmethod
    @_without_second_derivative
    def backward(ctx: Any, dy: Tensor):
        x, w13, w2, hidden = ctx.saved_tensors
        gated, dhidden = dy @ w2, torch.empty_like(hidden)  # the gradient of what the kernel replaces it by
        _run(kernels.swiglu_backward, hidden, gated, dhidden)
        return dhidden @ w13, dhidden.T @ x, dy.T @ gated


def _gated(hidden: Tensor) -> Tensor:
    """SiLU(gates) * values for rows (N, gates + values)."""
    y = hidden.new_empty(len(hidden), hidden.shape[1] // 2)
    _run(kernels.swiglu_forward, hidden, y)
    return y


class _Heads(NamedTuple):
    """What attention computes with its projections."""

    num_heads: int
    num_kv_heads: int
    cos: Tensor
    """(T, d_head / 2), or (T, 0) for no rotation."""
    sin: Tensor
    window: int
    """0 for all tokens before one."""
    starts: Tensor
    """(B, T) or, if a sequence is one document, (B, 0)."""

    def arguments(self, qkv: Tensor) -> tuple[Any, ...]:
        """Those that both kernels share, for projections (B, T, features)."""
        B, T, heads = len(qkv), qkv.shape[1], self.num_heads + 2 * self.num_kv_heads
        qkv = qkv.view(B, T, heads, -1)
        D = qkv.shape[-1]
        tokens, features = -(-T // TILE_ROWS) * TILE_ROWS, -(-D // TILE_COLUMNS) * TILE_COLUMNS
        shapes = (
            (4, tokens, features),
            (3, QUERIES, features),
            (2, features, QUERIES),
            (2, tokens, QUERIES),
            (2, QUERIES),
        )
        memory = tuple(qkv.new_empty(torch.get_num_threads(), *shape) for shape in shapes)
        # Scores become logarithms to the base of 2.
        return qkv, self.cos, self.sin, math.log2(math.e) * D**-0.5, self.window, self.starts, memory


class _Attention(Function):
    """Causal attention of features (B, T, d_model); without a weight, these are the projections."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, how: _Heads):
        qkv, (B, T, _) = x if weight is None else x @ weight.T, x.shape
        arguments = how.arguments(qkv)
        o, log_sums = x.new_empty(B, T, how.num_heads, arguments[0].shape[-1]), x.new_empty(B, how.num_heads, T)
        # The fewest parts of a head's queries that keep all threads busy.
        parts = -(-torch.get_num_threads() // (B * how.num_kv_heads))
        _run(attention_kernels.attention_forward, parts, *arguments, o, log_sums)
        ctx.save_for_backward(x, weight, qkv, o, log_sums)
        ctx.how = how
        return o.flatten(2)

    @staticmethod
    @_without_second_derivative
    def backward(ctx: Any, do: Tensor):
        x, weight, qkv, o, log_sums = ctx.saved_tensors
        dqkv, arguments = torch.empty_like(qkv), ctx.how.arguments(qkv)
        do, dheads = do.contiguous().view(o.shape), dqkv.view(arguments[0].shape)
        _run(attention_kernels.attention_backward, *arguments, o, log_sums, do, dheads)
        if weight is None:
            return dqkv, None, None
        return dqkv @ weight, dqkv.flatten(0, 1).T @ x.flatten(0, 1), None


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
    how = _Heads(options.num_heads, len(w_k) // d_head, cos, sin, options.window or 0, starts)
    if options.change_heads is None and options.extend_cache is None and x.dtype == torch.float32:
        return _Attention.apply(x.contiguous(), torch.cat((w_q, w_k, w_v)).float(), how)
    heads = project_heads(x, w_q, w_k, w_v, options)
    if options.extend_cache is not None:
        k, v = heads[:, :, how.num_heads :].transpose(1, 2).chunk(2, 1)
        options.extend_cache(k if options.rope is None else rotate_pairs(k, cos, sin), v)
    return _Attention.apply(heads.flatten(2).float().contiguous(), None, how).to(x.dtype)


def step_adamw(
    tensors: list[tuple[Tensor, ...]], rates: list[float], root_factors: list[float], *numbers: float
) -> None:
    """See `dispatch.step_adamw`; the tensors are contiguous."""
    addresses = np.array([[tensor.data_ptr() for tensor in each] for each in tensors])
    sizes = np.array([parameter.numel() for parameter, *_ in tensors])
    num_threads = torch.get_num_threads() if sizes.sum() >= _MIN_NUMBERS else 1
    arrays = np.zeros_like(sizes), addresses, sizes, np.array(rates), np.array(root_factors)
    kernels.adamw(*arrays, *numbers, num_threads=num_threads)
