"""What training in fp8 is made of, on one GPU: `python3 local/bench/fp8.py` prints a line for each measurement.

The matrix multiplications of one layer of L and M (sizes as in training.py) in bfloat16 and in fp8, with scales for
tensors and for rows, with fast and with exact sums; and the kernels that quantize, by tile, beside the pass that scales
of the current step would need. Times are medians of replays of a CUDA graph, in ms.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton

from basic.transformer.kernels import fp8

LAYERS = {"L": (16_384, 2048, 5632), "M": (65_536, 768, 2048)}
"""Tokens of a step, d_model, d_ff."""


def milliseconds(work: Callable[[], object]) -> float:
    return triton.testing.do_bench_cudagraph(work, rep=30, return_mode="median")


def multiplications(tokens: int, d_model: int, d_ff: int) -> dict[str, tuple[int, int, int]]:
    """Rows, columns and the length of the sums of the products of a layer."""
    matrices = {"qkv": (3 * d_model, d_model), "output": (d_model, d_model), "in": (2 * d_ff, d_model)}
    matrices["w2"] = (d_model, d_ff)
    products = {}
    for name, (d_out, d_in) in matrices.items():
        products[f"{name} y"] = (tokens, d_out, d_in)
        products[f"{name} dx"] = (tokens, d_in, d_out)
        products[f"{name} dW"] = (d_out, d_in, tokens)
    return products


def measure_multiplication(m: int, n: int, k: int, a_dtype: torch.dtype) -> list[float]:
    """The times in bfloat16, and in fp8 with fast sums, with exact sums, and with scales of rows."""
    x, w = torch.randn(m, k, device="cuda").bfloat16(), torch.randn(n, k, device="cuda").bfloat16()
    a, b, one = x.to(a_dtype), w.to(fp8.FORWARD).t(), torch.ones((), device="cuda")
    forward, rows, columns = x.to(fp8.FORWARD), torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda")
    multiply = partial(torch._scaled_mm, out_dtype=torch.bfloat16)
    return [
        milliseconds(lambda: x @ w.t()),
        milliseconds(lambda: multiply(a, b, one, one, use_fast_accum=True)),
        milliseconds(lambda: multiply(a, b, one, one, use_fast_accum=False)),
        milliseconds(lambda: multiply(forward, b, rows, columns, use_fast_accum=True)),
    ]


def measure_multiplications(size: str) -> None:
    totals = [0.0] * 4
    for name, (m, n, k) in multiplications(*LAYERS[size]).items():
        times = measure_multiplication(m, n, k, fp8.FORWARD if name.endswith("y") else fp8.BACKWARD)
        totals = [total + time for total, time in zip(totals, times, strict=True)]
        speeds = ", ".join(f"{time:.3f} ({2 * m * n * k / time / 1e9:.0f})" for time in times)
        print(f"{size} {name:9} {m} x {n} x {k}: bfloat16, fp8 fast, exact, scales of rows: {speeds} ms (TFLOP/s)")
    print(f"{size} all of a layer: {', '.join(f'{total:.3f}' for total in totals)} ms", flush=True)


def measure_quantizing(size: str) -> None:
    tokens, _, d_ff = LAYERS[size]
    x = torch.randn(tokens, 2 * d_ff, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(tokens, d_ff, device="cuda", dtype=torch.bfloat16)
    record = torch.tensor([8.0, 1 / 8, 0, 0, 0], device="cuda")
    other = record.clone()
    rows, columns = fp8.quantize(x, record)
    expected = (x.float() * 8).clamp(-448, 448).to(fp8.FORWARD)
    assert torch.equal(rows.float(), expected.float()), "quantize is wrong"
    assert torch.equal(columns.float(), rows.float().t()), "the transpose is wrong"
    assert record[fp8.LARGEST] == x.abs().max(), "the largest number is wrong"
    del expected
    for tile in ((128, 64, 8), (128, 64, 4), (64, 64, 4), (64, 128, 8), (128, 32, 4), (256, 32, 8), (128, 128, 8)):
        fp8._TILE = tile
        times = {
            "quantize": milliseconds(lambda: fp8.quantize_into(x, rows, columns, record)),
            "gate": milliseconds(lambda: fp8.quantized_gate(x, record)),
            "gate's gradient": milliseconds(lambda: fp8.quantized_gate_backward(x, dy, record, other)),
        }
        line = ", ".join(f"{name} {time:.3f}" for name, time in times.items())
        print(f"{size} tile {tile}: {line} ms; quantize {4 * x.numel() / times['quantize'] / 1e9:.2f} TB/s", flush=True)
    largest, copied = milliseconds(lambda: torch.linalg.vector_norm(x, float("inf"))), torch.empty_like(x)
    copying = milliseconds(lambda: copied.copy_(x))
    print(
        f"{size} {tokens} x {2 * d_ff}: the largest number alone {largest:.3f} ms, a copy {copying:.3f} ms", flush=True
    )


if __name__ == "__main__":
    for size in LAYERS:
        measure_quantizing(size)
        measure_multiplications(size)
