"""The Triton kernels as PyTorch operators, which autograd and torch.compile support.

Each operator has a fake version, which returns empty tensors of the right shapes and dtypes, and a backward operator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from basic.transformer.functional import IGNORE_INDEX, mean_correction
from basic.transformer.kernels import ahead, cross_entropy, swiglu
from basic.transformer.kernels.attention import flash_attention, rope

before_attention_gradients: list[Callable[[], None]] = []
"""Called when the backward pass of an attention begins, also in compiled code and while a CUDA graph is recorded. A
replay of the graph repeats only what they did on the device."""


@ahead.operator("basic::rotary_attention")
def rotary_attention(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int, window: int = 0,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Project x (B, T, d_model) to queries, keys and values, rotate them by RoPE, and compute causal attention.

    The projection is in the operator because only attention uses it, so that it can be rotated in place.

    Args:
        weight: of the projection; None if x is projected, (B, T, (H + 2 KV heads) D).
        window: number of keys that a query attends to; 0 for all.
        starts: int32 (B, T), the index of the first token of each token's document; None for one document.

    Returns:
        The output (B, T, H, D); and for the backward pass, the logarithms of the softmax's sums and the rotated queries
        and keys with the values, (B, T, H + 2 KV heads, D).
    """
    projected = x.contiguous() if weight is None else x @ weight.T
    projected = projected.view(*x.shape[:2], num_heads + 2 * num_kv_heads, -1)
    qkv = torch.empty_like(projected) if weight is None else projected
    rope.rotate_packed(projected, cos, sin, num_heads + num_kv_heads, qkv)
    o, log_sums = flash_attention.forward(*split_heads(qkv, num_heads), window, starts)
    return o, log_sums, qkv


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """The queries, keys and values of packed heads (B, T, heads, D)."""
    num_kv_heads = (qkv.shape[2] - num_heads) // 2
    return qkv.split((num_heads, num_kv_heads, num_kv_heads), 2)


