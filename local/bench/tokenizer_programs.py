"""Run one task of one program on one text in this process; prints the times and the outputs as JSON.

Called by tokenizer.py. A time is from the text in memory (bytes if the program accepts them, else a string) to the ids
in memory. Training and `file` start from a file.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

END = "<|endoftext|>"
# Text for programs without a pre-token cache, whose speed does not depend on the size.
SLOW_BYTES = {"fastokens": 8_000_000, "tiktoken": 4_000_000, "quicktok": 4_000_000, "tokenizers": 1_000_000}
LINES_BYTES = 4_000_000
SCHEMES = {"cl100k": "gpt4"}  # gigatoken's names, where they are not ours
QUICKTOK_NAMES = {"o200k": "o200k_base", "cl100k": "cl100k_base", "llama3": "llama3", "qwen2": "qwen3"}


def documents(path: Path, program: str) -> list[bytes]:
    """Split the text at line ends into documents of about a megabyte."""
    data, result, start = path.read_bytes(), [], 0
    if program in SLOW_BYTES:
        data = data[: data.find(b"\n", SLOW_BYTES[program]) + 1 or None]
    while start < len(data):
        stop = data.find(b"\n", start + 1_000_000) + 1 or len(data)
        result.append(data[start:stop])
        start = stop
    return result


def published(name: str) -> tuple[str, dict[str, int]]:
    """The regular expression and the special tokens of a vocabulary."""
    from basic.pretokenization import PATTERNS
    from basic.tokenizer_files.rank_file import PUBLISHED_RANKS

    special = next(ranks.special_tokens for ranks in PUBLISHED_RANKS.values() if ranks.pattern == name)
    return PATTERNS[name].splits[0], special


class Ours:
    def __init__(self, name: str, path: Path, json_file: Path) -> None:
        from basic.Tokenizer import Tokenizer

        if name == "gpt2":
            paths = path.with_name("gpt2_vocab.json"), path.with_name("gpt2_merges.txt")
            self.tokenizer = Tokenizer.from_files(*paths, [END])
        else:
            self.tokenizer = Tokenizer.load(path, pattern=name)

    def encode(self, document: bytes) -> Any:
        return self.tokenizer.encode_array(document, num_threads=1)

    def encode_all(self, text: bytes, num_threads: int) -> Any:
        return self.tokenizer.encode_array(text, num_threads=num_threads)

    def encode_file(self, path: Path, num_threads: int) -> Any:
        from basic.encoding import encode_file

        with tempfile.TemporaryDirectory() as folder:
            encode_file(self.tokenizer, path, Path(folder) / "ids.bin", num_threads=num_threads)

    def short(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def decode(self, ids: Any) -> Any:
        return self.tokenizer.decode_bytes(ids)

    def lines(self, lines: list[str]) -> Any:
        return list(self.tokenizer.encode_iterable(lines))

    @staticmethod
    def train(path: Path, vocab_size: int, pattern: str, num_threads: int) -> list[tuple[bytes, bytes]]:
        from basic.train_bpe import train_bpe

        return train_bpe(path, vocab_size, [END], pattern=pattern, num_workers=num_threads)[1]


class Gigatoken:
    def __init__(self, name: str, path: Path, json_file: Path) -> None:
        from gigatoken.gigatoken_rs import BPETokenizer

        if name == "llama3":  # it refuses the rank file
            self.tokenizer = BPETokenizer.from_hf(json_file)
        else:
            self.tokenizer = BPETokenizer.from_tiktoken(path, SCHEMES.get(name, name), published(name)[1])

    def encode(self, document: bytes) -> Any:
        return self.tokenizer.encode(document)

    def encode_all(self, texts: list[bytes], num_threads: int) -> Any:
        return self.tokenizer.encode_batch(texts)

    def encode_file(self, path: Path, num_threads: int) -> Any:
        import gigatoken

        return self.tokenizer.encode_files(gigatoken.TextFileSource([path], separator=END))

    def short(self, text: str) -> Any:
        return self.tokenizer.encode(text)

    def decode(self, ids: Any) -> Any:
        return self.tokenizer.decode(ids.astype(np.uint32) if isinstance(ids, np.ndarray) else ids)

    @staticmethod
    def train(path: Path, vocab_size: int, pattern: str, num_threads: int) -> list[tuple[bytes, bytes]]:
        import gigatoken

        return gigatoken.train_bpe(path, vocab_size, [END])[1]  # it trains with GPT-2's pattern only


class Tiktoken:
    def __init__(self, name: str, path: Path, json_file: Path) -> None:
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe

        pattern, special = published(name)
        ranks = {token: i for token, i in load_tiktoken_bpe(str(path)).items() if i not in special.values()}
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, document: bytes) -> Any:
        return self.encoding.encode_to_numpy(document.decode(), allowed_special="all")

    def short(self, text: str) -> list[int]:
        return self.encoding.encode(text, allowed_special="all")

    def decode(self, ids: Any) -> Any:
        return self.encoding.decode_bytes(ids)

    def lines(self, lines: list[str]) -> Any:
        return [self.encoding.encode(line, allowed_special="all") for line in lines]


class Fastokens:
    def __init__(self, name: str, path: Path, json_file: Path) -> None:
        import fastokens

        pattern, special = published(name)
        if name == "llama3":  # it refuses the rank file
            self.tokenizer = fastokens.Tokenizer.from_file(str(json_file))
        else:
            self.tokenizer = fastokens.Tokenizer.from_tiktoken(str(path), pattern=pattern, special_tokens=special)

    def encode(self, document: bytes) -> Any:
        return np.frombuffer(self.tokenizer.encode_batch_flat([document.decode()])[0], np.uint32)

    def short(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids


class Quicktok:
    """It has its vocabularies in the package."""

    def __init__(self, name: str, path: Path, json_file: Path) -> None:
        import quicktok

        self.tokenizer = quicktok.Tokenizer(QUICKTOK_NAMES[name], "")

    def encode(self, document: bytes) -> Any:
        return self.tokenizer.encode_with_special(document.decode())

    def short(self, text: str) -> list[int]:
        return self.tokenizer.encode_with_special(text)


class Tokenizers:
    def __init__(self, name: str, path: Path, json_file: Path) -> None:
        import tokenizers

        self.tokenizer = tokenizers.Tokenizer.from_file(str(json_file))

    def encode(self, document: bytes) -> Any:
        return self.tokenizer.encode(document.decode(), add_special_tokens=False).ids

    def short(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    @staticmethod
    def train(path: Path, vocab_size: int, pattern: str, num_threads: int) -> list[tuple[bytes, bytes]]:
        from tokenizers import ByteLevelBPETokenizer

        from basic.bytes_utils import load_merges

        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train([str(path)], vocab_size, 0, False, [END])
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_model(folder)
            return load_merges(Path(folder) / "merges.txt")


class Rustbpe:
    @staticmethod
    def train(path: Path, vocab_size: int, pattern: str, num_threads: int) -> list[tuple[bytes, bytes]]:
        import rustbpe

        tokenizer = rustbpe.Tokenizer()
        # It takes an iterator of strings; its documentation uses lines.
        with open(path, encoding="utf-8", newline="") as file:
            tokenizer.train_from_iterator(file, vocab_size - 1, pattern=published(pattern)[0])
        return []  # it returns tokens, not the pairs that they were merged from


PROGRAMS = {
    "ours": Ours,
    "gigatoken": Gigatoken,
    "tiktoken": Tiktoken,
    "fastokens": Fastokens,
    "quicktok": Quicktok,
    "tokenizers": Tokenizers,
    "rustbpe": Rustbpe,
}


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    clock = time.process_time if os.environ.get("CPU_TIME") else time.perf_counter
    start = clock()
    result = function(*arguments)
    return clock() - start, result


def repeated(function: Callable[[], Any], repeats: int = 3) -> list[float]:
    return [timed(function)[0] for _ in range(repeats)]


def digest(ids: list[Any]) -> str:
    return hashlib.sha256(b"".join(np.asarray(array, np.uint32).tobytes() for array in ids)).hexdigest()[:16]


def empty_call() -> float:
    """The seconds of a call of a built-in function whose kernel returns at once."""
    from basic.bpe.kernels.instructions import kernel, new_integer
    from basic.common.native.kernel import PreparedCall

    @kernel
    def nothing(text):
        return new_integer(0)

    prepared = PreparedCall(nothing, 0)
    call = prepared.as_function()
    return min(repeated(lambda: [call("a") for _ in range(2000)], 50)) / 2000


def run_in_new_process(name: str, task: str, vocabulary: str, files: list[Path], num_threads: int) -> dict[str, Any]:
    """The tasks that measure a process from its start on."""
    if task == "compile":
        from basic.bpe.loading import load_kernels

        return {"seconds": {"": [timed(lambda: [load_kernels("training"), load_kernels("encoding")])[0]]}}
    if task in ("load", "start"):
        if name != "ours":
            published(vocabulary)  # the imports for it are not the peer's
        if task == "load":
            importlib.import_module("basic.Tokenizer" if name == "ours" else name)
        return {
            "seconds": {
                "": [timed(lambda: PROGRAMS[name](vocabulary, *files[1:]).short("The first ids of a text."))[0]]
            }
        }
    text = files[0].read_text(encoding="utf-8")[: int(task.removeprefix("fresh"))]
    program = PROGRAMS[name](vocabulary, *files[1:])
    first, *next_two = repeated(lambda: program.short(text))
    return {"seconds": {"first call": [first], "next two calls": next_two}, "bytes": len(text.encode())}


def run_encode(program: Any, texts: list[bytes]) -> dict[str, Any]:
    program.encode(b"ready")
    empty, ids = timed(lambda: [program.encode(text) for text in texts])
    digests = [digest(ids[:1]), digest(ids)]
    del ids
    warm = repeated(lambda: [program.encode(text) for text in texts])
    return {"seconds": {"empty": [empty], "warm": warm}, "bytes": sum(map(len, texts)), "ids": digests}


def main(name: str, task: str, vocabulary: str, num_threads: int, files: list[Path]) -> dict[str, Any]:
    if task == "call":
        return {"seconds": {"": [empty_call()]}}
    if task in ("compile", "load", "start") or task.startswith("fresh"):
        return run_in_new_process(name, task, vocabulary, files, num_threads)
    if task.startswith("train"):
        size = int(task.removeprefix("train"))
        if name == "ours":
            from basic.bpe import loading

            loading.load_kernels("training")
        seconds, merges = timed(PROGRAMS[name].train, files[0], size, vocabulary, num_threads)
        pattern = "gpt2" if name == "gigatoken" else vocabulary
        return {
            "seconds": {"": [seconds]},
            "merges": [[left.hex(), right.hex()] for left, right in merges],
            "pattern": pattern,
        }
    texts, program = documents(files[0], name), PROGRAMS[name](vocabulary, *files[1:])
    size = sum(map(len, texts))
    if task == "encode":
        return run_encode(program, texts)
    if task == "short":
        text = texts[0].decode()[5000:5100]
        repeated(lambda: [program.short(text) for _ in range(2000)], 1)
        seconds = repeated(lambda: [program.short(text) for _ in range(2000)], 5)
        return {"seconds": {"": [s / 2000 for s in seconds]}}
    if task == "lines":
        characters = b"".join(texts).decode()[:LINES_BYTES]
        lines = [characters[start : start + 100] for start in range(0, len(characters), 100)]
        run, size = lambda: program.lines(lines), len(characters.encode())
    elif task in ("decode", "decodelist"):
        ids: Any = np.concatenate([np.asarray(program.encode(text), np.uint32) for text in texts[:20]])
        ids = ids.astype(np.uint16) if ids.max() < 1 << 16 else ids
        ids = ids[: LINES_BYTES // 4].tolist() if task == "decodelist" else ids
        size = len(program.decode(ids))
        run = lambda: program.decode(ids)  # noqa: E731
    elif task == "file":
        run = lambda: program.encode_file(files[0], num_threads)  # noqa: E731
    else:  # each program gets the form that it encodes in parallel
        inputs = b"".join(texts) if name == "ours" else texts
        run = lambda: program.encode_all(inputs, num_threads)  # noqa: E731
    run()
    return {"seconds": {"": repeated(run, 5)}, "bytes": size}


if __name__ == "__main__":
    name, task, vocabulary, num_threads, *files = sys.argv[1:]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(num_threads)])
    print(json.dumps(main(name, task, vocabulary, int(num_threads), list(map(Path, files)))))
