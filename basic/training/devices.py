"""Devices, their precisions and their peak speeds."""

from __future__ import annotations

import torch

from basic.model import TransformerLM
from basic.training.settings import TrainConfig

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
"""Floating-point operations a second in bfloat16 matrix products that are summed in float32, by the name that torch
gives the GPU. From NVIDIA's data sheets and, for GeForce, its architecture white papers; dense: the sheets print twice
as much where half of a matrix may be zeros."""


def training_flops_a_token(model: TransformerLM) -> float:
    """Floating-point operations of the matrix products in forward and backward pass, for a token of a whole context.

    Backward costs twice as much as forward. Attention counts by half: on average a token sees half of the context.

    Source: Chowdhery et al. 2022, PaLM, appendix B, without the half of the attention that the mask takes away.
    """
    return 3 * model.matmul_flops_per_token(model.config.context_length // 2)


def peak_bf16_flops(device: torch.device) -> float | None:
    """Floating-point operations a second that a device can do at most in bfloat16; None where nobody said."""
    return PEAK_BF16_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is a CUDA GPU, else Apple's, else the CPU.

    Raises:
        ValueError: the device is not usable here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}); use cpu or auto") from error
    return torch.device(name)


def activation_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """What the model computes in between its weights, which are float32, and its loss, which is too."""
    has_bfloat16 = device.type == "mps"
    if device.type == "cuda":  # older GPUs only emulate it, slower than float32
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    use = config.precision == "bfloat16" or (config.precision == "auto" and has_bfloat16)
    return torch.bfloat16 if use else torch.float32


def reduce_dtype(config: TrainConfig) -> torch.dtype | None:
    """What gradients are added up in between processes; None for the precision in which each was computed."""
    if config.reduce_precision == "auto":
        return None if config.gradient_accumulation == 1 else torch.float32
    return torch.bfloat16 if config.reduce_precision == "bfloat16" else torch.float32
