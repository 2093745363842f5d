"""Measure our tokenizer side by side with its peers: `uv run --group bench local/bench/tokenizer.py [FILES]`.

Every program works in a process of its own, with the same number of threads, on the same text. Medians of the
repetitions after a warm-up; `cold` begins each repetition with an empty cache of words, `warm` with a full one.
The ids are compared, and the merges up to the first tie that another program breaks otherwise.
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

# What is measured: the name in the table, the work, the text, threads, the peers, and the goals.
WORKS = [
    *(
        (f"train {vocab_size}", f"train{vocab_size}", "english", 2, {"gigatoken": 3, "rustbpe": 10, "tokenizers": 25})
        for vocab_size in (10_000, 32_000)
    ),
    *(
        (f"encode {text}, {work} cache", work, text, 1, {"gigatoken": goal, "tiktoken": None, "tokenizers": None})
        for work, goals in (("cold", (1.1, 1.1, 1.0)), ("warm", (1.2, 1.2, 1.0)))
        for text, goal in zip(("english", "program", "mixed"), goals, strict=True)
    ),
    ("encode english, two threads", "all", "english", 2, {"gigatoken": None}),
    ("encode english, one thread", "all", "english", 1, {"gigatoken": None}),
    ("encode a file", "file", "english", 2, {"gigatoken": 1.3}),
    ("encode 100 bytes", "short", "english", 1, {"gigatoken": None, "tiktoken": 1, "tokenizers": None}),
    ("decode an array", "decode", "english", 1, {"gigatoken": None, "tiktoken": 3}),
]


@dataclass(frozen=True, kw_only=True)
class Options:
    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Texts in UTF-8 to measure instead; by default English, program text and mixed scripts."""
    repeats: int = 3
    """Repetitions, of which the median counts."""
    only: str = ""
    """Measure only works whose name contains this."""
    slow_peers: bool = True
    """Whether to wait for those that take minutes to train."""
    vocabulary: Path = DATA
    """Folder with gpt2_vocab.json and gpt2_merges.txt."""


def make_texts(folder: Path) -> dict[str, Path]:
    """English novels in shuffled paragraphs, this environment's Python files, and texts in many scripts."""
    texts = {name: folder / f"{name}.txt" for name in ("english", "program", "mixed")}
    if (DATA / "novels_train.txt").is_file():
        source = (DATA / "novels_train.txt").read_bytes().decode()
        mixed = [(DATA / name).read_bytes() for name in ("multilingual_wikipedia.txt", "japanese_novel.txt")]
    else:
        from basic.stories import stories

        source = "\n\n".join(story.text for story in stories(0, 30_000))
        mixed = [source.encode()]
    paragraphs, rng, parts, size = source.split("\n\n"), random.Random(0), [], 0
    while size < ENGLISH_BYTES:
        rng.shuffle(paragraphs)
        parts.append("\n\n".join(paragraphs))
        size += len(parts[-1].encode())
    texts["english"].write_bytes("\n\n".join(parts).encode()[:ENGLISH_BYTES].decode(errors="ignore").encode())
    texts["mixed"].write_bytes(b"\n".join(mixed))
    sources = sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))
    program = b"".join(path.read_bytes() for path in sources)[:20_000_000]
    texts["program"].write_bytes(program.decode(errors="ignore").encode())
    return texts


def measure(program: str, work: str, text: Path, num_threads: int, options: Options) -> dict[str, Any]:
    script = Path(__file__).with_name("tokenizer_programs.py")
    arguments = [program, work, text, options.vocabulary, num_threads, options.repeats]
    command = [sys.executable, str(script), *map(str, arguments)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(printed.splitlines()[-1])  # some print other things first
    return {**result, "median": statistics.median(result["seconds"])}


def speed(result: dict[str, Any], text: Path, work: str) -> str:
    if work == "short":
        return f"{result['median'] * 1e6:.1f} µs"
    if work.startswith("train"):
        return f"{result['median']:.2f} s"
    return f"{result['bytes'] / result['median'] / 1e6:.0f} MB/s"


def agreement(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    if theirs.get("merges"):
        pairs = list(zip(ours["merges"], theirs["merges"], strict=False))
        same = next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
        return f"first {same:,} merges equal"
    if "ids" in ours and ours["bytes"] == theirs["bytes"]:
        return "ids equal" if ours["ids"] == theirs["ids"] else "IDS DIFFER"
    return ""


def main(options: Options) -> None:
    print("| work | ours | peer | its speed | ratio | goal | result |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        texts = {"english": options.files[0]} if options.files else make_texts(Path(folder))
        for name, work, text_name, num_threads, peers in WORKS:
            if options.only not in name or (options.files and text_name != "english"):
                continue
            for text in options.files or [texts[text_name]]:
                ours = measure("ours", work, text, num_threads, options)
                for peer, goal in peers.items():
                    if work.startswith("train") and peer != "gigatoken" and not options.slow_peers:
                        continue
                    theirs = measure(peer, work, text, num_threads, options)
                    seconds = [x["median"] / x.get("bytes", 1) for x in (ours, theirs)]
                    ratio, mark = seconds[1] / seconds[0], "" if goal is None else f"{goal}x"
                    line = [name, speed(ours, text, work), peer, speed(theirs, text, work), f"{ratio:.2f}x", mark]
                    print("| " + " | ".join([*line, agreement(ours, theirs)]) + " |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
