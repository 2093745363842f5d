"""Training speed on one GPU: `python3 local/bench/training.py --size S --batch-size 256` prints one JSON line.

The step is that of `basic.training.loop`, with batches from its background thread. `--peers` adds a line for Hugging
Face's Llama of the same size, compiled, with PyTorch's fused AdamW. MFU is tokens/s * (6 N + 6 L T d) / 989e12, where N
is the number of weights in matrix multiplications, including the output layer, L the number of layers, T the context
length and d the width. Energy is what the GPU's own counter (NVML, package nvidia-ml-py) says of the same steps; null
without it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

from basic.model import ModelConfig, TransformerLM
from basic.training.batches import BatchSampler, read_ahead
from basic.training.settings import TrainConfig
from basic.training.step import TrainStep
from basic.transformer.optimizer import AdamW

SIZES: dict[str, dict[str, Any]] = {
    "S": {"vocab_size": 10_000, "context_length": 256, "d_model": 512, "num_layers": 4, "num_heads": 16, "d_ff": 1344},
    "M": {
        "vocab_size": 32_768,
        "context_length": 1024,
        "d_model": 768,
        "num_layers": 12,
        "num_heads": 12,
        "d_ff": 2048,
    },
    # The shapes of published models with grouped queries and tied embeddings.
    "SmolLM2-135M": {
        "vocab_size": 49_152,
        "context_length": 2048,
        "d_model": 576,
        "num_layers": 30,
        "num_heads": 9,
        "num_kv_heads": 3,
        "d_ff": 1536,
        "tied_embeddings": True,
    },
    "Llama-3.2-1B": {
        "vocab_size": 128_256,
        "context_length": 2048,
        "d_model": 2048,
        "num_layers": 16,
        "num_heads": 32,
        "num_kv_heads": 8,
        "d_ff": 8192,
        "tied_embeddings": True,
    },
    "L": {
        "vocab_size": 32_768,
        "context_length": 2048,
        "d_model": 2048,
        "num_layers": 16,
        "num_heads": 16,
        "d_ff": 5632,
    },
    "tiny": {"vocab_size": 300, "context_length": 32, "d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64},
}
PEAK_FLOPS = 989e12
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def joules_used() -> float | None:
    """The energy that the GPU has used since its driver was loaded, or None if that is not known."""
    try:
        import pynvml

        pynvml.nvmlInit()
        # By its UUID: NVML numbers the GPUs of the machine, and torch those that it may use.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(DEVICE).uuid}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    except Exception as error:  # no package, no driver, or no such counter
        print(f"energy is not known: {error}", file=sys.stderr)
        return None


def our_step(config: ModelConfig, batch_size: int, precision: Any = "auto") -> Callable:
    model = TransformerLM(config).to(DEVICE)
    model.activation_dtype = torch.bfloat16
    optimizer = AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    settings = TrainConfig(steps=1, batch_size=batch_size, compile=True, precision=precision)
    step = TrainStep(model, optimizer, settings, DEVICE)

    def take_step(batch: tuple[Tensor, Tensor]) -> Tensor:
        loss, norm = step(batch, 1e-4)
        return loss + 0 * norm  # NaN if a gradient is not finite, which makes a step change nothing

    return take_step


def peer_step(config: ModelConfig, batch_size: int) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: Any = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff or 0,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        max_position_embeddings=config.context_length, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    @torch.compile
    def loss_fn(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logits = model(input_ids=inputs).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def step(batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = loss_fn(batch[0], batch[1])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def print_kernels(step: Callable[[], object], steps: int = 3, count: int = 40) -> None:
    """Print the kernels of a step in the order of their time, in ms a step and with the number of their launches."""
    activity = torch.profiler.ProfilerActivity.CUDA if DEVICE.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(steps):
            step()
        synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)
    for event in events[:count]:
        print(
            f"{event.device_time_total / 1e3 / steps:9.3f} ms {event.count / steps:7.0f} x {event.key[:110]}",
            flush=True,
        )
    print(f"{sum(event.device_time_total for event in events) / 1e3 / steps:9.3f} ms in all kernels", flush=True)


def measure(
    make_step: Callable, config: ModelConfig, batch_size: int, seconds: float, *, fixed: bool, profile: bool = False
) -> dict:
    torch.manual_seed(0)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=20_000_000, dtype=np.uint16)
    sampler = BatchSampler(tokens, batch_size, config.context_length, seed=0)
    with read_ahead(sampler, range(1_000_000), DEVICE) as batches:
        step = make_step(config, batch_size)
        synchronize()
        started = time.perf_counter()
        first_loss = step(next(batches)).item()
        first_step_s = time.perf_counter() - started
        for _ in range(7):
            step(next(batches))
        batch = next(batches)
        synchronize()
        joules_before, started, count = joules_used(), time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            for _ in range(10):
                loss = step(batch if fixed else next(batches))
                count += 1
            synchronize()
        step_s = (time.perf_counter() - started) / count
        joules_after = joules_used()
        joules = None if joules_before is None or joules_after is None else (joules_after - joules_before) / count
        if profile:
            print_kernels(lambda: step(batch))
    attention = 2 * config.d_model * (config.num_heads + config.kv_heads) * config.d_head
    matrices = config.num_layers * (attention + 3 * config.d_model * (config.d_ff or 0))
    weights = matrices + config.vocab_size * config.d_model
    flops_per_token = 6 * weights + 6 * config.num_layers * config.context_length * config.d_model
    tokens_per_s = batch_size * config.context_length / step_s
    result = {
        "tokens_per_s": round(tokens_per_s),
        "step_ms": round(step_s * 1e3, 3),
        "mfu": round(tokens_per_s * flops_per_token / PEAK_FLOPS, 4),
        "joules_per_step": None if joules is None else round(joules, 1),
        "tokens_per_joule": None if joules is None else round(batch_size * config.context_length / joules),
        "first_step_s": round(first_step_s, 1),
        "first_loss": round(first_loss, 3),
        "loss": round(loss.item(), 3),
        "steps": count,
    }
    if DEVICE.type == "cuda":
        # Since the start, including the recording of the CUDA graph.
        result["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        result["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
        result["device"] = torch.cuda.get_device_name()
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="S")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=3, help="time to measure, after the first steps")
    parser.add_argument("--fixed-batch", action="store_true", help="use one batch for all steps: no data loading")
    parser.add_argument("--precision", nargs="+", choices=("bfloat16", "fp8"), default=["bfloat16"])
    parser.add_argument("--profile", action="store_true", help="also print the kernels that take the most time")
    parser.add_argument("--peers", action="store_true")
    options = parser.parse_args()
    makers = {f"basic {precision}": partial(our_step, precision=precision) for precision in options.precision}
    makers |= {"HF Llama": peer_step} if options.peers else {}
    for name, maker in makers.items():
        torch.compiler.reset()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        config = ModelConfig(**SIZES[options.size])
        result = measure(
            maker, config, options.batch_size, options.seconds, fixed=options.fixed_batch, profile=options.profile
        )
        print(json.dumps({"model": name, "size": options.size, "batch_size": options.batch_size, **result,
                          "torch": torch.__version__}), flush=True)  # fmt: skip