@rotary_attention.register_fake
def _(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int, window: int = 0,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, T, features = x.shape
    heads = num_heads + 2 * num_kv_heads
    D = (features if weight is None else weight.shape[0]) // heads
    return (
        x.new_empty((B, T, num_heads, D)),
        x.new_empty((B, num_heads, T), dtype=torch.float32),
        x.new_empty((B, T, heads, D)),
    )


@ahead.operator("basic::rotary_attention_backward")
def rotary_attention_backward(
    x: Tensor | None, weight: Tensor | None, qkv: Tensor, cos: Tensor, sin: Tensor, o: Tensor, log_sums: Tensor,
    do: Tensor, window: int = 0, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of x and of the weight (empty without a weight)."""
    if not qkv.is_meta:  # else the kernels are compiled ahead, in another thread
        for callback in before_attention_gradients:
            callback()
    do = do if do.stride(-1) == 1 else do.contiguous()
    dqkv = torch.empty_like(qkv)
    q_k_v, gradients = split_heads(qkv, o.shape[2]), split_heads(dqkv, o.shape[2])
    flash_attention.backward(*q_k_v, o, log_sums, do, *gradients, cos, sin, window, starts)
    if x is None or weight is None:
        return dqkv.flatten(2), qkv.new_empty(0)
    return _linear_backward(x, weight, dqkv)


@rotary_attention_backward.register_fake
def _(
    x: Tensor | None, weight: Tensor | None, qkv: Tensor, cos: Tensor, sin: Tensor, o: Tensor, log_sums: Tensor,
    do: Tensor, window: int = 0, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if x is None or weight is None:
        return qkv.new_empty(qkv.flatten(2).shape), qkv.new_empty(0)
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_attention(ctx, inputs, output) -> None:
    x, weight, cos, sin, _, _, ctx.window, starts = inputs
    o, log_sums, qkv = output
    ctx.save_for_backward(None if weight is None else x, weight, qkv, cos, sin, o, log_sums, starts)


def _attention_gradient(ctx, do, _log_sums, _qkv):
    *saved, starts = ctx.saved_tensors
    dx, dweight = rotary_attention_backward(*saved, do, ctx.window, starts)
    return dx, dweight if ctx.needs_input_grad[1] else None, None, None, None, None, None, None


rotary_attention.register_autograd(_attention_gradient, setup_context=_save_attention)


def _linear_backward(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x W^T for x and W."""
    dy = dy.view(-1, weight.shape[0])
    return (dy @ weight).view(x.shape), dy.T @ x.reshape(-1, x.shape[-1])


@ahead.operator("basic::swiglu_linear")
def swiglu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """(silu(x1) * x3) W^T, with x1 and x3 side by side in x (..., 2 width), and W (d_out, width)."""
    gated = swiglu.forward(x.reshape(-1, x.shape[-1]))
    return (gated @ weight.T).view(*x.shape[:-1], -1)


@swiglu_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@ahead.operator("basic::swiglu_linear_backward")
def swiglu_linear_backward(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `swiglu_linear` for x and W."""
    dy = dy.reshape(-1, dy.shape[-1])
    gated = dy @ weight  # the gradient of the gate's output; the kernel overwrites it with that output
    dx = swiglu.backward(x.reshape(-1, x.shape[-1]), gated)
    return dx.view(x.shape), dy.T @ gated


@swiglu_linear_backward.register_fake
def _(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


swiglu_linear.register_autograd(
    lambda ctx, dy: swiglu_linear_backward(*ctx.saved_tensors, dy),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@ahead.operator("basic::linear_cross_entropy")
def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int, with_gradient: bool, ignore_index: int = IGNORE_INDEX,
    num_targets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The mean cross-entropy of the logits x W^T, and its gradients for x and W.

    Args:
        x: (rows, d_model).
        weight: (vocab_size, d_model), of the same dtype.
        targets: int64 (rows,); one outside the vocabulary makes the loss NaN.
        chunk_rows: number of rows whose logits exist at a time.
        with_gradient: if False, both gradients are empty.
        ignore_index: rows with this target take no part in the mean.
        num_targets: float32 (), the number that the sum is divided by; None for that of the rows in the mean.

    Returns:
        The loss, float32 () (NaN if all rows are ignored), and the gradients (rows, d_model) and (vocab_size, d_model).
    """
    rows, vocab_size = x.shape[0], len(weight)
    weight = _pad_rows(weight)
    losses = torch.empty(rows, dtype=torch.float32, device=x.device)
    correction = mean_correction(targets, ignore_index, torch.float32)  # the CPU does not wait for it
    inverse_count = correction / rows if num_targets is None else 1 / num_targets
    dx = torch.empty_like(x) if with_gradient else x.new_empty(0)
    sum_dtype = torch.float32 if chunk_rows < rows else weight.dtype
    dweight = torch.empty_like(weight, dtype=sum_dtype) if with_gradient else weight.new_empty(0)
    memory = x.new_empty(min(chunk_rows, rows), weight.shape[0])  # of one chunk, for all of them
    for start in range(0, rows, chunk_rows):
        chunk = slice(start, min(start + chunk_rows, rows))
        logits = torch.mm(x[chunk], weight.T, out=memory[: chunk.stop - start])
        known = logits[:, :vocab_size]  # the logits of the zero rows stay zero, and so is their gradient
        cross_entropy.overwrite_with_gradient(known, targets[chunk], losses[chunk], inverse_count, ignore_index)
        if with_gradient:
            torch.mm(logits, weight, out=dx[chunk])
            _add_product(dweight, logits.T, x[chunk], is_first=start == 0)
    loss = losses.mean() * correction if num_targets is None else losses.sum() * inverse_count
    return loss, dx, dweight[:vocab_size].to(weight.dtype)


def _pad_rows(weight: Tensor) -> Tensor:
    """The matrix with rows of zeros up to a multiple of 64, if its number of rows is no multiple of 8.

    Rows of logits begin at multiples of 16 bytes then: with 50,257 of them, multiplications took four times as long.
    """
    if len(weight) % 8 == 0:
        return weight
    padded = weight.new_zeros(-(-len(weight) // 64) * 64, weight.shape[1])
    padded[: len(weight)] = weight
    return padded


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, is_first: bool) -> None:
    """Add a @ b to the total, which may be of a wider dtype, in one pass; or overwrite it."""
    if total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=not is_first, out=total)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=not is_first, out=total)


@linear_cross_entropy.register_fake
def _(
    x: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int, with_gradient: bool, ignore_index: int = IGNORE_INDEX,
    num_targets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    loss = x.new_empty((), dtype=torch.float32)
    if not with_gradient:
        return loss, x.new_empty(0), weight.new_empty(0)
    return loss, torch.empty_like(x), torch.empty_like(weight)


def _save_gradients(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1], output[2])


def _scale_gradients(ctx, gradient, _dx, _dweight):
    dx, dweight = ctx.saved_tensors
    return dx * gradient.to(dx.dtype), dweight * gradient.to(dweight.dtype), None, None, None, None, None


linear_cross_entropy.register_autograd(_scale_gradients, setup_context=_save_gradients)
