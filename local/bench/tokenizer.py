"""Measure our tokenizer beside its peers: `uv run --group bench local/bench/tokenizer.py --real FOLDER`.

Every program runs in its own process, with the same number of threads, on the same text. We and the peer of the goal
take turns in rounds, so that changes of the machine's speed affect both; the other peers run once. The table shows the
median time of all repetitions, and the median of the rounds' ratios (the peer's time divided by ours). An empty cache
is that of a tokenizer that has been loaded and has encoded a word; a warm one has seen the text. The ids of the first
megabyte are compared, those of the whole text where a peer got all of it, and the merges up to the first tie that
another program breaks in another way.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tyro

from basic.bytes_utils import load_vocab

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY.parent / "shared" / "data"
PROGRAMS = Path(__file__).with_name("tokenizer_programs.py")
PEERS = {"gigatoken": "gigatoken", "fastokens": "fastokens", "quicktok": "quicktok-v1", "tiktoken": "tiktoken"}
PEERS |= {"tokenizers": "tokenizers", "rustbpe": "rustbpe"}
ENGLISH_BYTES = 80_000_000
LENGTHS = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000)
REAL = {"o200k": "o200k.tiktoken", "cl100k": "cl100k.tiktoken", "llama3": "llama3.model", "qwen2": "qwen.tiktoken"}


@dataclass(frozen=True)
class Row:
    """One line, or several, of the table.

    Attributes:
        name: of the lines; {} is replaced by what a line measures.
        task: of tokenizer_programs.py.
        peer: that the goal is about; "ours" is our own tokenizer with one thread, "" none.
        goals: the smallest ratio for each line; without a peer the largest number of seconds.
        others: peers without a goal; they run once.
    """

    name: str
    task: str
    peer: str
    goals: dict[str, float]
    vocabulary: str = "gpt2"
    text: str = "english"
    num_threads: int = 1
    others: tuple[str, ...] = ()
    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict, compare=False)


def rows() -> list[Row]:
    result, slow = [], ("fastokens", "quicktok", "tiktoken", "tokenizers")
    for vocabulary in ("gpt2", *REAL):
        for text in ("english", "program", "mixed"):
            goals = {"empty": 1.0, "warm": 1.0}
            if text == "english":
                goals = {"empty": 1.1 if vocabulary == "gpt2" else 1.5, "warm": 1.1}
            others = tuple(peer for peer in slow if text == "english" or peer == "tiktoken")
            if vocabulary == "gpt2":  # it has no such vocabulary
                others = tuple(peer for peer in others if peer != "quicktok")
            name = f"{vocabulary}, {text}, {{}}"
            result.append(Row(name, "encode", "gigatoken", goals, vocabulary, text, others=others))
        result.append(Row(f"{vocabulary}, 100 bytes, warm", "short", "gigatoken", {"": 1}, vocabulary, others=slow[2:]))
    calls = {"first call": 1.0, "next two calls": 1.0}
    for vocabulary in ("gpt2", "o200k"):
        loaded = slow[1:] if vocabulary == "o200k" else slow[2:]
        result += [
            Row(f"{vocabulary}, two threads over one", "all", "ours", {"": 1.8}, vocabulary, num_threads=2),
            Row(f"{vocabulary}, encode_iterable, lines of 100 bytes", "lines", "tiktoken", {"": 5}, vocabulary),
            Row(f"{vocabulary}, decode a list", "decodelist", "tiktoken", {"": 2}, vocabulary, others=("gigatoken",)),
            *(
                Row(
                    f"{vocabulary}, {n:,} characters in a new process, {{}}", f"fresh{n}", "tiktoken", calls, vocabulary
                )
                for n in (LENGTHS if vocabulary == "gpt2" else LENGTHS[::2])
            ),
            Row(f"{vocabulary}, file to first ids", "load", "gigatoken", {"": 1}, vocabulary, others=loaded),
            Row(
                f"{vocabulary}, import and file to first ids", "start", "gigatoken", {"": 1}, vocabulary, others=loaded
            ),
        ]
    result.append(Row("gpt2, decode an array", "decode", "tiktoken", {"": 3}, others=("gigatoken",)))
    result.append(Row("gpt2, encode a file, two threads", "file", "gigatoken", {"": 1.3}, num_threads=2))
    for pattern in ("gpt2", "cl100k", "o200k"):
        for size in (10_000, 32_000):
            others = ("rustbpe", "tokenizers") if pattern == "gpt2" else ()
            name = f"train {size // 1000}k, {pattern}'s pattern, two threads"
            result.append(
                Row(name, f"train{size}", "gigatoken", {"": 3}, pattern, "training", num_threads=2, others=others)
            )
    result.append(Row("an empty call into a kernel, the floor of short texts", "call", "", {"": 0.9e-6}))
    return [*result, Row("compile all kernels", "compile", "", {"": 15}, num_threads=2)]


@dataclass(frozen=True, kw_only=True)
class Options:
    real: Path | None = None
    """Folder with the published rank files o200k.tiktoken, cl100k.tiktoken, llama3.model, qwen.tiktoken; without one,
    their rows are left out."""
    rounds: int = 2
    """Rounds, in which we and the peer of the goal take turns."""
    only: tuple[str, ...] = ()
    """Measure only rows whose name contains one of these."""
    other_peers: bool = True
    """Measure also the peers without a goal."""
    cpu_time: bool = False
    """Measure the processor's time, for a busy machine, in the rows with one thread."""
    megabytes: float = ENGLISH_BYTES / 1e6
    """Size of the English text."""
    vocabulary: Path = DATA
    """Folder with gpt2_vocab.json and gpt2_merges.txt."""


