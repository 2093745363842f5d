"""Compare the ids of published tokenizers with tiktoken's or those of `tokenizers`, on millions of random strings.

    uv run --group bench local/bench/tokenizer_exactness.py --real FOLDER --strings 1000000

FOLDER has rank files (*.tiktoken, *.model: compared with tiktoken) and folders with a tokenizer.json (compared with the
package `tokenizers`). Each tokenizer gets as many strings of each kind, and every code point between neighbors of each
class. The strings are also joined, and encoded by threads and as a stream. Every text of --data is encoded as well.

Characters that the other program's Unicode classifies otherwise are left out, and counted. The status is 1 if any ids
differ.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import regex
import tiktoken
import tokenizers
import tyro
from tiktoken.load import load_tiktoken_bpe

from basic.common.errors import InvalidInputError
from basic.Tokenizer import Tokenizer

STRINGS_AT_A_TIME = 25_000
TEXT_CHARACTERS = 1_000_000
CLASSES = [f"\\p{{{name}}}" for name in ("L", "Lu", "Ll", "Lt", "Lm", "Lo", "M", "N", "P", "S")] + [r"\s"]
ALL = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
# One or more characters of each class, and those that patterns treat in their own way.
TRICKY = [
    *"azAZsStTmMdDlL09'\u2019!/-_.,;()#\"\u00e9\u0301\u0308\u200d\u01c5\u02b0\u00aa\u4e2d\u65e5\u3042\u0e01\u0e31"
]
TRICKY += [*"\u0939\u093f\u0661\u00b2\u2167\U0001d4b3\U0001f600"]
SPACES = [*"  \t\n\r\x0b\x0c\x1c\x85\xa0\u2003\u2028\u3000", "  ", "\r\n", "\n\n"]
ENDINGS = [
    "s",
    "S",
    "\u017f",
    "t",
    "T",
    "re",
    "RE",
    "rE",
    "ve",
    "VE",
    "m",
    "M",
    "ll",
    "LL",
    "lL",
    "d",
    "D",
    "\u212a",
    "k",
]
SCRIPTS = (0x3041, 0x30FF), (0x4E00, 0x9FA5), (0xE01, 0xE3A), (0x905, 0x94D), (0xAC00, 0xD7A3), (0x621, 0x64A)
NEIGHBORS = ("a", "A", "1", " ", "\n", "'", "!", "\u4e2d", "\u0301", "\u01c5", "'s", " \r\n")


@dataclass(frozen=True, kw_only=True)
class Options:
    real: Path
    """Folder with rank files and with folders that have a tokenizer.json."""
    strings: int = 1_000_000
    """Random strings of each kind for each tokenizer."""
    data: Path = Path(__file__).resolve().parents[3] / "shared" / "data"
    """Folder with texts (*.txt) and naughty_strings.json."""
    text_bytes: int | None = None
    """The number of bytes of each text that are compared; by default all."""
    only: tuple[str, ...] = ()
    """Compare only tokenizers whose name contains one of these."""
    sweep_step: int = 1
    """Compare every so many-th code point between its neighbors."""
    processes: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Compared:
    """A tokenizer of ours, and the same one of another program."""

    def __init__(self, path: Path) -> None:
        self.ours = Tokenizer.load(path)
        special = self.ours.special_token_ids
        if path.is_dir():
            other = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
            self.encode: Callable[[str], list[int]] = lambda text: other.encode(text, add_special_tokens=False).ids
            self.matches = lambda pattern, text: tokenizers.pre_tokenizers.Split(
                tokenizers.Regex(pattern), "removed"
            ).pre_tokenize_str(text)
        else:
            ranks, pattern = load_tiktoken_bpe(str(path)), self.ours.compiled_pattern.splits[0]
            encoding = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
            self.encode = lambda text: encoding.encode(text, allowed_special="all")
        present = set(self.ours.vocab.values())
        self.missing = bytes(byte for byte in range(0xF5) if byte not in (0xC0, 0xC1) and bytes([byte]) not in present)
        self.unknown = self._characters_of_another_class(path.is_dir())
        self.known = [character for character in ALL if character not in self.unknown]

    def _characters_of_another_class(self, by_tokenizers: bool) -> set[str]:
        """Characters in other classes there than here, or without a class; those that are not normalized the same."""
        text, different = "".join(ALL), set()
        byte_ranks = {bytes([byte]): byte for byte in range(256)}
        for pattern in CLASSES:
            ours = set(regex.findall(pattern, text))
            if by_tokenizers:
                split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(f"[^{pattern}]"), "removed")
                theirs = set("".join(part for part, _ in split.pre_tokenize_str(text)))
            else:
                encoding = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=byte_ranks, special_tokens={})
                theirs = set(bytes(encoding.encode_ordinary(text)).decode())
            different |= ours ^ theirs
        if by_tokenizers:
            nfc = tokenizers.normalizers.NFC()
            # Beside marks of the highest and the lowest class, a mark shows the class that it has there.
            for text in (f"{before}{c}{after}" for c in ALL for before, after in (("", ""), ("\u0345", "\u0334"))):
                if nfc.normalize_str(text) != unicodedata.normalize("NFC", text):
                    different.add(text.strip("\u0345\u0334") or text)
        return different

    @cached_property
    def alphabets(self) -> dict[str, list[str]]:
        """What the random strings of each kind are made of."""
        digits = [c for c in self.known if unicodedata.category(c)[0] == "N"]
        scripts = [chr(code) for low, high in SCRIPTS for code in range(low, high) if chr(code) not in self.unknown]
        special = list(self.ours.special_token_ids)
        beginnings = [token[:end] for token in special[:20] for end in range(1, len(token))]
        return {
            "any characters": [c for c in self.known if not self.lacks_bytes(c)],
            "classes": TRICKY + SPACES,
            "contractions": [*"aZ1 \u00e9'\u2019!", "'", "'", "'", *ENDINGS],
            "digits": [*digits[::3], *"0123456789" * 20, *[*"a ,.", "\n"] * 30],
            "scripts": [*scripts[::7], *[*" \u3001\u3002a1!", "\u0301", "\n"] * 100],
            "white space": [*SPACES * 2, *"aA1!/.'", "\u0301", "\u4e2d", "--", ");", "*/"],
            "special tokens": [*special, *special[:5] * 20, *beginnings, *(TRICKY + SPACES) * 4],
        }

    def check(self, text: str, encodings: tuple[Callable[[str], Any], ...]) -> str:
        """Compare the ids of a text; returns "equal", "refused" (it has a byte without a token), or a difference."""
        changed = unicodedata.normalize("NFC", text) if self.ours.settings.normalizer else text
        if self.lacks_bytes(changed):
            try:
                self.ours.encode(text)
            except InvalidInputError:
                return "refused"
            return f"not refused: {text!r}"
        theirs = self.encode(text)
        for number, encode in enumerate(encodings):
            if (ours := list(encode(text))) != theirs:
                return f"way {number}: {text[:200]!r}: {ours[:50]}, not {theirs[:50]}"
        return "equal" if self.ours.decode(theirs) == changed else f"not decoded: {text[:200]!r}"

    def lacks_bytes(self, text: str) -> bool:
        return bool(self.missing) and any(byte in self.missing for byte in text.encode())

    def check_all(self, strings: list[str]) -> Counter[str]:
        encode, results = (self.ours.encode,), Counter()
        for text in strings:
            results[self.check(text, encode)] += 1
        ways = self.ours.encode, lambda text: self.ours.encode_array(text, num_threads=3).tolist(), self._encode_pieces
        for start in range(0, len(strings), 500):
            joined = "".join(strings[start : start + 500])
            results["joined, " + self.check("".join(c for c in joined if not self.lacks_bytes(c)), ways)] += 1
        return results

    def _encode_pieces(self, text: str) -> Iterator[int]:
        return self.ours.encode_iterable(text[start : start + 7] for start in range(0, len(text), 7))


def strings_of(kind: str, compared: Compared, rng: random.Random, count: int, texts: list[str]) -> Iterator[str]:
    for _ in range(count):
        if kind == "real texts":
            text = rng.choice(texts)
            start = rng.randrange(len(text))
            yield "".join(c for c in text[start : start + rng.randint(1, 60)] if c not in compared.unknown)
        else:
            yield "".join(rng.choices(compared.alphabets[kind], k=rng.randint(1, 14)))


KINDS = (
    "any characters",
    "classes",
    "contractions",
    "digits",
    "scripts",
    "white space",
    "special tokens",
    "real texts",
)


@cache
def compared_of(path: Path) -> Compared:
    return Compared(path)


@cache
def real_texts(folder: Path) -> list[str]:
    return [path.read_bytes()[:2_000_000].decode(errors="ignore") for path in sorted(folder.glob("*.txt"))]


def run(path: Path, kind: str, number: int, options: Options) -> tuple[Counter[str], int]:
    """One task; returns the results, and the number of characters that are left out."""
    compared = compared_of(path)
    if kind == "code points":
        block = compared.known[number * STRINGS_AT_A_TIME : (number + 1) * STRINGS_AT_A_TIME : options.sweep_step]
        strings = ["".join(f"{neighbor}{c}{neighbor}" for neighbor in NEIGHBORS) + c for c in block]
    elif kind == "texts":
        results = Counter()
        paths = sorted(options.data.glob("*.txt"))
        ways = compared.ours.encode, lambda text: compared.ours.encode_array(text, num_threads=2).tolist()
        for text_path in paths[number : number + 1]:
            text = text_path.read_bytes()[: options.text_bytes].decode(errors="ignore")
            text = "".join(c for c in text if c not in compared.unknown) if compared.unknown & set(text) else text
            # In parts, because `tokenizers` needs hundreds of bytes of memory for a token.
            for start in range(0, len(text), TEXT_CHARACTERS):
                results[compared.check(text[start : start + TEXT_CHARACTERS], ways)] += 1
        if number == len(paths):
            results += compared.check_all(json.loads((options.data / "naughty_strings.json").read_bytes()))
        return results, len(compared.unknown)
    else:
        rng = random.Random(f"{path.name} {kind} {number}")
        count = min(STRINGS_AT_A_TIME, options.strings - number * STRINGS_AT_A_TIME)
        strings = list(strings_of(kind, compared, rng, count, real_texts(options.data)))
    return compared.check_all(strings), len(compared.unknown)


def main(options: Options) -> int:
    paths = [path for path in sorted(options.real.iterdir()) if not options.only or path.name in options.only]
    number_of = dict.fromkeys(KINDS, -(-options.strings // STRINGS_AT_A_TIME))
    number_of |= {"code points": -(-len(ALL) // STRINGS_AT_A_TIME), "texts": len(list(options.data.glob("*.txt"))) + 1}
    start, different, total = time.monotonic(), 0, 0
    print("| tokenizer | kind | equal | refused, a byte has no token | joined texts equal | different |")
    print("|---|---|---|---|---|---|")
    with ProcessPoolExecutor(options.processes) as executor:
        # All tasks of one tokenizer follow each other, so that few are in memory.
        futures = {
            (path, kind): [executor.submit(run, path, kind, number, options) for number in range(count)]
            for path in paths
            for kind, count in number_of.items()
        }
        for (path, kind), parts in futures.items():
            results, left_out = Counter(), 0
            for part in parts:
                counts, left_out = part.result()
                results += counts
            equal, refused = results.pop("equal", 0), results.pop("refused", 0)
            joined = results.pop("joined, equal", 0) + results.pop("joined, refused", 0)
            name = f"{path.name} (without {left_out:,} characters)" if kind == KINDS[0] else path.name
            print(f"| {name} | {kind} | {equal:,} | {refused:,} | {joined:,} | {results.total()} |", flush=True)
            for difference in list(results)[:3]:
                print(f"    {difference}", flush=True)
            different, total = different + results.total(), total + equal
    print(f"\n{total:,} equal, {different:,} different, in {time.monotonic() - start:.0f} s")
    return different > 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
