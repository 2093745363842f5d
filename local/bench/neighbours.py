"""Cliffs: which configurations are far slower than their neighbors? `python3 local/bench/neighbours.py`

Training steps, prompts and decoding of many configurations that the library accepts. Each line is one that differs from
a usual one in one setting, with its time, and its share of its own limit: the operations of its matrix multiplications
over the speed of a large one, plus the bytes that it must read and write (weights, moments, and the inputs and results
of each multiplication) over the speed of a copy, both measured first. Lines with less than half of the share of the
lines beside them are marked, and so are warnings. `--small` is for a CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from training import DEVICE, synchronize

from basic.generation.continuation import generate
from basic.model import Linear, ModelConfig, TransformerLM
from basic.training.settings import TrainConfig
from basic.training.step import TrainStep, make_optimizer
from basic.transformer.kernels import dispatch

Changes = dict[str, Any]
"""Fields of ModelConfig and of TrainConfig; "rows" and "length" of a batch or a prompt."""
MODEL_FIELDS = set(ModelConfig.__dataclass_fields__)

SMALL: Changes = {"vocab_size": 2048, "d_model": 128, "num_layers": 2, "num_heads": 4, "context_length": 1024}
FULL: Changes = {"vocab_size": 32_768, "d_model": 768, "num_layers": 2, "num_heads": 12, "context_length": 1024}
ABLATIONS: list[Changes] = [
    {},
    *({"norm": norm} for norm in ("post", "none")),
    {"positions": "none"},
    *({"ffn": ffn} for ffn in ("silu", "relu2")),
    {"tied_embeddings": True},
    {"qkv_bias": True},
    {"qk_norm": True},
    {"embedding_norm": True},
    {"value_embeddings": True},
    {"sliding_window": 64},
]


def lines(kind: str, *, small: bool) -> dict[str, list[Changes]]:
    """The configurations of a kind of work, by the setting that changes; neighbors stand beside each other."""
    width, heads = (128, 4) if small else (768, 12)
    sizes = (8, 16, 32, 64, 128) if small else (8, 16, 32, 64, 66, 80, 96, 128, 192, 256)
    found: dict[str, list[Changes]] = {
        "head size": [{"head_dim": size, "num_heads": width // size} for size in sizes],
        "groups": [{"num_kv_heads": heads // group} for group in range(1, heads + 1) if heads % group == 0],
        "vocabulary": [
            {"vocab_size": n} for n in ((257, 2048, 10_000) if small else (257, 10_000, 50_257, 50_304, 128_256))
        ],
        "ablation": ABLATIONS,
    }
    if kind == "training":
        tokens = 1024 if small else 32_768
        lengths = (32, 128, 512, 1024) if small else (128, 512, 1024, 4096, 16_384)
        found["length"] = [{"rows": tokens // n, "length": n, "context_length": n} for n in lengths]
        found["training"] = [{}, {"gradient_accumulation": 2}, {"dropout": 0.1}, {"activation_checkpointing": True}]
        found["training"] += [{"optimizer": "muon"}]
        found["precision"] = [{"precision": name} for name in ("float32", "bfloat16", "fp8")[: 2 if small else 3]]
        if not small:
            found["training"] += [{"compile": True}, {"compile": True, "precision": "fp8"}, {"cuda_graph": False}]
    elif kind == "prompt":
        found = {"length": [{"length": n} for n in (1, 10, 40, 60, 100, 400, 1000)]}
        found["rows"] = [{"rows": rows, "length": 100} for rows in (1, 2, 8, 32)]
    else:
        found["rows"] = [{"rows": rows} for rows in ((1, 2, 8, 32) if small else (1, 2, 4, 8, 16, 32, 64, 65, 128))]
        found["precision"] = [{"precision": name} for name in ("float32", "bfloat16")]
        found["context"] = [{"length": 8}, {"length": 500}, {"context_length": 64, "length": 60}]
    return found


def median_s(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - started)
    return median(times)


class Machine:
    """The speeds of this machine: operations per second in a precision, and bytes per second."""

    def __init__(self) -> None:
        size, count = (8192, 2**28) if DEVICE.type == "cuda" else (1024, 2**24)
        source = torch.empty(count, dtype=torch.float32, device=DEVICE)
        target = torch.empty_like(source)
        target.copy_(source)
        self.bytes_per_s = 8 * count / median_s(lambda: target.copy_(source), 5)
        self.flops: dict[torch.dtype, float] = {}
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(size, size, device=DEVICE).to(dtype)
            _ = x @ x
            self.flops[dtype] = 2 * size**3 / median_s(lambda x=x: x @ x, 5)

    def limit_s(
        self, model: TransformerLM, tokens: int, keys: int, weight_bytes: float, passes: int, without_logits: int = 0
    ) -> float:
        """The shortest time of `passes` times the multiplications of a forward pass, over `keys` keys a token."""
        dtype, head = model.compute_dtype, model.lm_head.weight
        features = sum(sum(module.weight.shape) for module in model.modules() if isinstance(module, Linear))
        moved = weight_bytes + passes * (tokens * features - without_logits * sum(head.shape)) * dtype.itemsize
        flops = passes * (tokens * model.matmul_flops_per_token(keys) - without_logits * 2 * head.numel())
        return flops / self.flops[dtype] + moved / self.bytes_per_s


def measure(kind: str, changes: Changes, machine: Machine, *, small: bool) -> tuple[float, float]:
    """The time of a training step, a prompt or a decoded token of all rows, and its limit, in seconds."""
    usual = (
        {"rows": 8 if small else 32, "length": 128 if small else 1024}
        if kind == "training"
        else {"rows": 1, "length": 100}
    )
    changed = usual | {"precision": "float32" if small else "bfloat16"} | changes
    rows, length, precision = (changed.pop(name) for name in ("rows", "length", "precision"))
    config = ModelConfig(**((SMALL if small else FULL) | {k: v for k, v in changed.items() if k in MODEL_FIELDS}))
    settings = {k: v for k, v in changed.items() if k not in MODEL_FIELDS}
    torch.manual_seed(0)
    with DEVICE:
        model = TransformerLM(config)
        ids = torch.randint(config.vocab_size, (rows, length + 1))
    model.activation_dtype = torch.float32 if precision == "float32" else torch.bfloat16
    if kind == "training":
        train_config = TrainConfig(steps=1, batch_size=rows, precision=precision, **settings)
        model.configure_training(train_config.dropout, train_config.activation_checkpointing)
        step = TrainStep(model, make_optimizer(model, train_config), train_config, DEVICE)
        batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        for _ in range(1 if small else 5):  # compiles, and records the CUDA graph
            step(batch, 1e-4)
        # Read and write float32 weights and two moments; write and read gradients.
        weight_bytes = model.num_parameters * (6 * 4 + 2 * model.compute_dtype.itemsize)
        return median_s(lambda: step(batch, 1e-4), 3), machine.limit_s(
            model, ids[:, 1:].numel(), length // 2, weight_bytes, 3
        )
    model.eval()
    read = (
        sum(module.weight.numel() for module in model.modules() if isinstance(module, Linear))
        * model.compute_dtype.itemsize
    )
    prompts = ids[:, :length].tolist()

    def run(new_tokens: int) -> None:
        generate(model, prompts, new_tokens, temperature=0.0)

    run(2)
    if kind == "prompt":
        return median_s(lambda: run(1), 3), machine.limit_s(
            model, rows * length, length // 2, read, 1, without_logits=rows * (length - 1)
        )
    few, many = (4, 20) if small else (8, 72)
    run(many)
    seconds = (median_s(lambda: run(many), 3) - median_s(lambda: run(few), 3)) / (many - few)
    return seconds, machine.limit_s(model, rows, min(length + many, config.context_length), read, 1)


def print_lines(kind: str, setting: str, choices: list[Changes], machine: Machine, *, small: bool) -> int:
    """Measure the configurations of one setting and print them; returns how many are marked."""
    shares, printed = [], []
    for changes in choices:
        dispatch._warn_once.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            seconds, limit_s = measure(kind, changes, machine, small=small)
        shares.append(limit_s / max(seconds, 1e-9))
        name = ", ".join(f"{key}={value}" for key, value in changes.items()) or "as usual"
        printed.append(f"{kind:8} {name:55} {1e3 * seconds:9.3f} ms  {100 * shares[-1]:5.1f} %")
        printed[-1] += "".join(f"  warns: {warning.message!s:.60}" for warning in caught if "basic" in warning.filename)
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    is_ordered = setting in ("head size", "groups", "vocabulary", "length", "rows", "context")
    marked = 0
    for i, (share, line) in enumerate(zip(shares, printed, strict=True)):
        beside = shares[max(i - 1, 0) : i] + shares[i + 1 : i + 2] if is_ordered else shares[:1]
        is_low = share < sum(beside) / len(beside) / 2
        marked += is_low
        print(line + ("  <-- below half of its neighbors" if is_low else ""), flush=True)
    return marked


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--kind", nargs="+", choices=("training", "prompt", "decoding"))
    parser.add_argument("--setting", nargs="+", help="only these, such as 'head size'")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no other setting after this time")
    options = parser.parse_args()
    started, machine, marked, left_out = time.perf_counter(), Machine(), 0, []
    speeds = ", ".join(f"{str(dtype)[6:]} {flops / 1e12:.3g} TFLOP/s" for dtype, flops in machine.flops.items())
    print(f"{DEVICE}: {speeds}, memory {machine.bytes_per_s / 1e9:.0f} GB/s")
    for kind in options.kind or ("training", "prompt", "decoding"):
        for setting, choices in lines(kind, small=options.small).items():
            if options.setting and setting not in options.setting:
                continue
            if time.perf_counter() - started > options.seconds:
                left_out.append(f"{kind} {setting}")
                continue
            marked += print_lines(kind, setting, choices, machine, small=options.small)
    print(f"{marked} lines are marked; {time.perf_counter() - started:.0f} s")
    if left_out:
        print(f"not measured: {', '.join(left_out)}")
