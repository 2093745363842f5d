"""Devices, their data types, their peak speeds and their failures.

GPU utilization is given as MFU, model FLOPs utilization: the operations per second that training needs
(`training_flops_per_token` x tokens per second), divided by the GPU's peak in bfloat16 (`PEAK_BF16_FLOPS`).
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from basic.common.errors import InvalidConfigError, failures_of
from basic.model import TransformerLM
from basic.training.settings import RunConfig, TrainConfig
from basic.transformer.kernels import dispatch

FP8_DIVISOR = 16
"""What sizes must be divisible by that are multiplied in 8 bits."""
PEAK_BF16_FLOPS = {
    "NVIDIA A10": 125e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 5090": 209e12,
}
"""Peak floating-point operations per second of bfloat16 matrix multiplications with float32 accumulation, by the name
from `device_name`. The numbers are for dense matrices, from NVIDIA's data sheets and, for GeForce, its architecture
white papers. (Data sheets often print the number with sparsity, which is twice as large.)"""


def device_name(device: torch.device) -> str:
    """Return the GPU's product name, or the device type ("cpu", "mps")."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def training_flops_per_token(model: TransformerLM) -> float:
    """Count the floating-point operations of forward and backward pass per token, at the full context length.

    Only matrix multiplications count. The backward pass costs twice as much as the forward pass. Attention counts half,
    because with a causal mask a token attends to half of the context on average.

    Source: Chowdhery et al. 2022, PaLM, appendix B, without the half of attention that the mask removes.
    """
    return 3 * model.matmul_flops_per_token(model.config.context_length // 2)


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of this name; "auto" is a CUDA GPU, else Apple's GPU (mps), else the CPU.

    Raises:
        InvalidConfigError: the device cannot be used here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # the device "meta" has shapes, but no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidConfigError(f"device {name!r} cannot be used here ({reason}); use cpu or auto") from error
    return torch.device(name)


def activation_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of activations and matrix multiplications; weights and loss are float32."""
    has_bfloat16 = device.type == "mps"
    if device.type == "cuda":  # older GPUs emulate bfloat16, more slowly than they compute in float32
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    use = config.precision == "bfloat16" or (config.precision in ("auto", "fp8") and has_bfloat16)
    return torch.bfloat16 if use else torch.float32


def check_precision(config: RunConfig, device: torch.device, num_ranks: int = 1) -> None:
    """Check that a run in fp8 can be trained here; all other precisions can be.

    Raises:
        InvalidConfigError: the device has no matrix multiplication in 8 bits, or the run has sizes or settings that
            it does not support.
    """
    if config.train.precision != "fp8":
        return
    model, train = config.model, config.train
    tokens = train.batch_size // train.gradient_accumulation // num_ranks * model.context_length
    sizes = {"d_model": model.d_model, "d_ff": model.d_ff or 0, "num_heads x head size": model.num_heads * model.d_head}
    sizes |= {"num_kv_heads x head size": model.kv_heads * model.d_head, "the tokens of a micro-batch": tokens}
    uneven = [f"{size} for {name}" for name, size in sizes.items() if size % FP8_DIVISOR]
    problem = None
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        name = device_name(device)
        problem = f"a GPU that multiplies in 8 bits (NVIDIA's L4, RTX 4090, H100 and later ones), got {name}"
    elif not dispatch.available_on(device):
        problem = "Triton, which is not installed"
    elif train.parallel == "sharded" and num_ranks > 1:
        problem = 'parallel = "replicated", got "sharded"'
    elif uneven:
        problem = f"sizes that are divisible by {FP8_DIVISOR}, got {uneven[0]}"
    if problem is not None:
        raise InvalidConfigError(f'precision = "fp8" needs {problem}; change that, or use precision = "auto"')


def reduce_dtype(config: TrainConfig) -> torch.dtype | None:
    """Return the dtype in which gradients are summed over processes; None for the dtype of each gradient."""
    if config.reduce_precision == "auto":
        return None if config.gradient_accumulation == 1 else torch.float32
    return torch.bfloat16 if config.reduce_precision == "bfloat16" else torch.float32


def matmul_flops_per_s(device: torch.device) -> float:
    """Measure the floating-point operations per second of a large matrix multiplication; takes less than a second."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    matrix, best_s = torch.ones(size, size, dtype=dtype, device=device), float("inf")
    for _ in range(4):  # the first one loads libraries
        started = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # waits for the device
        best_s = min(best_s, time.perf_counter() - started)
    return 2 * size**3 / best_s


@contextmanager
def deterministic_on_cpu(device: torch.device) -> Generator[None]:
    """Make sums on a CPU deterministic: otherwise two threads add to an embedding's gradient in a random order."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        settings.fill_uninitialized_memory = False  # it writes NaN to all new memory, for debugging
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was too small; on a CPU, torch raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def more_micro_batches(config: TrainConfig, least: int) -> int | None:
    """The smallest number of micro-batches, from `least` on, that divides the batch; None if there is none."""
    return next((n for n in range(least, config.batch_size + 1) if config.batch_size % n == 0), None)


@contextmanager
def advice_on_failures(config: RunConfig) -> Generator[None]:
    """Turn an out-of-memory error into a MemoryError, and one of torch.compile into a DependencyError, with advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        of_compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        if of_compiler or "Failed to find C compiler" in str(error):  # the second is Triton's
            with failures_of("compiling", "install gcc and g++, or train on the CPU without --compile"):
                raise
        if not is_out_of_memory(error):
            raise
        batch_size, accumulation = config.train.batch_size, config.train.gradient_accumulation
        more = more_micro_batches(config.train, accumulation + 1)
        remedy = "a smaller model" if more is None else f"gradient_accumulation = {more} for the same result"
        raise MemoryError(
            f"out of memory with batch_size = {batch_size}, gradient_accumulation = {accumulation}, context_length = "
            f"{config.model.context_length}; try {remedy}, or lower batch_size or context_length "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error
