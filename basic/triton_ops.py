"""The Triton kernels as operators that autograd and torch.compile know, with plain tensors in their signatures.

Each has a fake twin, which says shapes and types without computing, and a backward operator of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from basic import cross_entropy_kernel, flash_attention, rope_kernel, swiglu_kernel


@torch.library.custom_op("basic::rotary_attention", mutates_args=())
def rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate queries and keys of qkv (B, T, 3, H, D), and attend causally.

    Returns:
        The output (B, T, H, D); for the backward pass, the logarithms of the softmax's sums and the rotated queries
        and keys (B, T, 2, H, D).
    """
    B, T, _, H, D = qkv.shape
    rotated = qkv.new_empty((B, T, 2, H, D))
    rope_kernel.rotate_packed(_heads(qkv, 0, 2), _heads(rotated, 0, 2), cos, sin)
    o, log_sums = flash_attention.forward(rotated[:, :, 0], rotated[:, :, 1], qkv[:, :, 2])
    return o, log_sums, rotated


@rotary_attention.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, T, _, H, D = qkv.shape
    return (
        qkv.new_empty((B, T, H, D)),
        qkv.new_empty((B, H, T), dtype=torch.float32),
        qkv.new_empty((B, T, 2, H, D)),
    )


@torch.library.custom_op("basic::rotary_attention_backward", mutates_args=())
def rotary_attention_backward(
    qkv: Tensor, rotated: Tensor, cos: Tensor, sin: Tensor, o: Tensor, log_sums: Tensor, do: Tensor
) -> Tensor:
    """The gradient of qkv, written where it belongs by the kernels themselves: nothing is put together afterwards."""
    do = do if do.stride(-1) == 1 else do.contiguous()
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    flash_attention.backward(
        rotated[:, :, 0], rotated[:, :, 1], qkv[:, :, 2], o, log_sums, do, dqkv[:, :, 0], dqkv[:, :, 1], dqkv[:, :, 2]
    )
    both = _heads(dqkv, 0, 2)
    rope_kernel.rotate_packed(both, both, cos, sin, inverse=True)
    return dqkv


@rotary_attention_backward.register_fake
def _(qkv: Tensor, rotated: Tensor, cos: Tensor, sin: Tensor, o: Tensor, log_sums: Tensor, do: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save_attention(ctx, inputs, output) -> None:
    qkv, cos, sin = inputs
    o, log_sums, rotated = output
    ctx.save_for_backward(qkv, rotated, cos, sin, o, log_sums)


def _attention_gradient(ctx, do, _log_sums, _rotated):
    return rotary_attention_backward(*ctx.saved_tensors, do), None, None


rotary_attention.register_autograd(_attention_gradient, setup_context=_save_attention)


def _heads(packed: Tensor, first: int, last: int) -> Tensor:
    """Some of the parts of (B, T, parts, H, D) as one row of heads, (B, T, heads, D), without a copy."""
    return packed[:, :, first:last].flatten(2, 3)


@torch.library.custom_op("basic::swiglu", mutates_args=())
def swiglu(x: Tensor) -> Tensor:
    """silu(x[..., :width]) * x[..., width:] of (..., 2 width)."""
    return swiglu_kernel.forward(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


@swiglu.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.custom_op("basic::swiglu_backward", mutates_args=())
def swiglu_backward(x: Tensor, dy: Tensor) -> Tensor:
    """The gradient of `swiglu` for its input."""
    dy = dy.reshape(-1, dy.shape[-1])
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    return swiglu_kernel.backward(x.reshape(-1, x.shape[-1]), dy).view(x.shape)


@swiglu_backward.register_fake
def _(x: Tensor, dy: Tensor) -> Tensor:
    return x.new_empty(x.shape)


swiglu.register_autograd(
    lambda ctx, dy: swiglu_backward(ctx.saved_tensors[0], dy),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


@torch.library.custom_op("basic::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean cross-entropy of x W^T, and its gradients for x and W.

    Args:
        x: (rows, d_model).
        weight: (vocab_size, d_model), of the same precision.
        targets: int64 (rows,).
        chunk_rows: rows whose logits exist at a time.
        with_gradient: without it the two gradients are empty.

    Returns:
        The loss, float32 (); the gradients (rows, d_model) and (vocab_size, d_model).
    """
    rows = x.shape[0]
    losses = torch.empty(rows, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x) if with_gradient else x.new_empty(0)
    dweight = weight.new_empty(0)
    for start in range(0, rows, chunk_rows):
        part = slice(start, min(start + chunk_rows, rows))
        logits = x[part] @ weight.T
        cross_entropy_kernel.overwrite_with_gradient(logits, targets[part], losses[part], rows)
        if with_gradient:
            torch.mm(logits, weight, out=dx[part])
            if chunk_rows >= rows:
                dweight = logits.T @ x
            elif start == 0:
                dweight = _product(logits.T, x[part])
            else:
                dweight += _product(logits.T, x[part])
    return losses.mean(), dx, dweight.to(weight.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a float32 result: sums over chunks would lose bits otherwise."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()


@linear_cross_entropy.register_fake
def _(
    x: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss = x.new_empty((), dtype=torch.float32)
    if not with_gradient:
        return loss, x.new_empty(0), weight.new_empty(0)
    return loss, torch.empty_like(x), torch.empty_like(weight)


def _save_gradients(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1], output[2])


def _scale_gradients(ctx, gradient, _dx, _dweight):
    dx, dweight = ctx.saved_tensors
    return dx * gradient.to(dx.dtype), dweight * gradient.to(dweight.dtype), None, None, None


linear_cross_entropy.register_autograd(_scale_gradients, setup_context=_save_gradients)