def make_texts(folder: Path, size: int) -> dict[str, Path]:
    """Write the texts: English novels in shuffled paragraphs, Python files of the standard library, several scripts.

    The text for training has <|endoftext|> between its copies, the others have no special tokens.
    """
    texts = {name: folder / f"{name}.txt" for name in ("english", "program", "mixed", "training")}
    if (DATA / "novels_train.txt").is_file():
        source = (DATA / "novels_train.txt").read_bytes().decode().replace("<|endoftext|>", "")
        mixed = [(DATA / name).read_bytes() for name in ("multilingual_wikipedia.txt", "japanese_novel.txt")]
    else:
        from basic.corpus.stories.grammar import stories

        source = "\n\n".join(story.text for story in stories(0, 30_000))
        mixed = [source.encode()]
    paragraphs, rng, copies, length = source.split("\n\n"), random.Random(0), [], 0
    while length < size:
        rng.shuffle(paragraphs)
        copies.append("\n\n".join(paragraphs).encode())
        length += len(copies[-1])
    texts["english"].write_bytes(b"\n\n".join(copies)[:size].decode(errors="ignore").encode())
    texts["training"].write_bytes(b"<|endoftext|>".join(copies)[:size].decode(errors="ignore").encode())
    texts["mixed"].write_bytes(b"\n".join(mixed).replace(b"<|endoftext|>", b""))
    sources = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    program = b"".join(path.read_bytes() for path in sources if "site-packages" not in path.parts)
    program = program[: min(size, 20_000_000)].decode(errors="ignore").replace("<|", "< |")
    texts["program"].write_bytes(program.encode())
    return texts


def find_vocabularies(folder: Path, options: Options) -> dict[str, Path]:
    """The rank files by the names of their patterns. GPT-2's has the two files that it is made from beside it."""
    ranks = load_vocab(options.vocabulary / "gpt2_vocab.json")
    lines = (f"{base64.b64encode(ranks[i]).decode()} {i}\n" for i in range(50256))
    (folder / "gpt2.tiktoken").write_text("".join(lines), encoding="ascii")
    for name in ("gpt2_vocab.json", "gpt2_merges.txt"):
        shutil.copyfile(options.vocabulary / name, folder / name)
    result = {"gpt2": folder / "gpt2.tiktoken"}
    for name, file in REAL.items():
        if options.real is not None and (options.real / file).is_file():
            result[name] = options.real / file
        else:
            print(f"rows of {name} are left out: no {file} in --real {options.real or ''}", file=sys.stderr)
    return result


def write_json_files(vocabularies: dict[str, Path], folder: Path) -> None:
    """Write each tokenizer as tokenizer.json, for the peers that do not open its rank file."""
    from basic.formats.tokenizers import save_tokenizer_json
    from basic.Tokenizer import Tokenizer

    for name, path in vocabularies.items():
        save_tokenizer_json(Tokenizer.load(path, pattern=name), folder / f"{path.name}.json")


def installed_peers() -> dict[str, str]:
    """The versions of the peers; a peer that is not there is left out of the table."""
    result = {}
    for module, package in PEERS.items():
        try:
            result[module] = version(package) if importlib.util.find_spec(module) else ""
        except PackageNotFoundError:
            result[module] = ""
        if not result[module]:
            print(f"{module} is left out: the package {package} is not installed", file=sys.stderr)
    return {module: number for module, number in result.items() if number}


