"""Time and memory to train on and to encode a large text: `uv run local/bench/tokenizer_scale.py`.

The text is like TinyStories: the stories of ../shared/data/tinystories_2MiB.txt in shuffled copies, or the embedded
stories if that file does not exist. Each task runs in its own process. Its memory is the peak of the anonymous memory,
without memory-mapped files.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
END = "<|endoftext|>"


def train(text: Path, folder: Path) -> float:
    from basic.train_bpe import train_bpe

    start = time.perf_counter()
    train_bpe(text, 10_000, [END])
    return time.perf_counter() - start


def encode(text: Path, folder: Path) -> float:
    from basic.encoding import encode_file
    from basic.Tokenizer import Tokenizer
    from basic.train_bpe import train_bpe

    with open(text, "rb") as file:
        (folder / "start.txt").write_bytes(file.read(20_000_000).decode(errors="ignore").encode())
    tokenizer = Tokenizer(*train_bpe(folder / "start.txt", 10_000, [END]), [END])
    start = time.perf_counter()
    encode_file(tokenizer, text, folder / "tokens.bin")
    return time.perf_counter() - start


TASKS = {"train 10000": train, "encode_file": encode}


@dataclass(frozen=True, kw_only=True)
class Options:
    gigabytes: tyro.conf.Positional[tuple[float, ...]] = (0.5, 2.0)
    """Sizes of the text in GB."""


def make_text(path: Path, num_bytes: float) -> None:
    source = DATA / "tinystories_2MiB.txt"
    if source.is_file():
        stories = source.read_text(encoding="utf-8").split(END)
    else:
        from basic.corpus.stories import grammar

        stories = [story.text for story in grammar.stories(0, 5000)]
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8", newline="") as file:
        while file.tell() < num_bytes:
            rng.shuffle(stories)
            file.write(END.join(stories) + END)


def measure(task: str, text: Path, folder: Path) -> None:
    """Run a task in this process; prints its time and the peak of the anonymous memory in MB."""
    from basic.bpe import loading

    loading.load_kernels("training")
    loading.load_kernels("encoding")
    peak_kb = 0

    def watch() -> None:
        nonlocal peak_kb
        while True:
            status = Path("/proc/self/status").read_text().split("RssAnon:")[1]
            peak_kb = max(peak_kb, int(status.split()[0]))
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    seconds = TASKS[task](text, folder)
    size = text.stat().st_size / 1e9
    print(f"| {task} | {size:.1f} GB | {seconds:.2f} s | {peak_kb / 1000:.0f} MB |", flush=True)


def main(options: Options) -> None:
    print("| task | text | time | memory |\n|---|---|---|---|", flush=True)
    for gigabytes in options.gigabytes:
        with tempfile.TemporaryDirectory() as folder:
            make_text(Path(folder) / "text.txt", gigabytes * 1e9)
            for task in TASKS:
                subprocess.run([sys.executable, __file__, "--measure", task, folder], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], Path(sys.argv[3]) / "text.txt", Path(sys.argv[3]))
    else:
        main(tyro.cli(Options, description=__doc__))
