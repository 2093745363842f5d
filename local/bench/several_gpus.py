"""Training speed on several GPUs compared with one: `python3 local/bench/several_gpus.py` prints a JSON line per case.

torchrun starts a new process per GPU for each case, with a time limit; a case that fails does not stop the others.
Model M has 64 sequences per GPU and L has 8. Both run first on every GPU alone, then replicated on all GPUs, then
sharded; a model of 2.7 billion parameters runs only sharded. `ratio` is tokens/s over the sum of the speeds of the GPUs
when each runs alone, all at the same time. `slowest_ratio` is over the speed of the slowest of them times the number of
GPUs, because all GPUs wait for the slowest one. `sharded_ratio` is sharded over replicated. The step is that of
`basic.training.loop`, on a fixed batch.
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
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).resolve().parent)]

LARGE = {"vocab_size": 32_768, "context_length": 2048, "d_model": 2560, "num_layers": 32, "num_heads": 20}
ROWS = {"M": 64, "L": 8, "3B": 4, "tiny": 2}
"""Sequences per GPU."""
LIMIT_S = 150
_FIRST_STEPS = 5  # they compile, and capture the CUDA graph


def measure(options: argparse.Namespace) -> None:
    """Run one case, in the processes that torchrun has started or in this process alone, and print its result."""
    import torch

    from basic.training.parallel.devices import choose_device
    from basic.training.parallel.world import join_world

    with join_world(os.environ) as world:
        device = choose_device(world.device_name("auto"))
        result: dict[str, Any] = {}
        if world.size > 1 and device.type == "cuda":
            result["all_reduce_gb_per_s"] = round(all_reduce_speed(device), 1)
        train_step, batch, parameters = make_step(options, device, world)

        def step() -> Any:
            return train_step(batch, 1e-4)[0]

        started = time.perf_counter()
        result["first_loss"] = round(step().item(), 4)
        result["first_step_s"] = round(time.perf_counter() - started, 1)
        for _ in range(_FIRST_STEPS):
            step()
        run_for(options.warm_up, step, options.steps, device, world)
        count, measured_s, readings = run_for(options.seconds, step, options.steps, device, world)
        step_s = measured_s / count
        result |= {"loss": round(step().item(), 4), "steps": count, "step_ms": round(step_s * 1e3, 2)}
        if readings:
            mhz, watts = (sum(each) / len(readings) for each in zip(*readings, strict=True))
            result |= {"mhz": round(mhz), "watts": round(watts)}
        result["tokens_per_s"] = round(world.size * batch[0].numel() / step_s)
        if device.type == "cuda":
            result["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            result |= {"recorded": train_step.graph is not None, "device": torch.cuda.get_device_name()}
        if world.is_rank_0:
            print("RESULT " + json.dumps({"parameters": parameters, **result, "torch": torch.__version__}), flush=True)
        if options.profile:
            profile(step, options.profile if world.is_rank_0 else None)
        synchronize(device)
        world.all_reduce_max(0)
        sys.stdout.flush()
        os._exit(0)  # the result is printed: a slow or failing shutdown must not cost time


def make_step(options: argparse.Namespace, device: Any, world: Any) -> tuple[Any, tuple[Any, Any], int]:
    """A `TrainStep`, its batch and the number of parameters."""
    import torch
    from training import SIZES

    from basic.model import ModelConfig, TransformerLM
    from basic.training.parallel.devices import reduce_dtype
    from basic.training.settings import TrainConfig
    from basic.training.step import TrainStep
    from basic.transformer.optimizer import AdamW

    config = ModelConfig(**{**SIZES, "3B": LARGE}[options.size])
    torch.manual_seed(0)
    with torch.device(device):  # initialize on the GPU: a CPU takes minutes for billions of weights
        model = TransformerLM(config)
    model.activation_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    settings = TrainConfig(
        steps=1, batch_size=options.rows, compile=not options.eager, cuda_graph=not options.no_graph,
        reduce_precision=options.reduce,
    )  # fmt: skip
    if options.parallel == "sharded":
        world.shard(model, device, model.activation_dtype, reduce_dtype(settings))
    optimizer = AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    step = TrainStep(model, optimizer, settings, device, world)
    ids = torch.randint(config.vocab_size, (options.rows, config.context_length + 1), device=device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return step, (ids[:, :-1].contiguous(), ids[:, 1:].contiguous()), parameters


def run_for(
    seconds: float, step: Callable[[], Any], steps: int, device: Any, world: Any
) -> tuple[int, float, list[tuple[float, float]]]:
    """Run steps for some seconds, `steps` of them at a time.

    Returns:
        The number of steps, the seconds that they took, and readings of the GPU's clock in MHz and power in watts.
    """
    import torch

    readings: list[tuple[float, float]] = []
    synchronize(device)
    started, count, finished = time.perf_counter(), 0, 0
    while not finished:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            with suppress(Exception):  # NVIDIA's library for it is missing
                readings.append((torch.cuda.clock_rate(), torch.cuda.power_draw() / 1e3))
        synchronize(device)
        count += steps
        (finished,) = world.all_reduce_max(int(time.perf_counter() - started >= seconds))
    return count, time.perf_counter() - started, readings


def synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def profile(step: Callable[[], Any], path: str | None) -> None:
    """Write how long a GPU computes and communicates in a step, and how long each kernel takes with and without
    communication beside it.

    Args:
        path: JSON file; None on the other ranks, which only take part in the steps.
    """
    import torch

    steps = 3
    if path is None:
        for _ in range(steps):
            step()
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    on_gpu = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    events = [(event.time_range.start, event.time_range.end, event.name) for event in on_gpu]
    sending = merged((start, end) for start, end, name in events if "nccl" in name.lower())
    kernels = [event for event in events if "nccl" not in event[2].lower()]
    computing = merged((start, end) for start, end, _ in kernels)
    both = sum(overlap(*span, sending) for span in computing)
    ms = {
        "step": max(end for _, end, _ in events) - min(start for start, _, _ in events),
        "computing": sum(end - start for start, end in computing),
        "sending": sum(end - start for start, end in sending),
        "both": both,
    }
    times: dict[str, Any] = {}
    for start, end, name in kernels:
        beside = overlap(start, end, sending) / max(end - start, 1e-3)
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


def merged(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of time spans, as disjoint spans in order."""
    result: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(result[-1][1], end)
        else:
            result.append((start, end))
    return result


