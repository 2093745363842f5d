"""Compare executors (threads, processes, a Dask cluster) on the same cores: `uv run local/bench/text_scale.py`.

The executors take turns, so that changes of the machine's speed affect all of them. Prints the median time of counting
and of encoding a text, and the ratio to threads. The process pool and the cluster have one process a core, and load
their kernels before the measurement.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.append(str(Path(__file__).parent))
from tokenizer_scale import END, make_text

from basic.bpe import loading
from basic.corpus.counting import CountingOptions, build_count_table
from basic.encoding import encode_files
from basic.pretokenization import SpecialTokens
from basic.Tokenizer import Tokenizer
from basic.train_bpe import train_bpe


@dataclass(frozen=True, kw_only=True)
class Options:
    gigabytes: tyro.conf.Positional[float] = 2.0
    """Size of the text in GB."""
    cores: int = 2
    rounds: int = 5
    shard_bytes: int = 1 << 27


def load_kernels(wait_s: float = 0.0) -> None:
    loading.load_kernels("training")
    loading.load_kernels("encoding")
    time.sleep(wait_s)  # so that every process of the pool gets a call


def main(options: Options) -> None:
    from distributed import Client, LocalCluster

    cores = options.cores
    with (
        tempfile.TemporaryDirectory() as name,
        LocalCluster(n_workers=cores, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
        ProcessPoolExecutor(cores) as pool,
        ThreadPoolExecutor(cores) as threads,
    ):
        folder = Path(name)
        client.run(load_kernels)
        for future in [pool.submit(load_kernels, 1.0) for _ in range(cores)]:
            future.result()
        load_kernels()
        make_text(folder / "text.txt", options.gigabytes * 1e9)
        with open(folder / "text.txt", "rb") as file:
            (folder / "start.txt").write_bytes(file.read(20_000_000).decode(errors="ignore").encode())
        tokenizer = Tokenizer(*train_bpe(folder / "start.txt", 10_000, [END]), [END])
        executors: dict[str, Executor] = {"threads": threads, "pool": pool, "cluster": client.get_executor(pure=False)}

        def count(executor: Executor) -> None:
            counting = CountingOptions(executor=executor, shard_bytes=options.shard_bytes)
            build_count_table(folder / "text.txt", SpecialTokens([END]), counting)

        def encode(executor: Executor) -> None:
            options_ = {"executor": executor, "shard_bytes": options.shard_bytes, "start_over": True}
            encode_files(tokenizer, folder / "text.txt", folder / "tokens", **options_)

        compare({"count": count, "encode": encode}, executors, options)


def compare(tasks: dict[str, Callable[[Executor], None]], executors: dict[str, Executor], options: Options) -> None:
    print(f"{options.gigabytes:g} GB, {options.cores} cores, {options.rounds} rounds, medians")
    print("| task | threads | process pool | ratio | cluster | ratio |\n|---|---|---|---|---|---|", flush=True)
    for task, run in tasks.items():
        seconds: dict[str, list[float]] = {name: [] for name in executors}
        for number in range(options.rounds + 1):  # the first round is a warm-up
            for name, executor in executors.items():
                start = time.perf_counter()
                run(executor)
                if number:
                    seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        ratios = {
            name: statistics.median(a / b for a, b in zip(times, seconds["threads"], strict=True))
            for name, times in seconds.items()
        }
        print(
            f"| {task} | {medians['threads']:.2f} s | {medians['pool']:.2f} s | {ratios['pool']:.2f} | "
            f"{medians['cluster']:.2f} s | {ratios['cluster']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
