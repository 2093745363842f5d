"""Run one task of one program on one text in this process; prints the times and the outputs as JSON.

Called by tokenizer.py. A time is from the text in memory (bytes if the program accepts them, else a string) to the ids
in memory. Training and `file` start from a file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from basic.bytes_utils import load_merges, load_vocab

END = "<|endoftext|>"
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
SLOW_PEERS_BYTES = 4_000_000  # text for programs without a pre-token cache, whose speed does not depend on the size


def documents(path: Path, program: str) -> list[bytes]:
    """Split the text at line ends into documents of about a megabyte."""
    data, result, start = path.read_bytes(), [], 0
    if program in ("tiktoken", "tokenizers"):
        data = data[: data.find(b"\n", SLOW_PEERS_BYTES) + 1 or None]
    while start < len(data):
        stop = data.find(b"\n", start + 1_000_000) + 1 or len(data)
        result.append(data[start:stop])
        start = stop
    return result


class Ours:
    def __init__(self, folder: Path) -> None:
        from basic.Tokenizer import Tokenizer

        paths = folder / "gpt2_vocab.json", folder / "gpt2_merges.txt"
        self.tokenizer = Tokenizer.from_files(*paths, [END], kernels=True)
        self.encode(b"loads the kernels")
        self.tokenizer._kernel_encoder._idle.clear()  # an empty cache

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
    def train(path: Path, vocab_size: int, num_threads: int) -> list[tuple[bytes, bytes]]:
        from basic.train_bpe import train_bpe

        return train_bpe(path, vocab_size, [END], num_workers=num_threads)[1]


class OursAsItComes(Ours):
    """Without the kernels made ready before: what a new process has."""

    def __init__(self, folder: Path) -> None:
        from basic.Tokenizer import Tokenizer

        self.tokenizer = Tokenizer.from_files(folder / "gpt2_vocab.json", folder / "gpt2_merges.txt", [END])


class Gigatoken:
    def __init__(self, folder: Path) -> None:
        import gigatoken

        ranks = load_vocab(folder / "gpt2_vocab.json")
        with tempfile.NamedTemporaryFile("w", suffix=".tiktoken") as file:
            file.writelines(f"{base64.b64encode(ranks[i]).decode()} {i}\n" for i in range(50256))
            file.flush()
            self.tokenizer = gigatoken.gigatoken_rs.BPETokenizer.from_tiktoken(file.name, "gpt2", {END: 50256})

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

    def lines(self, lines: list[str]) -> Any:
        return [self.tokenizer.encode(line) for line in lines]

    @staticmethod
    def train(path: Path, vocab_size: int, num_threads: int) -> list[tuple[bytes, bytes]]:
        import gigatoken

        return gigatoken.train_bpe(path, vocab_size, [END])[1]


class Tiktoken:
    def __init__(self, folder: Path) -> None:
        import tiktoken

        ranks = {token: i for i, token in load_vocab(folder / "gpt2_vocab.json").items() if i != 50256}
        self.encoding = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: 50256})

    def encode(self, document: bytes) -> Any:
        return self.encoding.encode_to_numpy(document.decode(), allowed_special="all")

    def short(self, text: str) -> list[int]:
        return self.encoding.encode(text, allowed_special="all")

    def decode(self, ids: Any) -> Any:
        return self.encoding.decode_bytes(ids)

    def lines(self, lines: list[str]) -> Any:
        return [self.encoding.encode(line, allowed_special="all") for line in lines]


class Tokenizers:
    def __init__(self, folder: Path) -> None:
        import tokenizers

        self.tokenizer = tokenizers.ByteLevelBPETokenizer(
            str(folder / "gpt2_vocab.json"), str(folder / "gpt2_merges.txt")
        )

    def encode(self, document: bytes) -> Any:
        return self.tokenizer.encode(document.decode()).ids

    def short(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    @staticmethod
    def train(path: Path, vocab_size: int, num_threads: int) -> list[tuple[bytes, bytes]]:
        from tokenizers import ByteLevelBPETokenizer

        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train([str(path)], vocab_size, 0, False, [END])
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_model(folder)
            return load_merges(Path(folder) / "merges.txt")


class Rustbpe:
    @staticmethod
    def train(path: Path, vocab_size: int, num_threads: int) -> list[tuple[bytes, bytes]]:
        import rustbpe

        tokenizer = rustbpe.Tokenizer()
        # It takes an iterator of strings; its documentation uses lines.
        with open(path, encoding="utf-8", newline="") as file:
            tokenizer.train_from_iterator(file, vocab_size - 1, pattern=PATTERN)
        return []  # it returns tokens, not the pairs that they were merged from


PROGRAMS = {"ours": Ours, "gigatoken": Gigatoken, "tiktoken": Tiktoken, "tokenizers": Tokenizers, "rustbpe": Rustbpe}


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def digest(ids: list[Any]) -> str:
    return hashlib.sha256(b"".join(np.asarray(array, np.uint32).tobytes() for array in ids)).hexdigest()[:16]


def main(name: str, task: str, path: Path, folder: Path, num_threads: int, repeats: int) -> dict[str, Any]:
    program = PROGRAMS[name]
    if task.startswith("train"):
        vocab_size = int(task.removeprefix("train"))
        if name == "ours":
            from basic.bpe import loading

            loading.load_kernels("training")
        runs = [timed(program.train, path, vocab_size, num_threads) for _ in range(repeats)]
        return {"seconds": [s for s, _ in runs], "merges": [[x.hex(), y.hex()] for x, y in runs[0][1]]}
    if task == "short":
        tokenizer, text = program(folder), path.read_text(encoding="utf-8")[5000:5100]
        run = lambda: [tokenizer.short(text) for _ in range(2000)]  # noqa: E731
        run()
        return {"seconds": [timed(run)[0] / 2000 for _ in range(repeats)], "bytes": 100}
    if task.startswith("fresh"):  # the first three calls of this process
        text = path.read_text(encoding="utf-8")[: int(task.removeprefix("fresh"))]
        tokenizer = (OursAsItComes if name == "ours" else program)(folder)
        return {"seconds": [timed(tokenizer.short, text)[0] for _ in range(3)], "bytes": len(text)}
    texts = documents(path, name)
    size = sum(map(len, texts))
    if task == "cold":
        seconds = []
        for _ in range(repeats):
            tokenizer = program(folder)
            elapsed_s, ids = timed(lambda t: [t.encode(text) for text in texts], tokenizer)
            seconds.append(elapsed_s)
        return {"seconds": seconds, "bytes": size, "ids": digest(ids)}
    tokenizer = program(folder)
    if task == "warm":
        run = lambda: [tokenizer.encode(text) for text in texts]  # noqa: E731
    elif task == "lines":
        characters = b"".join(texts).decode(errors="ignore")[:SLOW_PEERS_BYTES]
        lines = [characters[start : start + 100] for start in range(0, len(characters), 100)]
        run, size = lambda: tokenizer.lines(lines), len(characters.encode())
    elif task in ("decode", "decodelist"):
        ids: Any = np.concatenate([np.asarray(tokenizer.encode(text), np.uint32) for text in texts]).astype(np.uint16)
        ids = ids[: SLOW_PEERS_BYTES // 4].tolist() if task == "decodelist" else ids
        size = len(tokenizer.decode(ids))
        run = lambda: tokenizer.decode(ids)  # noqa: E731
    elif task == "file":
        run = lambda: tokenizer.encode_file(path, num_threads)  # noqa: E731
    else:  # each program gets the form that it encodes in parallel
        inputs = b"".join(texts) if name == "ours" else texts
        run = lambda: tokenizer.encode_all(inputs, num_threads)  # noqa: E731
    run()
    runs = [timed(run) for _ in range(repeats)]
    result = {"seconds": [s for s, _ in runs], "bytes": size}
    return {**result, "ids": digest(runs[0][1])} if task == "warm" else result


if __name__ == "__main__":
    name, task, path, folder, num_threads, repeats = sys.argv[1:]
    os.environ["RAYON_NUM_THREADS"] = num_threads
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(num_threads)])
    print(json.dumps(main(name, task, Path(path), Path(folder), int(num_threads), int(repeats))))