def overlap(start: float, end: float, spans: list[tuple[float, float]]) -> float:
    """The length of the overlap of a time span with merged spans."""
    first = max(bisect(spans, (start,)) - 1, 0)
    total = 0.0
    for a, b in spans[first:]:
        if a >= end:
            break
        total += max(min(b, end) - max(a, start), 0)
    return total


def all_reduce_speed(device: Any) -> float:
    """Speed of an all-reduce of a 512 MB tensor, in GB of the tensor per second."""
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
    """The result that a case has printed, or its error."""
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
    """Start a case and return its result or its error."""
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
    else:  # every GPU alone, all at the same time: they are not equally fast, and share the machine's power
        alone = [start(this, gpu) for gpu in range(options.gpus)]
        results = [finish(process, options) for process in alone]
        speeds = [result.get("tokens_per_s", 0) for result in results]
        result = {**results[0], "tokens_per_s": round(sum(speeds) / len(speeds)), "each": speeds}
    return {**case, **result, "case_s": round(time.perf_counter() - started, 1)}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--sizes", nargs="+", choices=ROWS, default=["M", "L", "3B"])
    parser.add_argument("--seconds", type=float, default=4, help="duration of the measurement of each case")
    parser.add_argument(
        "--warm-up", type=float, default=3, help="seconds before the measurement, until the GPUs' clocks have settled"
    )
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="time limit of each case, in seconds")
    parser.add_argument("--error-characters", type=int, default=3000)
    parser.add_argument("--only", nargs="+", default=[], help="run these cases instead, such as L:2:sharded:--no-graph")
    parser.add_argument("--case", action="store_true", help="run one case in this process")
    parser.add_argument("--size", choices=ROWS, default="tiny")
    parser.add_argument("--parallel", choices=["replicated", "sharded"], default="replicated")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="steps between readings of the clock")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--no-graph", action="store_true", help="do not capture a CUDA graph")
    parser.add_argument(
        "--reduce",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="precision in which gradients are reduced",
    )
    parser.add_argument("--profile", help="JSON file for the times of one case on the first GPU, in ms per step")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    """Run the cases one after the other, and print the result of each."""
    speeds: dict[tuple, int] = {}
    slowest: dict[str, int] = {}
    cases = [(size, gpus, parallel) for size in options.sizes for gpus, parallel in (
        (1, "replicated"), (options.gpus, "replicated"), (options.gpus, "sharded"))
        if size != "3B" or parallel == "sharded"]  # fmt: skip
    remaining = [tuple(text.split(":")) for text in options.only] or cases
    while remaining:
        size, gpus, parallel, *extra = remaining.pop(0)
        result = run_case(size, int(gpus), parallel, options, *extra)
        if "failed" in result and int(gpus) > 1 and parallel == "replicated" and "--no-graph" not in extra:
            remaining.insert(0, (size, gpus, parallel, *extra, "--no-graph"))  # a slower result is better than none
        speed = result.get("tokens_per_s", 0)
        speeds[size, int(gpus), parallel] = speeds.get((size, int(gpus), parallel)) or speed
        alone, replicated = speeds.get((size, 1, "replicated")), speeds.get((size, int(gpus), "replicated"))
        if all(result.get("each", [0])):
            slowest[size] = min(result["each"])
        if int(gpus) > 1 and alone:
            result["ratio"] = round(speed / int(gpus) / alone, 4)
        if int(gpus) > 1 and size in slowest:
            result["slowest_ratio"] = round(speed / int(gpus) / slowest[size], 4)
        if parallel == "sharded" and replicated:
            result["sharded_ratio"] = round(speed / replicated, 4)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    options = parse_options()
    measure(options) if options.case else main(options)
