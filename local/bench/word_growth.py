"""What a distinct word costs, and how many there are: `uv run local/bench/word_growth.py`.

First how the distinct words of real text grow with it, then time and memory for tables of made-up words: sorting,
writing, adding up, and learning a vocabulary of 64k. Each table has a process of its own, so that its memory is known.
Times are those of one core, whatever else the machine does.
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
from basic.corpus.count_tables import add_up, read_table, write_table
from basic.corpus.counting import count_words
from basic.pretokenization import SpecialTokens

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
END = "<|endoftext|>"
MERGES = 65_536 - 257


@dataclass(frozen=True, kw_only=True)
class Options:
    millions: tyro.conf.Positional[tuple[float, ...]] = (0.25, 1, 4)
    """Distinct words."""


def growth(name: str, folder: Path) -> None:
    data = (DATA / name).read_bytes()
    sizes = [size for size in (250_000, 500_000, 1_000_000, 2_000_000, 5_000_000, 10_000_000) if size < len(data)]
    for size in [*sizes, len(data)]:
        (folder / "text.txt").write_bytes(data[:size].decode(errors="ignore").encode())
        words = count_words(folder / "text.txt", SpecialTokens([END]), kernels=True)
        often = (np.count_nonzero(words.counts >= least) for least in (2, 5))
        print(
            f"| {name} | {size / 1e6:.2f} MB | {len(words.counts):,} | {' | '.join(f'{n:,}' for n in often)} |",
            flush=True,
        )


def made_up_words(number: int) -> PretokenCounts:
    """Words of syllables, some of two to four with an ending; the n-th is there 1 / n times as often as the first."""
    rng = np.random.default_rng(0)
    letters = [list(group) for group in ("bcdfghklmnprstvz", "aeiou", "nrstlm")]
    syllables = ["".join(rng.choice(group) for group in letters) for _ in range(400)]
    words: dict[bytes, None] = {}
    while len(words) < number:
        for row in rng.integers(0, len(syllables), (100_000, 4)).tolist():
            words[(" " + "".join(syllables[i][: 2 + i % 2] for i in row[: 2 + row[0] % 3])).encode()] = None
    names = list(words)[:number]
    counts = np.maximum(1, number / np.arange(1, number + 1)).astype(np.int64)
    starts = np.cumsum([0, *map(len, names)])
    return PretokenCounts(np.frombuffer(b"".join(names), np.uint8), starts, counts)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def costs(number: int, folder: Path) -> None:
    loading.load_kernels("training")
    words = made_up_words(number)
    num_bytes = len(words.data)
    begin = time.process_time()
    table = compiled.sort_pretokens(words)
    sort_s = time.process_time() - begin
    begin = time.process_time()
    record = write_table(folder / "table", [table])
    write_s = time.process_time() - begin
    begin = time.process_time()
    write_table(folder / "all", add_up([read_table(folder / "table") for _ in range(16)], kernels=True))
    add_s = (time.process_time() - begin) / 16
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    begin = time.process_time()
    merges = compiled.learn_merges(table, MERGES, lambda amount: None)
    learn_s = time.process_time() - begin
    print(
        f"| {number:,} | {num_bytes / number:.1f} | {sort_s / number * 1e9:.0f} ns | {write_s / number * 1e9:.0f} ns | "
        f"{record['file_bytes'] / number:.0f} | {add_s / number * 1e9:.0f} ns | {learn_s:.1f} s for {len(merges):,} | "
        f"{(peak_bytes() - before) / number:.0f} |",
        flush=True,
    )


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        print("| text | of it | distinct words | there twice | five times |\n|---|---|---|---|---|")
        for name in ("novels_train.txt", "multilingual_wikipedia.txt", "tinystories_2MiB.txt"):
            if (DATA / name).is_file():
                growth(name, Path(folder))
    print("\n| words | bytes | sort | write | on the disk | add up, of each of 16 | learn | its memory, bytes a word |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for millions in options.millions:
        subprocess.run([sys.executable, __file__, "--costs", str(int(millions * 1e6))], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--costs"]:
        with tempfile.TemporaryDirectory() as name:
            costs(int(sys.argv[2]), Path(name))
    else:
        main(tyro.cli(Options, description=__doc__))
