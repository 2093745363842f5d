"""Measure our tokenizer beside its peers: `uv run --group bench local/bench/tokenizer.py [FILES]`.

Every program runs in its own process, with the same number of threads, on the same text. We and the peers take turns in
rounds, so that changes of the machine's speed affect all of them. In a round, a program repeats its task after a
warm-up. The table shows the median time of a program's repetitions and the median of the rounds' ratios. `cold` starts
each repetition with an empty pre-token cache, `warm` with a full one. The ids are compared, and the merges up to the
first tie that another program breaks in another way.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY.parent / "shared" / "data"
ENGLISH_BYTES = 80_000_000

# Name in the table, task, text, number of threads, and the peers with the target ratio. The peer "ours" is our own
# tokenizer with one thread.
TASKS = [
    *(
        (f"train {vocab_size}", f"train{vocab_size}", "english", 2, {"gigatoken": 3, "rustbpe": 10, "tokenizers": 25})
        for vocab_size in (10_000, 32_000)
    ),
    *(
        (f"encode {text}, {task} cache", task, text, 1, {"gigatoken": goal, "tiktoken": None, "tokenizers": None})
        for task, goals in (("cold", (1.1, 1.1, 1.0)), ("warm", (1.2, 1.2, 1.0)))
        for text, goal in zip(("english", "program", "mixed"), goals, strict=True)
    ),
    ("encode english, two threads", "all", "english", 2, {"ours": 1.7, "gigatoken": None}),
    ("encode a file", "file", "english", 2, {"gigatoken": 1.3}),
    ("encode 100 bytes", "short", "english", 1, {"gigatoken": None, "tiktoken": 1, "tokenizers": None}),
    ("decode an array", "decode", "english", 1, {"gigatoken": None, "tiktoken": 3}),
    ("decode a list", "decodelist", "english", 1, {"gigatoken": None, "tiktoken": 2}),
    ("lines of 100 characters", "lines", "english", 1, {"gigatoken": None, "tiktoken": 5}),
    *(
        (f"{length:,} characters in a new process", f"fresh{length}", "english", 1, {"gigatoken": None, "tiktoken": 1})
        for length in (1, 5, 50, 500, 5_000, 50_000, 500_000, 5_000_000)
    ),
]


@dataclass(frozen=True, kw_only=True)
class Options:
    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """UTF-8 texts to measure; none: English, program text and text in several scripts, made by this script."""
    repeats: int = 3
    """Repetitions in a round."""
    rounds: int = 3
    """Rounds, in which all programs take turns; slow peers run in the first round only."""
    only: str = ""
    """Measure only tasks whose name contains this."""
    slow_peers: bool = True
    """Include peers that need minutes to train."""
    vocabulary: Path = DATA
    """Folder with gpt2_vocab.json and gpt2_merges.txt."""


def make_texts(folder: Path) -> dict[str, Path]:
    """Write the texts: English novels in shuffled paragraphs, Python files of this environment, and several scripts."""
    texts = {name: folder / f"{name}.txt" for name in ("english", "program", "mixed")}
    if (DATA / "novels_train.txt").is_file():
        source = (DATA / "novels_train.txt").read_bytes().decode()
        mixed = [(DATA / name).read_bytes() for name in ("multilingual_wikipedia.txt", "japanese_novel.txt")]
    else:
        from basic.corpus.stories.grammar import stories

        source = "\n\n".join(story.text for story in stories(0, 30_000))
        mixed = [source.encode()]
    paragraphs, rng, copies, size = source.split("\n\n"), random.Random(0), [], 0
    while size < ENGLISH_BYTES:
        rng.shuffle(paragraphs)
        copies.append("\n\n".join(paragraphs))
        size += len(copies[-1].encode())
    texts["english"].write_bytes("\n\n".join(copies).encode()[:ENGLISH_BYTES].decode(errors="ignore").encode())
    texts["mixed"].write_bytes(b"\n".join(mixed))
    sources = sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))
    program = b"".join(path.read_bytes() for path in sources)[:20_000_000]
    texts["program"].write_bytes(program.decode(errors="ignore").encode())
    return texts


def measure(program: str, task: str, text: Path, num_threads: int, options: Options) -> dict[str, Any]:
    script = Path(__file__).with_name("tokenizer_programs.py")
    arguments = [program, task, text, options.vocabulary, num_threads, options.repeats]
    command = [sys.executable, str(script), *map(str, arguments)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(printed.splitlines()[-1])  # some programs print other lines first
    return {**result, "median": statistics.median(result["seconds"])}


def speed(result: dict[str, Any], task: str) -> str:
    if task == "short" or task.startswith("fresh"):
        return f"{result['median'] * 1e6:.1f} µs"
    if task.startswith("train"):
        return f"{result['median']:.2f} s"
    return f"{result['bytes'] / result['median'] / 1e6:.0f} MB/s"


def compare_outputs(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    if theirs.get("merges"):
        pairs = list(zip(ours["merges"], theirs["merges"], strict=False))
        same = next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
        return f"first {same:,} merges equal"
    if "ids" in ours and ours["bytes"] == theirs["bytes"]:
        return "ids equal" if ours["ids"] == theirs["ids"] else "IDS DIFFER"
    return ""


def compare(name: str, task: str, text: Path, num_threads: int, peers: dict[str, Any], options: Options) -> None:
    """Measure a task, and print a line for each peer."""
    is_slow = {peer: peer in ("rustbpe", "tokenizers") for peer in peers}
    ours, theirs = [], {peer: [] for peer in peers}
    for number in range(options.rounds):
        ours.append(measure("ours", task, text, num_threads, options))
        for peer in peers:
            if not is_slow[peer] or (number == 0 and (options.slow_peers or not task.startswith("train"))):
                theirs[peer].append(measure(peer, task, text, 1 if peer == "ours" else num_threads, options))
    us = merged(ours)
    for peer, results in theirs.items():
        if results:
            them = merged(results)
            ratios = [per_byte(y) / per_byte(x) for x, y in zip(ours, results, strict=False)]
            mark = f"{peers[peer]}x" if peers[peer] else ""
            peer_name = "ours, one thread" if peer == "ours" else peer
            line = [name, speed(us, task), peer_name, speed(them, task), f"{statistics.median(ratios):.2f}x", mark]
            print("| " + " | ".join([*line, compare_outputs(us, them)]) + " |", flush=True)


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The first result, with the median of the times of all results."""
    return {**results[0], "median": statistics.median([s for result in results for s in result["seconds"]])}


def per_byte(result: dict[str, Any]) -> float:
    return result["median"] / result.get("bytes", 1)


def main(options: Options) -> None:
    print("| task | ours | peer | its speed | ratio | goal | result |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        texts = {"english": options.files[0]} if options.files else make_texts(Path(folder))
        for name, task, text_name, num_threads, peers in TASKS:
            if options.only in name and (text_name == "english" or not options.files):
                for text in options.files or [texts[text_name]]:
                    compare(name, task, text, num_threads, peers, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
