"""Operations that exist twice: as Triton kernels where there is a GPU, else as the plain functions of `functional`.

Each looks at its arguments and takes the kernel if that covers them; the results are the same within rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from basic.transformer.functional import at_least_float32, cross_entropy, linear, silu

# More logits than this are never in memory at a time: 2**30 of them are 2 GB in half precision.
_LOGITS_AT_A_TIME = 2**30
_MOST_ROWS_DECODED = 64
_HEAD_SIZES = range(16, 129, 16)

triton_ops = None
if torch.cuda.is_available():
    with suppress(ImportError):  # torch for this GPU may come without Triton
        from basic.transformer.kernels import operators as triton_ops


def available_on(device: torch.device) -> bool:
    """Whether kernels can run there."""
    return triton_ops is not None and device.type == "cuda"


def warn_of_plain_attention(head_size: int, device: torch.device, dtype: torch.dtype) -> None:
    """Say once that a GPU is there but its attention kernel cannot be used, and why."""
    if device.type != "cuda":
        return
    if triton_ops is None:
        _warn_once("Triton is not installed: the plain operations are used on the GPU, which is several times slower")
    elif dtype not in (torch.bfloat16, torch.float16):
        return  # full precision is a choice
    elif head_size not in _HEAD_SIZES:
        _warn_once(
            f"the attention kernels take head sizes that are multiples of 16 up to 128, got {head_size}: the plain "
            "operations are used, which are several times slower"
        )


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _covered(x: Tensor) -> bool:
    return available_on(x.device) and x.dtype in (torch.bfloat16, torch.float16)


def cover_attention(x: Tensor, head_size: int) -> bool:
    """Whether the attention kernels take these features (batch, seq, d_model) with such heads."""
    return _covered(x) and x.ndim == 3 and head_size in _HEAD_SIZES


def cover_decoding(keys: Tensor) -> bool:
    """Whether the decoding kernels take such a cache (batch, heads, context, head size)."""
    return _covered(keys) and keys.shape[0] <= _MOST_ROWS_DECODED and keys.shape[-1] in (16, 32, 64, 128)


def rotary_attention(
    x: Float[Tensor, " batch seq d_model"],
    weights: tuple[Tensor, Tensor, Tensor],
    num_heads: int,
    tables: tuple[Tensor, Tensor] | None,
) -> Float[Tensor, " batch seq head d"]:
    """Causal attention from the features, only where `cover_attention`.

    Args:
        weights: of the queries, keys and values of all heads, each (head d, d_model).
        tables: RoPE's cosines and sines of the positions 0, 1, ..., (positions, d / 2); None for no rotation.
    """
    seq = x.shape[1]
    if tables is None:
        # No rotation is one by no angle: attention without positions is an experiment, not worth a kernel.
        angles = torch.zeros(seq, weights[0].shape[0] // num_heads // 2, device=x.device)
        tables = angles + 1, angles
    if seq > tables[0].shape[0]:
        raise ValueError(f"{seq} tokens do not fit into max_seq_len={tables[0].shape[0]}")
    assert triton_ops is not None
    return triton_ops.rotary_attention(x, torch.cat(weights).to(x.dtype), *tables, num_heads)[0]


@contextmanager
def before_attention_gradients(act: Callable[[], None]) -> Generator[None]:
    """While the block runs, have `act` called each time before kernels compute the gradient of an attention."""
    if triton_ops is None:
        yield
        return
    triton_ops.before_attention_gradients.append(act)
    try:
        yield
    finally:
        triton_ops.before_attention_gradients.remove(act)


def swiglu_linear(x: Float[Tensor, " ... both"], weight: Float[Tensor, " d_out d_ff"]) -> Float[Tensor, " ... d_out"]:
    """SiLU of the first half of the features times the second half, times the weight."""
    if triton_ops is not None and _covered(x):
        return triton_ops.swiglu_linear(x, weight.to(x.dtype))
    gate, value = x.chunk(2, -1)
    return linear(silu(gate) * value, weight)


def linear_cross_entropy(
    x: Float[Tensor, " ... d_model"], weight: Float[Tensor, " vocab_size d_model"], targets: Int[Tensor, " ..."]
) -> Float[Tensor, ""]:
    """The mean cross-entropy of the logits x W^T, in float32."""
    if triton_ops is None or not _covered(x):
        return cross_entropy(at_least_float32(linear(x, weight)), targets)
    rows = targets.numel()
    chunks = -(-rows * weight.shape[0] // _LOGITS_AT_A_TIME)
    chunk_rows = -(-rows // chunks)
    loss, _, _ = triton_ops.linear_cross_entropy(
        x.reshape(rows, -1), weight.to(x.dtype), targets.reshape(rows), chunk_rows, torch.is_grad_enabled()
    )
    return loss
