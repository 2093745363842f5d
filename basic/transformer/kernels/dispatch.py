"""The choice between Triton kernels, the operators for a CPU, and plain functions; no other module makes it.

`causal_self_attention`, `swiglu`, `rms_norm` and `linear_cross_entropy` have the names and arguments of the plain
functions in `functional`. They call kernels or operators if those support the inputs, else the plain function. The
results are the same within rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from basic.transformer import functional
from basic.transformer.attention import AttentionOptions
from basic.transformer.cpu import operators as cpu_operators

_MAX_LOGITS = 700_000_000  # in memory at a time: 1.4 GB in half precision
_HEAD_SIZES = range(2, 257, 2)

_operators: Any = None
_device_types: tuple[str, ...] = ("cuda",)
if torch.cuda.is_available():
    with suppress(ImportError):  # some builds of torch have no Triton
        from basic.transformer.kernels import operators as _operators


@contextmanager
def use_operators(operators: Any) -> Generator[None]:
    """Replace the operators inside a `with` block, to compare or to test.

    Args:
        operators: the module `operators`, or an object like it, used on the CPU too (for Triton's interpreter), where
            float32 then takes the plain functions; None for plain functions on every device.
    """
    global _operators, _device_types
    previous = _operators, _device_types
    _operators, _device_types = operators, ("cuda", "cpu")
    try:
        yield
    finally:
        _operators, _device_types = previous


def available_on(device: torch.device) -> bool:
    """Whether kernels can run on this device, or on the meta device, where they are compiled ahead."""
    return _operators is not None and device.type in (*_device_types, "meta")


def operators_for(x: Tensor) -> Any:
    """The module of Triton operators if they support the device and dtype of x, which has numbers, else None."""
    supported = available_on(x.device) and x.dtype in (torch.bfloat16, torch.float16) and x.numel() > 0
    return _operators if supported else None


def takes_cpu_operators(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether the operators for a CPU support these: memory of such numbers, and nothing that looks for torch's own
    functions, as what compiles, traces, transforms or casts does (`torch.func.grad`, `torch.autocast`)."""
    for x in tensors:
        plain = type(x) is Tensor or type(x) is Parameter
        if not plain or x.device.type != "cpu" or x.dtype not in dtypes or not x.numel():
            return False
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    is_traced = is_traced or is_in_torch_dispatch_mode() or forward_ad._current_level >= 0
    return "cpu" not in _device_types and not is_traced and not torch.is_autocast_enabled("cpu")


def supports_decoding(keys: Float[Tensor, " batch head context d"]) -> bool:
    """Whether the decoding kernels support a cache with such keys."""
    return operators_for(keys) is not None and keys.shape[-1] in _HEAD_SIZES


def supports_adamw(parameter: Tensor, gradient: Tensor) -> bool:
    """Whether the AdamW kernel supports this parameter and its gradient."""
    return (
        available_on(parameter.device)
        and parameter.dtype == torch.float32
        and parameter.is_contiguous()
        and gradient.is_contiguous()
    )


def step_adamw(
    tensors: list[tuple[Tensor, ...]], rates: list[float], root_factors: list[float], factor: float, keep: float,
    beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    """A step of AdamW on a CPU, or where its kernel on a GPU does not support a parameter.

    Args:
        tensors: each parameter, its gradient and its first and second moments; all but the gradient are changed.
        rates: the learning rate of each, divided by the bias correction of the first moment.
        root_factors: of the root of each second moment: 1 / the root of its bias correction.
        factor: of the gradients.
        keep: factor of the parameters, which decay.
    """
    flat = [tensor for each in tensors for tensor in each]
    if takes_cpu_operators(*flat) and all(tensor.is_contiguous() for tensor in flat):
        cpu_operators.step_adamw(tensors, rates, root_factors, factor, keep, beta1, beta2, eps)
        return
    for (parameter, gradient, first, second), rate, root_factor in zip(tensors, rates, root_factors, strict=True):
        gradient = gradient if factor == 1 else gradient * factor
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        parameter.mul_(keep).addcdiv_(first, (second.sqrt() * root_factor).add_(eps), value=-rate)


def symmetric_product(
    x: Float[Tensor, " batch rows columns"],
    coefficients: tuple[float, float, float] | None = None,
    scales: Float[Tensor, " batch"] | None = None,
    *,
    out: Tensor | None = None,
) -> Float[Tensor, " batch rows rows"]:
    """X X^T, or a polynomial a I + b X + c X X^T of symmetric matrices X; the kernel computes one half of it.

    Args:
        coefficients: a, b, c; None for the product alone.
        scales: with coefficients: of each matrix, a factor f of the matrix whose product with its own transpose X is.
            The result is f (a I + b f^2 X + c f^4 X^2), which is the polynomial of the scaled matrix, scaled.
        out: memory for the result, which the kernel does not need.
    """
    if operators_for(x) is not None:
        from basic.transformer.kernels import muon  # imported late: it needs Triton

        return muon.symmetric_product(x, coefficients, scales)
    if coefficients is None:
        return torch.bmm(x, x.mT, out=out)
    a, b, c = coefficients
    factors = None if scales is None else scales.to(x.dtype)[:, None, None]
    x = x if factors is None else x * factors.square()
    result = torch.baddbmm(x, x, x, beta=b, alpha=c, out=out)
    result.diagonal(dim1=-2, dim2=-1).add_(a)
    return result if factors is None else result.mul_(factors)


def warn_about_plain_attention(d_head: int, device: torch.device, dtype: torch.dtype) -> None:
    """Warn once, with the reason, if attention on a GPU cannot use its kernel."""
    if device.type != "cuda":
        return
    if _operators is None:
        _warn_once("Triton is not installed: the plain operations are used on the GPU, which is several times slower")
    elif dtype not in (torch.bfloat16, torch.float16):
        return  # the user has chosen full precision
    elif d_head not in _HEAD_SIZES:
        _warn_once(
            f"the attention kernels support even head sizes up to 256, got {d_head}: the plain "
            "operations are used, which are several times slower"
        )


def warn_about_plain_decoding(supported: bool, keys: Float[Tensor, " batch head context d"]) -> None:
    """Warn once, with the reason, if decoding on a GPU cannot use its kernels.

    Args:
        supported: whether the model has pre-norm and RoPE, which the kernels need.
        keys: of the cache.
    """
    if keys.device.type != "cuda" or not available_on(keys.device):
        return  # no kernel runs there: the CPU, or no Triton, of which attention warns
    if operators_for(keys) is None:
        name = str(keys.dtype).removeprefix("torch.")
        reason = f"are for bfloat16 and float16, got {name}; set model.activation_dtype = torch.bfloat16"
    elif not supported:
        reason = "need a model with norm='pre', positions='rope' and no QK-norm over all heads"
    else:
        reason = f"support even head sizes up to 256, got {keys.shape[-1]}"
    _warn_once(f"the decoding kernels {reason}: the plain operations are used, which take ten times as long or more")


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def causal_self_attention(
    x: Float[Tensor, " ... seq d_model"],
    w_q: Float[Tensor, " q_features d_model"],
    w_k: Float[Tensor, " kv_features d_model"],
    w_v: Float[Tensor, " kv_features d_model"],
    options: AttentionOptions,
) -> Float[Tensor, " ... seq q_features"]:
    """See `functional.causal_self_attention`.

    The kernels compute complete sequences, with the same positions in all sequences of a batch. With an empty cache
    they compute a prompt too, without gradients.
    """
    operators, num_heads, rope = operators_for(x), options.num_heads, options.rope
    d_head, extend_cache = w_q.shape[0] // num_heads, options.extend_cache
    same_positions = rope is None or rope[0].ndim == 2
    complete = extend_cache is None or (options.num_cached == 0 and not torch.is_grad_enabled())
    supported = complete and x.ndim == 3 and same_positions
    # In half precision all but the projections are computed in float32.
    dtypes = torch.float32, torch.bfloat16, torch.float16
    if supported and x.shape[1] > 1 and takes_cpu_operators(x, w_q, w_k, w_v, dtypes=dtypes):
        return cpu_operators.causal_self_attention(x, w_q, w_k, w_v, options)
    if operators is None or not supported or d_head not in _HEAD_SIZES:
        return functional.causal_self_attention(x, w_q, w_k, w_v, options)
    if rope is None:
        # Rotate by zero: attention without positions is for experiments, which need no kernel of their own.
        angles = torch.zeros(x.shape[1], d_head // 2, device=x.device)
        rope = angles + 1, angles
    window, starts = options.window or 0, options.document_starts
    window = 0 if window >= x.shape[1] else window  # else the kernels would be compiled for it
    starts = None if starts is None else starts.expand(x.shape[:2]).to(torch.int32).contiguous()
    how = *rope, num_heads, len(w_k) // d_head, window, starts
    if options.change_heads is not None or options.fp8 is not None:
        x, weight = functional.project_heads(x, w_q, w_k, w_v, options).flatten(-2), None
    else:
        weight = torch.cat((w_q, w_k, w_v)).to(x.dtype)
    attended, _, qkv = operators.rotary_attention(x, weight, *how)
    if extend_cache is not None:
        _, k, v = operators.split_heads(qkv, num_heads)
        extend_cache(k.transpose(1, 2), v.transpose(1, 2))
    return attended.flatten(-2)


@contextmanager
def before_attention_gradients(callback: Callable[[], None]) -> Generator[None]:
    """Inside a `with` block, call `callback` each time before kernels compute the gradient of an attention."""
    if _operators is None:
        yield
        return
    callbacks = _operators.before_attention_gradients
    callbacks.append(callback)
    try:
        yield
    finally:
        callbacks.remove(callback)


def swiglu(
    x: Float[Tensor, " ... d_model"],
    w1: Float[Tensor, " d_ff d_model"],
    w2: Float[Tensor, " d_model d_ff"],
    w3: Float[Tensor, " d_ff d_model"],
) -> Float[Tensor, " ... d_model"]:
    """See `functional.swiglu`."""
    if takes_cpu_operators(x, w1, w2, w3):
        return cpu_operators.swiglu(x, w1, w2, w3)
    if (operators := operators_for(x)) is None:
        return functional.swiglu(x, w1, w2, w3)
    return operators.swiglu_linear(functional.linear(x, w1, w3), w2.to(x.dtype))


def rms_norm(
    x: Float[Tensor, " ... d_model"], weight: Float[Tensor, " d_model"], eps: float
) -> Float[Tensor, " ... d_model"]:
    """See `functional.rms_norm`. Triton's kernels have none: torch.compile fuses the plain function."""
    return (cpu_operators if takes_cpu_operators(x, weight) else functional).rms_norm(x, weight, eps)


def linear_cross_entropy(
    x: Float[Tensor, " ... d_model"],
    weight: Float[Tensor, " vocab_size d_model"],
    targets: Int[Tensor, " ..."],
    *,
    ignore_index: int = functional.IGNORE_INDEX,
    num_targets: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """See `functional.linear_cross_entropy`. Else than there, the logits of a chunk of rows exist at a time."""
    if takes_cpu_operators(x, weight):
        functional.check_targets(targets, x.shape[:-1], len(weight), ignore_index)
        flat = x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1).long()
        return cpu_operators.linear_cross_entropy(*flat, ignore_index, num_targets)
    if (operators := operators_for(x)) is None:
        return functional.linear_cross_entropy(x, weight, targets, ignore_index=ignore_index, num_targets=num_targets)
    functional.check_ids(targets, "targets")
    rows = targets.numel()
    num_chunks = -(-rows * weight.shape[0] // _MAX_LOGITS)
    chunk_rows = -(-rows // num_chunks)
    loss, _, _ = operators.linear_cross_entropy(
        x.reshape(rows, -1),
        weight.to(x.dtype),
        targets.reshape(rows).long(),
        chunk_rows,
        torch.is_grad_enabled(),
        ignore_index,
        num_targets,
    )
    return loss