def measure(program: str, row: Row, num_threads: int, files: list[Path], options: Options) -> dict[str, Any] | None:
    """Run a program in its own process; None if it cannot do the task."""
    command = [sys.executable, PROGRAMS, program, row.task, row.vocabulary, str(num_threads), *files]
    # Imports are as fast as they are for users: bytecode is kept.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment = {**environment, "RAYON_NUM_THREADS": str(num_threads)}
    if options.cpu_time and row.num_threads == 1:
        environment["CPU_TIME"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        if row.task == "compile":
            environment["NUMBA_CACHE_DIR"] = folder
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        print(f"{row.name}: {program}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])  # some programs print other lines first


def run_row(row: Row, options: Options, files: list[Path], peers: dict[str, str]) -> None:
    for number in range(options.rounds if row.peer else 1):
        programs = {"ours": row.num_threads, **({row.peer: row.num_threads} if row.peer in peers else {})}
        for program, num_threads in programs.items():
            if (result := measure(program, row, num_threads, files, options)) is not None:
                row.results.setdefault(program, []).append(result)
        if row.peer == "ours" and (result := measure("ours", row, 1, files, options)) is not None:
            row.results.setdefault("ours, one thread", []).append(result)
        for program in row.others if number == 0 and options.other_peers else ():
            if program in peers and (result := measure(program, row, row.num_threads, files, options)) is not None:
                row.results[program] = [result]


def median(results: list[dict[str, Any]], part: str) -> float:
    return statistics.median([s for result in results for s in result["seconds"][part]])


def shown(results: list[dict[str, Any]], part: str, task: str) -> str:
    seconds = median(results, part)
    if task in ("short", "call") or task.startswith("fresh"):
        return f"{seconds * 1e6:.2f} µs" if seconds < 1e-2 else f"{seconds * 1e3:.1f} ms"
    if task.startswith(("train", "load", "start", "compile")):
        return f"{seconds:.2f} s"
    return f"{results[0]['bytes'] / seconds / 1e6:.0f} MB/s"


def ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], part: str) -> float:
    """The median over the rounds of their time by ours, for a byte."""
    pairs = zip(ours, theirs, strict=False)
    times = [[median([result], part) / result.get("bytes", 1) for result in pair] for pair in pairs]
    return statistics.median([their_time / our_time for our_time, their_time in times])


def compared_outputs(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    if theirs.get("merges") and theirs.get("pattern") == ours.get("pattern"):
        pairs = list(zip(ours["merges"], theirs["merges"], strict=False))
        same = next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
        return f"first {same:,} merges equal"
    if "ids" in ours and "ids" in theirs:
        count = 2 if ours["bytes"] == theirs["bytes"] else 1
        return "" if ours["ids"][:count] == theirs["ids"][:count] else "OTHER IDS"
    return ""


def lines(row: Row) -> list[str]:
    ours, result = row.results.get("ours"), []
    if not ours:
        return [f"| {row.name} | failed |"]
    peer = "ours, one thread" if row.peer == "ours" else row.peer
    for part, goal in row.goals.items():
        cells, verdict = [row.name.format(part), shown(ours, part, row.task)], ""
        beside = {name: results for name, results in row.results.items() if name != "ours"}
        ratios = {name: ratio(ours, results, part) for name, results in beside.items()}
        if not row.peer:
            verdict = "met" if median(ours, part) <= goal else "missed"
        elif peer in ratios:
            verdict = "met" if ratios[peer] >= goal else "missed"
        texts = {
            name: f"{name} {shown(results, part, row.task)}, {ratios[name]:.2f} "
            f"{compared_outputs(ours[0], results[0])}".strip()
            for name, results in beside.items()
        }
        cells += [texts.pop(peer, ""), f"{goal:g}" + ("" if row.peer else " s"), verdict, "; ".join(texts.values())]
        result.append("| " + " | ".join(cells) + " |")
    return result


def main(options: Options) -> None:
    peers = installed_peers()
    subprocess.run([sys.executable, "-m", "basic.bpe"], check=True, stdout=subprocess.DEVNULL)
    print(f"Peers: {', '.join(f'{name} {number}' for name, number in peers.items())}.\n")
    print("| work | ours | peer of the goal, ratio | goal | result | other peers |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts, vocabularies = make_texts(folder, int(options.megabytes * 1e6)), find_vocabularies(folder, options)
        chosen = [row for row in rows() if not options.only or any(text in row.name for text in options.only)]
        others = options.other_peers and "tokenizers" in peers
        needed = {
            row.vocabulary for row in chosen if row.vocabulary == "llama3" or (others and "tokenizers" in row.others)
        }
        write_json_files({name: path for name, path in vocabularies.items() if name in needed}, folder)
        for row in chosen:
            if row.vocabulary in vocabularies or row.task.startswith("train"):
                vocabulary = vocabularies.get(row.vocabulary, Path())
                run_row(row, options, [texts[row.text], vocabulary, folder / f"{vocabulary.name}.json"], peers)
                print("\n".join(lines(row)), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
