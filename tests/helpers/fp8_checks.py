"""Training in fp8 against its oracle, which rounds to 8 bits, goes back to float64 and multiplies there."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from basic.transformer import functional
from basic.transformer.fp8 import GRADIENT, INPUT, WEIGHT, Fp8Matrices, Fp8Matrix, Fp8SwiGLU
from basic.transformer.kernels import fp8
from basic.transformer.kernels.fp8 import BACKWARD, FORWARD, LARGEST, LIMITS, SCALE
from tests.helpers.kernel_checks import poisoned, relative_error


def round_to_8_bits(x: Tensor, dtype: torch.dtype, scale: Tensor) -> Tensor:
    scaled = (x.float() * scale).clamp(-LIMITS[dtype], LIMITS[dtype])
    return (scaled.to(dtype).float() / scale).to(x.dtype)


def plain_linear(x: Tensor, weight: Tensor, matrix: Fp8Matrix) -> Tensor:
    """x W^T of the rounded numbers; the gradient of the result is rounded too before it goes on."""
    scales = matrix.records[:, SCALE]

    def rounded(tensor: Tensor, kind: int) -> Tensor:
        return tensor + (round_to_8_bits(tensor, FORWARD, scales[kind]) - tensor).detach()

    y = functional.linear(rounded(x, INPUT), rounded(weight, WEIGHT))
    y.register_hook(lambda dy: round_to_8_bits(dy, BACKWARD, scales[GRADIENT]))
    return y


def check_quantizing(shape: tuple[int, int], device: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, device=device) * torch.logspace(-8, 2, shape[1], device=device)
    x[0, :6] = torch.tensor([0.0, 1e9, -1e9, 57344.0, 448.0, -465.0], device=device)
    x = x.bfloat16()
    for is_gradient, dtype in ((False, FORWARD), (True, BACKWARD)):
        record = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0], device=device)
        with poisoned():
            rows, columns = fp8.quantize(x, record, is_gradient)
        expected = round_to_8_bits(x, dtype, record[SCALE]).float()
        assert torch.equal(rows.float(), expected)
        assert torch.equal(columns.float(), rows.float().T)
        assert record[LARGEST] == x.abs().max()
    for bad in (math.nan, math.inf, -math.inf):
        x[-1, -1] = bad
        rows, columns = fp8.quantize(x, record)
        assert rows[-1, -1].float().nan_to_num(7).item() == {math.inf: 448, -math.inf: -448}.get(bad, 7)
        assert columns[-1, -1].float().equal(rows[-1, -1].float()) or math.isnan(bad)
        assert not record[LARGEST].isfinite()


def check_linear(tokens: int, d_in: int, d_outs: tuple[int, ...], device: str) -> None:
    """Two steps: the scales of the second one are those of the first one's numbers."""
    torch.manual_seed(0)
    x = torch.randn(2, tokens // 2, d_in, device=device).bfloat16().requires_grad_()
    weights: list[Tensor] = [(torch.randn(d, d_in, device=device) / d_in**0.5).requires_grad_() for d in d_outs]
    matrices = Fp8Matrices({"only": weights}, tokens)
    matrix = matrices.matrices["only"]
    dy = torch.randn(2, tokens // 2, sum(d_outs), device=device).bfloat16() / tokens
    for _ in range(2):
        for tensor in (x, *weights):
            tensor.grad = None
        with poisoned():
            y = matrix.linear(x, *weights)
            y.backward(dy)
        wide, wide_weight = x.detach().double().requires_grad_(), torch.cat(weights).detach().double().requires_grad_()
        expected = plain_linear(wide, wide_weight, matrix)
        expected.backward(dy.double())
        results = y, x.grad, torch.cat([weight.grad for weight in weights if weight.grad is not None])
        for ours, plain in zip(results, (expected, wide.grad, wide_weight.grad), strict=True):
            assert ours is not None
            assert plain is not None
            assert (error := relative_error(ours, plain)) < 1e-2, error
        matrices.update()
    for kind, tensor, largest in ((INPUT, x, 112), (WEIGHT, torch.cat(weights), 112), (GRADIENT, dy, 448)):
        scale = matrix.records[kind, SCALE].item()
        assert largest / 2 < scale * tensor.abs().max().item() <= largest  # below the limits by the headroom
        assert math.frexp(scale)[0] == 0.5  # a power of two
    assert matrices.take_unusual() == []


def check_swiglu(tokens: int, d_model: int, d_ff: int, device: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(tokens, d_model, device=device).bfloat16().requires_grad_()
    shapes = (d_ff, d_model), (d_model, d_ff), (d_ff, d_model)
    w1, w2, w3 = ((torch.randn(shape, device=device) / shape[1] ** 0.5).requires_grad_() for shape in shapes)
    matrices = Fp8Matrices({"in": [w1, w3], "w2": [w2]}, tokens)
    layer = Fp8SwiGLU(*matrices.matrices.values())
    dy = torch.randn(tokens, d_model, device=device).bfloat16() / tokens
    with poisoned():
        y = layer(x, w1, w2, w3)
        y.backward(dy)
    wide: list[Any] = [tensor.detach().double().requires_grad_() for tensor in (x, w1, w2, w3)]
    # What is kept in bfloat16 is rounded to it here too: else some numbers would become other ones of 8 bits.
    both = plain_linear(wide[0], torch.cat((wide[1], wide[3])), layer.first)
    gate, value = (both + (both.bfloat16() - both).detach()).chunk(2, -1)
    gated = functional.silu(gate) * value
    gated.register_hook(lambda gradient: gradient.bfloat16().double())
    expected = plain_linear(gated, wide[2], layer.second)
    expected.backward(dy.double())
    for ours, plain in zip((y, x.grad, w1.grad, w2.grad, w3.grad), (expected, *(t.grad for t in wide)), strict=True):
        assert ours is not None
        assert (error := relative_error(ours, plain)) < 1e-2, error


def check_unusual_tensors_are_named(device: str) -> None:
    weights: list[Tensor] = [torch.randn(16, 16, device=device)]
    matrices = Fp8Matrices({"a": weights, "b": [weights[0].clone()]}, 16)
    x = torch.randn(16, 16, device=device).bfloat16()
    matrices.matrices["a"].linear(x, *weights)
    assert matrices.end_measuring() == 0
    matrices.update()
    assert matrices.take_unusual() == []
    matrices.matrices["a"].linear(x * 100, *weights)
    matrices.matrices["b"].weights[0][3, 4] = math.inf
    matrices.update()
    assert matrices.end_measuring().isnan()
    matrices.update()
    assert matrices.take_unusual() == [
        "a (input) was too large for its scale in 1 steps",
        "b (weights) was not finite in 1 steps",
    ]
    assert matrices.take_unusual() == []
