"""Training speed on several GPUs against one: `python3 local/bench/several_gpus.py` prints a JSON line for each case.

Each case is a process of its own for every GPU, started by torchrun with a time limit: what fails costs the others
nothing. M has 64 sequences a GPU and L 8, both first on every GPU for itself, then replicated on all, then sharded; a
model of 2.7 billion parameters is sharded only. `ratio` is tokens/s over the sum of those of the GPUs, each for itself
at the same time; `slowest_ratio` is to as many GPUs as the slowest of them, whose pace all keep together;
`sharded_ratio` is sharded over replicated. The step is the one of `basic.training.loop`, on fixed batches.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from bisect import bisect
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).resolve().parent)]

LARGE = {"vocab_size": 32_768, "context_length": 2048, "d_model": 2560, "num_layers": 32, "num_heads": 20}
ROWS = {"M": 64, "L": 8, "3B": 4, "tiny": 2}
"""Sequences a GPU."""
LIMIT_S = 150
_FIRST_STEPS = 5  # in which all is compiled and recorded


def measure(options: argparse.Namespace) -> None:
    """One case, in the processes that torchrun has started, or in a process alone."""
    import torch
    from training import SIZES

    from basic.model import ModelConfig, TransformerLM
    from basic.training.devices import choose_device, reduce_dtype
    from basic.training.parallel.world import join
    from basic.training.settings import TrainConfig
    from basic.training.step import TrainStep
    from basic.transformer.optimizer import AdamW

    config = ModelConfig(**{**SIZES, "3B": LARGE}[options.size])
    with join(os.environ) as world:
        device = choose_device(world.device_name("auto"))
        on_gpu = device.type == "cuda"
        result: dict[str, Any] = {}
        if world.size > 1 and on_gpu:
            result["all_reduce_gb_per_s"] = round(all_reduce_speed(device), 1)
        torch.manual_seed(0)
        with torch.device(device):  # on the GPU at once: drawing billions of numbers takes a CPU minutes
            model = TransformerLM(config)
        model.activation_dtype = torch.bfloat16 if on_gpu else torch.float32
        settings = TrainConfig(
            steps=1, batch_size=options.rows, compile=not options.eager, cuda_graph=not options.no_graph,
            reduce_precision=options.reduce,
        )  # fmt: skip
        if options.parallel == "sharded":
            world.shard(model, device, model.activation_dtype, reduce_dtype(settings))
        optimizer = AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
        step = TrainStep(model, optimizer, settings, device, world)
        ids = torch.randint(config.vocab_size, (options.rows, config.context_length + 1), device=device)
        batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

        def synchronize() -> None:
            if on_gpu:
                torch.cuda.synchronize()

        started = time.perf_counter()
        result["first_loss"] = round(step(batch, 1e-4)[0].item(), 4)
        result["first_step_s"] = round(time.perf_counter() - started, 1)
        for _ in range(_FIRST_STEPS):
            step(batch, 1e-4)

        readings: list[tuple[float, float]] = []

        def steps_for(seconds: float) -> tuple[int, float]:
            """How many steps were done, and how long they took."""
            synchronize()
            started, count, enough = time.perf_counter(), 0, 0
            while not enough:
                for _ in range(options.steps):
                    step(batch, 1e-4)
                if on_gpu:
                    with suppress(Exception):  # without NVIDIA's library for it, or what it needs
                        readings.append((torch.cuda.clock_rate(), torch.cuda.power_draw() / 1e3))
                synchronize()
                count += options.steps
                (enough,) = world.largest(int(time.perf_counter() - started >= seconds))
            return count, time.perf_counter() - started

        steps_for(options.warm_up)
        readings.clear()
        count, measured_s = steps_for(options.seconds)
        step_s = measured_s / count
        result |= {"loss": round(step(batch, 1e-4)[0].item(), 4), "steps": count, "step_ms": round(step_s * 1e3, 2)}
        if readings:
            mhz, watts = (sum(each) / len(readings) for each in zip(*readings, strict=True))
            result |= {"mhz": round(mhz), "watts": round(watts)}
        result["tokens_per_s"] = round(world.size * options.rows * config.context_length / step_s)
        if on_gpu:
            result["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            result |= {"recorded": step.graph is not None, "device": torch.cuda.get_device_name()}
        if world.is_first:
            parameters = sum(parameter.numel() for parameter in model.parameters())
            print("RESULT " + json.dumps({"parameters": parameters, **result, "torch": torch.__version__}), flush=True)
        if options.profile and world.is_first:
            profile(lambda: step(batch, 1e-4), options.profile)
        elif options.profile:
            for _ in range(3):
                step(batch, 1e-4)
        synchronize()
        world.largest(0)
        sys.stdout.flush()
        os._exit(0)  # what is measured is measured: nothing that ends badly shall cost time


def profile(step: Any, path: str) -> None:
    """Write for how long a GPU computes and sends in a step, and how long each kernel takes beside sending or not."""
    import torch

    steps = 3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    on_gpu = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    events = [(event.time_range.start, event.time_range.end, event.name) for event in on_gpu]
    sending = joined((start, end) for start, end, name in events if "nccl" in name.lower())
    kernels = [event for event in events if "nccl" not in event[2].lower()]
    computing = joined((start, end) for start, end, _ in kernels)
    both = sum(shared(*span, sending) for span in computing)
    ms = {
        "step": max(end for _, end, _ in events) - min(start for start, _, _ in events),
        "computing": sum(end - start for start, end in computing),
        "sending": sum(end - start for start, end in sending),
        "both": both,
    }
    times: dict[str, Any] = {}
    for start, end, name in kernels:
        beside = shared(start, end, sending) / max(end - start, 1e-3)
        kind = "beside_us" if beside > 0.9 else "apart_us" if beside < 0.1 else "partly_us"
        times.setdefault(name[:90], {}).setdefault(kind, []).append(end - start)
    longest = sorted(times.items(), key=lambda item: -sum(map(sum, item[1].values())))[:25]
    table = [
        {
            "kernel": name,
            "ms": sum(map(sum, kinds.values())) / 1e3 / steps,
            **{kind: [round(sum(each) / len(each), 1), len(each)] for kind, each in sorted(kinds.items())},
        }
        for name, kinds in longest
    ]
    Path(path).write_text(json.dumps({**{k: v / 1e3 / steps for k, v in ms.items()}, "kernels": table}, indent=1))


def joined(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Times in which at least one of the spans runs."""
    result: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(result[-1][1], end)
        else:
            result.append((start, end))
    return result


