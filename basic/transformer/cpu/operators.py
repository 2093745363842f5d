"""The operators for float32 on a CPU: the plain functions' results within rounding, in fewer passes through memory.

torch multiplies the matrices, and kernels compute what is between two multiplications in one pass, in place where they
can. All logits or all scores never exist at once: a tile of them stays in the cache of a core, and scores that the
causal mask hides are skipped.
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

_CHUNK_BYTES = 1 << 20
"""Size of a chunk for each thread: half of the second-level cache of most CPUs."""
_MIN_NUMBERS = 1 << 15
"""Numbers for which it pays to wake other threads."""


def _run(kernel: Kernel, *arguments: Any) -> None:
    """Call a kernel, in torch's threads if its first tensor is large."""
    tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
    num_threads = torch.get_num_threads() if tensor.numel() >= _MIN_NUMBERS else 1
    kernel(np.zeros(2, np.int64), *arguments, num_threads=num_threads)


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
    cos: Tensor
    """(T, d_head / 2), or (T, 0) for no rotation."""
    sin: Tensor
    window: int
    """0 for all tokens before one."""
    starts: Tensor
    """(B, T) or, if a sequence is one document, (B, 0)."""

    @property
    def width(self) -> int:
        """Heads of the projections."""
        return self.num_heads + 2 * self.num_kv_heads

    def chunks(self, qkv_shape: tuple[int, ...]) -> list[slice]:
        """Of sequences, whose projections fit into the caches."""
        return _chunks(qkv_shape[0], 4 * math.prod(qkv_shape[1:]))

    def arguments(self, qkv: Tensor, chunk: slice, memory: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Those that both kernels share; scores become logarithms to the base of 2."""
        scale = math.log2(math.e) * qkv.shape[-1] ** -0.5
        return qkv, self.cos, self.sin, scale, self.window, self.starts[chunk], memory

    @staticmethod
    def memory(x: Tensor, T: int, D: int) -> tuple[Tensor, ...]:
        """For the matrices of a head, in each thread."""
        tokens, features = -(-T // TILE_ROWS) * TILE_ROWS, -(-D // TILE_COLUMNS) * TILE_COLUMNS
        shapes = (
            (4, tokens, features),
            (3, QUERIES, features),
            (2, features, QUERIES),
            (2, tokens, QUERIES),
            (2, QUERIES),
        )
        return tuple(x.new_zeros(torch.get_num_threads(), *shape) for shape in shapes)


class _Attention(Function):
    """Causal attention of features (B, T, d_model); without a weight, these are the projections."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, how: _Heads):
        (B, T, _), H, width = x.shape, how.num_heads, how.width
        D = (x.shape[2] if weight is None else len(weight)) // width
        qkv = x.view(B, T, width, D) if weight is None else x.new_empty(B, T, width, D)
        o, log_sums, memory = x.new_empty(B, T, H, D), x.new_empty(B, H, T), how.memory(x, T, D)
        for chunk in how.chunks(qkv.shape):
            if weight is not None:
                torch.mm(x[chunk].flatten(0, 1), weight.T, out=qkv[chunk].view(-1, len(weight)))
            arguments = how.arguments(qkv[chunk], chunk, memory)
            # The fewest parts of a head's queries that keep all threads busy.
            parts = -(-torch.get_num_threads() // (len(arguments[0]) * how.num_kv_heads))
            _run(attention_kernels.attention_forward, parts, *arguments, o[chunk], log_sums[chunk])
        ctx.save_for_backward(x, weight, qkv, o, log_sums)
        ctx.how = how
        return o.flatten(2)

    @staticmethod
    @_without_second_derivative
    def backward(ctx: Any, do: Tensor):
        x, weight, qkv, o, log_sums = ctx.saved_tensors
        how, do, dx = ctx.how, do.contiguous().view(o.shape), torch.empty_like(x)
        dweight = None if weight is None else torch.empty_like(weight)
        memory = how.memory(x, o.shape[1], o.shape[3])
        for chunk in how.chunks(qkv.shape):
            dqkv = torch.empty_like(qkv[chunk]) if weight is not None else dx[chunk].view(qkv[chunk].shape)
            arguments = how.arguments(qkv[chunk], chunk, memory)
            _run(attention_kernels.attention_backward, *arguments, o[chunk], log_sums[chunk], do[chunk], dqkv)
            if dweight is not None:
                rows = dqkv.view(-1, len(weight))
                torch.mm(rows, weight, out=dx[chunk].flatten(0, 1))
                _add_product(dweight, rows, x[chunk].flatten(0, 1), chunk)
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
