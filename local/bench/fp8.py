"""What training in fp8 is made of, on one GPU: `python3 local/bench/fp8.py` prints a line for each measurement.

The matrix multiplications of one layer of L and M (sizes as in training.py) in bfloat16 and in fp8, with scales for
tensors and for rows, with fast and with exact sums; and the kernels that quantize, by tile, beside the pass that scales
of the current step would need. Times are medians of replays of a CUDA graph, in ms.

`--loss FOLDER --precision fp8 --seeds 0 1 2` trains M for 300 steps of 64 sequences on train.bin of the folder instead,
and prints a JSON line for each seed: the mean of the last 50 losses, and the loss on valid.bin, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from training import DEVICE, SIZES

from basic.model import ModelConfig, TransformerLM
from basic.tokens.opening import open_tokens
from basic.training.batches import BatchSampler, read_ahead
from basic.training.settings import TrainConfig
from basic.training.step import TrainStep, make_optimizer, mean_loss
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
    record = torch.tensor([1 / 8, 8.0, 0, 0, 0, 0, 0, 0], device="cuda")
    other = record.clone()
    rows, columns = fp8.quantize(x, record)
    expected = (x.float() * 8).clamp(-448, 448).to(fp8.FORWARD)
    assert torch.equal(rows.float(), expected.float()), "quantize is wrong"
    assert torch.equal(columns.float(), rows.float().t()), "the transpose is wrong"
    assert record[fp8.LARGEST] == x.abs().max(), "the largest number is wrong"
    del expected
    for tile in ((64, 64, 4, 128), (64, 64, 8, 80), (64, 128, 8, 64), (32, 128, 4, 128), (128, 64, 8, 128)):
        fp8._TILES = dict.fromkeys(fp8._TILES, tile)
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


def print_loss(folder: Path, precision: Any, seed: int, size: str, steps: int, batch_size: int) -> None:
    """Train for some steps and print the losses."""
    torch.manual_seed(seed)
    torch.compiler.reset()
    model = TransformerLM(ModelConfig(**SIZES[size])).to(DEVICE)
    model.activation_dtype = torch.bfloat16
    settings = TrainConfig(steps=steps, batch_size=batch_size, precision=precision, compile=DEVICE.type == "cuda")
    step = TrainStep(model, make_optimizer(model, settings), settings, DEVICE)
    context_length, losses = model.config.context_length, []
    train, valid = (
        BatchSampler(open_tokens(folder / f"{name}.bin"), batch_size, context_length, seed=seed, shuffled=shuffled)
        for name, shuffled in (("train", True), ("valid", False))
    )
    with read_ahead(train, range(steps), DEVICE) as batches:
        for number, batch in enumerate(batches, 1):
            losses.append(step(batch, **settings.scheduled(number))[0].clone())
    of_valid = mean_loss(model.loss, valid, 5, DEVICE)
    last = torch.stack(losses[-50:]).mean().item()
    line = {"precision": precision, "seed": seed, "last_50": round(last, 5), "valid": round(of_valid, 5)}
    unusual = step.fp8.take_unusual() if step.fp8 is not None else []
    print(json.dumps({**line, "first": round(losses[0].item(), 4), "steps": steps, "unusual": unusual}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("quantizing", "multiplications"), help="only this")
    parser.add_argument("--loss", type=Path, help="folder with train.bin and valid.bin")
    parser.add_argument("--precision", nargs="+", choices=("bfloat16", "fp8"), default=["bfloat16", "fp8"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--size", choices=SIZES, default="M")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    if options.loss is None:
        for size in LAYERS:
            if options.part != "multiplications":
                measure_quantizing(size)
            if options.part != "quantizing":
                measure_multiplications(size)
    else:
        for seed, precision in product(options.seeds, options.precision):
            print_loss(options.loss, precision, seed, options.size, options.steps, options.batch_size)