def shared(start: float, end: float, spans: list[tuple[float, float]]) -> float:
    """For how long of a time one of the joined spans runs too."""
    first = max(bisect(spans, (start,)) - 1, 0)
    total = 0.0
    for a, b in spans[first:]:
        if a >= end:
            break
        total += max(min(b, end) - max(a, start), 0)
    return total


def all_reduce_speed(device: Any) -> float:
    """Gigabytes of a tensor a second, of 512 MB."""
    import torch
    import torch.distributed as dist

    tensor = torch.zeros(2**27, device=device)
    for repeats in (3, 10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            dist.all_reduce(tensor)
        torch.cuda.synchronize()
    return tensor.numel() * 4 * repeats / (time.perf_counter() - started) / 1e9


def start(command: list[str], gpu: int | None = None) -> subprocess.Popen:
    environment = {**os.environ, **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})}
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def finish(process: subprocess.Popen, options: argparse.Namespace) -> dict[str, Any]:
    """The line that a case has printed, or what went wrong."""
    try:
        out, err = process.communicate(timeout=options.limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes
        try:
            out, err = process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        err = f"over {options.limit} s\n{err}"
    results = [line.removeprefix("RESULT ") for line in out.splitlines() if line.startswith("RESULT ")]
    if results:
        return json.loads(results[-1])
    return {"failed": err.split("torch/distributed/elastic")[0][-options.error_characters :]}


def run_case(size: str, gpus: int, parallel: str, options: argparse.Namespace, *extra: str) -> dict[str, Any]:
    """Start a case and read its line; what went wrong is one too."""
    this = [str(Path(__file__)), "--case", "--size", size, "--parallel", parallel, "--rows", str(ROWS[size])]
    this += ["--seconds", str(options.seconds), "--warm-up", str(options.warm_up), *extra]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    case = {"size": size, "gpus": gpus, "parallel": parallel, "rows_a_gpu": ROWS[size], "extra": " ".join(extra)}
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(gpus), "--master-port", str(port)]
    started = time.perf_counter()
    if gpus > 1:
        result = finish(start([*launcher, *this]), options)
    else:  # on all GPUs at once, each for itself: they are not equally fast, and share the machine's power
        alone = [start(this, gpu) for gpu in range(options.gpus)]
        results = [finish(process, options) for process in alone]
        speeds = [result.get("tokens_per_s", 0) for result in results]
        result = {**results[0], "tokens_per_s": round(sum(speeds) / len(speeds)), "each": speeds}
    return {**case, **result, "case_s": round(time.perf_counter() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--sizes", nargs="+", choices=ROWS, default=["M", "L", "3B"])
    parser.add_argument("--seconds", type=float, default=4, help="to measure each case for, after its first steps")
    parser.add_argument(
        "--warm-up", type=float, default=3, help="seconds before, until clocks have settled at what power allows"
    )
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for each case")
    parser.add_argument("--error-characters", type=int, default=3000)
    parser.add_argument(
        "--only", nargs="+", default=[], help="cases such as L:2:sharded:--no-graph instead of the usual"
    )
    parser.add_argument("--case", action="store_true", help="be one process of a case")
    parser.add_argument("--size", choices=ROWS, default="tiny")
    parser.add_argument("--parallel", choices=["replicated", "sharded"], default="replicated")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="between looks at the clock")
    parser.add_argument("--eager", action="store_true", help="not compiled")
    parser.add_argument("--no-graph", action="store_true", help="not recorded as a CUDA graph")
    parser.add_argument(
        "--reduce", choices=["auto", "float32", "bfloat16"], default="auto", help="gradients' precision"
    )
    parser.add_argument("--profile", help="JSON file of what the first GPU did, in one case: milliseconds a step")
    options = parser.parse_args()
    if options.case:
        return measure(options)
    speeds: dict[tuple, int] = {}
    slowest: dict[str, int] = {}
    usual = [(size, gpus, parallel) for size in options.sizes for gpus, parallel in (
        (1, "replicated"), (options.gpus, "replicated"), (options.gpus, "sharded"))
        if size != "3B" or parallel == "sharded"]  # fmt: skip
    waiting = [tuple(text.split(":")) for text in options.only] or usual
    while waiting:
        size, gpus, parallel, *extra = waiting.pop(0)
        result = run_case(size, int(gpus), parallel, options, *extra)
        if "failed" in result and int(gpus) > 1 and parallel == "replicated" and "--no-graph" not in extra:
            waiting.insert(0, (size, gpus, parallel, *extra, "--no-graph"))  # better a slower one than none
        speed = result.get("tokens_per_s", 0)
        speeds[size, int(gpus), parallel] = speeds.get((size, int(gpus), parallel)) or speed
        one, both = speeds.get((size, 1, "replicated")), speeds.get((size, int(gpus), "replicated"))
        if all(result.get("each", [0])):
            slowest[size] = min(result["each"])
        if int(gpus) > 1 and one:
            result["ratio"] = round(speed / int(gpus) / one, 4)
        if int(gpus) > 1 and size in slowest:
            result["slowest_ratio"] = round(speed / int(gpus) / slowest[size], 4)
        if parallel == "sharded" and both:
            result["sharded_ratio"] = round(speed / both, 4)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
