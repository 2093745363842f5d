"""Matrix multiplications of hidden features in 8-bit floating point, for training.

The three products of a linear layer, y = x W^T, dx = dy W and dW = dy^T x, take inputs and weights in e4m3 (three bits
of mantissa) and gradients in e5m2 (two, and more exponents), and give bfloat16 or float32. Each tensor has one scale,
which takes its numbers to the range of its format. A scale is made from the largest absolute value of the step before
(delayed scaling), so that the kernel which computes a tensor writes it in 8 bits at once; the scale of the current step
would need one more pass. Scales are powers of two, which round nothing, and leave headroom for larger numbers.

Embedding, output layer, norms, attention and loss are those of bfloat16.

Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from basic.transformer.kernels.fp8 import (
    BACKWARD,
    FORWARD,
    INVERSE,
    LARGEST,
    LIMITS,
    NONFINITE,
    RECORD_SIZE,
    SATURATED,
    SCALE,
    multiply,
    quantize,
    quantize_into,
    quantized_gate,
    quantized_gate_backward,
)

INPUT, WEIGHT, GRADIENT = range(3)
"""The tensors of a matrix multiplication that have records: x, W and the gradient of x W^T."""
KINDS = ("input", "weights", "gradient")
_HEADROOM = 4.0, 4.0, 128.0
"""A number may be this many times as large as the largest one of the step before. Gradients vary the most, and their
format has the most range."""
_CALIBRATION_PASSES = 2


class Fp8Matrix:
    """A matrix of hidden features in 8 bits, or several joined along their rows, and the records of its products.

    Attributes:
        weights: the parameters whose values it has.
        rows, columns: the matrix (d_out, d_in) and its transpose.
        records: float32 (3, RECORD_SIZE); see `basic.transformer.kernels.fp8`.
    """

    def __init__(self, weights: list[Tensor], records: Tensor):
        d_out, d_in = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
        self.weights, self.records = weights, records
        self.rows = torch.empty((d_out, d_in), dtype=FORWARD, device=records.device)
        self.columns = torch.empty((d_in, d_out), dtype=FORWARD, device=records.device)

    def quantize(self) -> None:
        """Take the values of the parameters."""
        sizes = [weight.shape[0] for weight in self.weights]
        parts = zip(self.weights, self.rows.split(sizes), self.columns.split(sizes, 1), strict=True)
        for weight, rows, columns in parts:
            quantize_into(weight.detach(), rows, columns, self.records[WEIGHT])

    def linear(self, x: Float[Tensor, " ... d_in"], *weights: Tensor) -> Float[Tensor, " ... d_out"]:
        """x W^T; the gradients of W are those of `weights`, the parameters that it has the values of."""
        return _Linear.apply(x, self.rows, self.columns, self.records, *weights)


class Fp8SwiGLU:
    """The feed-forward layer W2 (SiLU(W1 x) * W3 x).

    Args:
        first: W1 and W3, joined.
        second: W2.
    """

    def __init__(self, first: Fp8Matrix, second: Fp8Matrix):
        self.first, self.second = first, second

    def __call__(self, x: Float[Tensor, " ... d_model"], w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        a, b = self.first, self.second
        return _SwiGLU.apply(x, a.rows, a.columns, a.records, b.rows, b.columns, b.records, w1, w3, w2)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, columns: Tensor, records: Tensor, *weights: Tensor) -> Tensor:
        x_rows, x_columns = quantize(x.reshape(-1, x.shape[-1]), records[INPUT])
        ctx.save_for_backward(x_columns, columns, records)
        ctx.dtype, ctx.sizes = weights[0].dtype, [weight.shape[0] for weight in weights]
        return multiply(x_rows, rows, records[INPUT], records[WEIGHT], x.dtype, True).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dy,) = gradients
        x_columns, columns, records = ctx.saved_tensors
        dy_rows, dy_columns = quantize(dy.reshape(-1, dy.shape[-1]), records[GRADIENT], True)
        dx = multiply(dy_rows, columns, records[GRADIENT], records[WEIGHT], dy.dtype, False)
        dweight = multiply(dy_columns, x_columns, records[GRADIENT], records[INPUT], dy.dtype, False).to(ctx.dtype)
        return dx.view(*dy.shape[:-1], -1), None, None, None, *dweight.split(ctx.sizes)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, columns: Tensor, records: Tensor,
        rows2: Tensor, columns2: Tensor, records2: Tensor, w1: Tensor, w3: Tensor, w2: Tensor,
    ) -> Tensor:  # fmt: skip
        x_rows, x_columns = quantize(x.reshape(-1, x.shape[-1]), records[INPUT])
        both = multiply(x_rows, rows, records[INPUT], records[WEIGHT], x.dtype, True)
        gated = quantized_gate(both, records2[INPUT])
        ctx.save_for_backward(x_columns, columns, records, both, columns2, records2)
        ctx.dtype = w1.dtype
        return multiply(gated, rows2, records2[INPUT], records2[WEIGHT], x.dtype, True).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dy,) = gradients
        x_columns, columns, records, both, columns2, records2 = ctx.saved_tensors
        dy_rows, dy_columns = quantize(dy.reshape(-1, dy.shape[-1]), records2[GRADIENT], True)
        dgated = multiply(dy_rows, columns2, records2[GRADIENT], records2[WEIGHT], dy.dtype, False)
        d_rows, d_columns, gated = quantized_gate_backward(both, dgated, records[GRADIENT], records2[INPUT])
        dw2 = multiply(dy_columns, gated, records2[GRADIENT], records2[INPUT], dy.dtype, False).to(ctx.dtype)
        dx = multiply(d_rows, columns, records[GRADIENT], records[WEIGHT], dy.dtype, False)
        dw13 = multiply(d_columns, x_columns, records[GRADIENT], records[INPUT], dy.dtype, False).to(ctx.dtype)
        return dx.view(*dy.shape[:-1], -1), *[None] * 6, *dw13.chunk(2), dw2


class Fp8Matrices:
    """All matrices of a model that are multiplied in 8 bits, and the table of their records.

    Args:
        groups: the parameters of each matrix, by a name for messages.
        num_tokens: of the mean loss, for the first scales.
        all_reduce_largest: takes the largest of each number over the ranks that train together, in place. So all of
            them have the same scales, those of one process with all sequences.
    """

    def __init__(
        self,
        groups: Mapping[str, list[Tensor]],
        num_tokens: int,
        all_reduce_largest: Callable[[Tensor], Tensor] = lambda largest: largest,
    ):
        device = next(iter(groups.values()))[0].device
        self.all_reduce_largest = all_reduce_largest
        self.table = torch.zeros((len(groups), len(KINDS), RECORD_SIZE), device=device)
        self.limits = torch.tensor([LIMITS[FORWARD], LIMITS[FORWARD], LIMITS[BACKWARD]], device=device)
        self.headroom = torch.tensor(_HEADROOM, device=device)
        self.matrices = {
            name: Fp8Matrix(groups[name], records) for name, records in zip(groups, self.table, strict=True)
        }
        # The first scales need not fit well, because steps are measured before the first one is taken: features are
        # near 1, and so are gradients, times the number of tokens in the mean.
        self._set_scales(torch.tensor([8.0, 64.0, 2.0 ** round(math.log2(num_tokens))], device=device))
        self.update()

    @property
    def scales(self) -> dict[str, list[float]]:
        """The scales of each matrix, in the order of `KINDS`: what a resumed run needs to go on as it would have."""
        return dict(zip(self.matrices, self.table[..., SCALE].tolist(), strict=True))

    @scales.setter
    def scales(self, scales: Mapping[str, list[float]]) -> None:
        self._set_scales(torch.tensor([scales[name] for name in self.matrices], device=self.table.device))

    def calibrate(self, compute_gradients: Callable[[], object]) -> None:
        """Measure the first step: each pass with the scales of the one before is nearer to the numbers' true sizes."""
        for _ in range(_CALIBRATION_PASSES):
            compute_gradients()
            self.end_measuring()
            self.update()
        self.table[..., SATURATED:] = 0

    def begin_measuring(self) -> None:
        """Before a step: forget the inputs of an evaluation since the last one."""
        for kind in (INPUT, GRADIENT):
            self.table[:, kind, LARGEST] = 0

    def end_measuring(self) -> Tensor:
        """After the backward pass: take the largest numbers of all ranks.

        Returns:
            0; NaN if a number of this step was not finite, which the largest number in 8 bits may hide.
        """
        largest = self.all_reduce_largest(self.table[..., LARGEST].contiguous())
        self.table[..., LARGEST] = largest
        return (largest * 0).sum()

    def update(self) -> None:
        """After a step: the next scales, from the largest numbers of this one; and the new weights, in 8 bits."""
        largest = self.table[..., LARGEST]
        is_finite = largest.isfinite()
        self.table[..., NONFINITE] += ~is_finite
        self.table[..., SATURATED] += is_finite & (largest * self.table[..., SCALE] > self.limits)
        scales = (self.limits / (self.headroom * largest)).log2().floor().clamp(-100, 100).exp2()
        self._set_scales(torch.where(is_finite & (largest > 0), scales, self.table[..., SCALE]))

    def _set_scales(self, scales: Tensor) -> None:
        """Set the scales (matrices, kinds), and take the values of the parameters with theirs."""
        self.table[..., SCALE], self.table[..., INVERSE] = scales, 1 / scales
        self.table[..., LARGEST] = 0
        for matrix in self.matrices.values():
            matrix.quantize()

    def take_unusual(self) -> list[str]:
        """What was too large for its scale or not finite since the last call, such as "layers.3.ffn.w2 (gradient)"."""
        counts = self.table[..., SATURATED : NONFINITE + 1].tolist()
        self.table[..., SATURATED:] = 0
        return [
            f"{name} ({kind}) {what} in {count:.0f} steps"
            for name, of_kinds in zip(self.matrices, counts, strict=True)
            for kind, (saturated, nonfinite) in zip(KINDS, of_kinds, strict=True)
            for what, count in (("was too large for its scale", saturated), ("was not finite", nonfinite))
            if count
        ]
