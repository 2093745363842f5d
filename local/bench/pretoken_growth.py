"""The number of distinct pre-tokens, and the time and memory of each: `uv run local/bench/pretoken_growth.py`.

The first table shows how the number of distinct pre-tokens grows with the size of real text. The second one shows the
time and memory of tables of synthetic pre-tokens: sorting, writing, adding, and learning 64k merges. Each table is
measured in its own process, so that its memory is known. Times are CPU times of one core.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from basic.bpe import compiled, loading
from basic.bpe.arrays import PretokenCounts
from basic.bpe.plain import number_merges
from basic.corpus.count_tables import merge_tables, read_table, write_table
from basic.corpus.counting import CountingOptions, build_count_table
from basic.pretokenization import SpecialTokens

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
END = "<|endoftext|>"
MERGES = 65_536 - 257


@dataclass(frozen=True, kw_only=True)
class Options:
    millions: tyro.conf.Positional[tuple[float, ...]] = (0.25, 1, 4)
    """Numbers of distinct pre-tokens, in millions."""


def print_growth(name: str, folder: Path) -> None:
    data = (DATA / name).read_bytes()
    sizes = [size for size in (250_000, 500_000, 1_000_000, 2_000_000, 5_000_000, 10_000_000) if size < len(data)]
    for size in [*sizes, len(data)]:
        (folder / "text.txt").write_bytes(data[:size].decode(errors="ignore").encode())
        table = build_count_table(folder / "text.txt", SpecialTokens([END]), CountingOptions(kernels=True))
        frequent = (np.count_nonzero(table.counts >= min_count) for min_count in (2, 5))
        print(
            f"| {name} | {size / 1e6:.2f} MB | {len(table.counts):,} | {' | '.join(f'{n:,}' for n in frequent)} |",
            flush=True,
        )


def synthetic_pretokens(number: int) -> PretokenCounts:
    """Random words of two to four syllables; the n-th occurs 1 / n times as often as the first (Zipf's law)."""
    rng = np.random.default_rng(0)
    letters = [list(group) for group in ("bcdfghklmnprstvz", "aeiou", "nrstlm")]
    syllables = ["".join(rng.choice(group) for group in letters) for _ in range(400)]
    pretokens: dict[bytes, None] = {}
    while len(pretokens) < number:
        for draws in rng.integers(0, len(syllables), (100_000, 4)).tolist():
            pretokens[(" " + "".join(syllables[i][: 2 + i % 2] for i in draws[: 2 + draws[0] % 3])).encode()] = None
    distinct = list(pretokens)[:number]
    counts = np.maximum(1, number / np.arange(1, number + 1)).astype(np.int64)
    starts = np.cumsum([0, *map(len, distinct)])
    return PretokenCounts(np.frombuffer(b"".join(distinct), np.uint8), starts, counts)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def print_costs(number: int, folder: Path) -> None:
    loading.load_kernels("training")
    pretokens = synthetic_pretokens(number)
    num_bytes = len(pretokens.data)
    start = time.process_time()
    table = compiled.sort_pretokens(pretokens)
    sort_s = time.process_time() - start
    start = time.process_time()
    record = write_table(folder / "table", [table])
    write_s = time.process_time() - start
    start = time.process_time()
    write_table(folder / "all", merge_tables([read_table(folder / "table") for _ in range(16)], kernels=True))
    add_s = (time.process_time() - start) / 16
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    start = time.process_time()
    merges = compiled.learn_merges(
        table, MERGES, lambda amount: None, first_merges=number_merges(()), max_token_bytes=None
    )
    learn_s = time.process_time() - start
    print(
        f"| {number:,} | {num_bytes / number:.1f} | {sort_s / number * 1e9:.0f} ns | {write_s / number * 1e9:.0f} ns | "
        f"{record['file_bytes'] / number:.0f} | {add_s / number * 1e9:.0f} ns | {learn_s:.1f} s for {len(merges):,} | "
        f"{(peak_bytes() - before) / number:.0f} |",
        flush=True,
    )


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        print("| text | size | distinct pre-tokens | at least twice | at least five times |\n|---|---|---|---|---|")
        for name in ("novels_train.txt", "multilingual_wikipedia.txt", "tinystories_2MiB.txt"):
            if (DATA / name).is_file():
                print_growth(name, Path(folder))
    print("\n| pre-tokens | bytes each | sort | write | bytes on disk | add, one of 16 | learn | memory, bytes each |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for millions in options.millions:
        subprocess.run([sys.executable, __file__, "--costs", str(int(millions * 1e6))], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--costs"]:
        with tempfile.TemporaryDirectory() as name:
            print_costs(int(sys.argv[2]), Path(name))
    else:
        main(tyro.cli(Options, description=__doc__))
