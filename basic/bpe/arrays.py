"""The arrays that the modules of byte-pair encoding exchange, and their limits."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from basic.common.errors import InvalidInputError, utf8_error

# A larger vocabulary does not fit the hash table of merges (ID_BITS and RANK_BITS in kernels/merges/apply_merges.py).
MAX_VOCAB_SIZE = (1 << 21) - 1
# Merging a pre-token takes up to fifty bytes of memory a byte. Text has none as long as this.
MAX_PRETOKEN_BYTES = 1 << 24
MAX_SYMBOLS = (1 << 31) - 1  # bytes and pre-tokens, which training numbers with 32 bits

Chunk = tuple[np.ndarray, int, int]  # read-only bytes, start, stop


def describe_long_pretoken(beginning: str, where: str = "the text") -> str:
    """The message for a pre-token of more than `MAX_PRETOKEN_BYTES`."""
    return (
        f"{where} has a pre-token (letters, digits, other signs or white space without an end) of more than "
        f"{MAX_PRETOKEN_BYTES} bytes, the limit: {beginning!r}; divide it, for example with spaces"
    )


class InvalidByteError(ValueError):
    """A byte that is not UTF-8, or that has no token, or that begins a pre-token that is too long to merge."""

    def __init__(self, offset: int, problem: Literal["not UTF-8", "no token", "too long"] = "not UTF-8") -> None:
        super().__init__(offset)
        self.offset, self.problem = offset, problem

    def described(self, name: str | os.PathLike, data: np.ndarray, start: int = 0) -> InvalidInputError:
        """The error for the user.

        Args:
            name: of the text.
            data: the bytes that have the wrong one.
            start: the byte offset of the data in the text.
        """
        offset, rest = start + self.offset, data[self.offset : self.offset + 40].tobytes()
        if self.problem == "too long":
            where = f"{os.fspath(name)!r}, at byte offset {offset},"
            return InvalidInputError(describe_long_pretoken(rest.decode(errors="replace"), where))
        if self.problem == "no token":
            return InvalidInputError(
                f"the vocabulary has no token for the byte 0x{rest[0]:02x}, at byte offset {offset} of "
                f"{os.fspath(name)!r}; encode with errors='replace', or train a tokenizer with all 256 bytes"
            )
        try:
            rest[:4].decode()
        except UnicodeDecodeError as error:
            return utf8_error(name, offset, rest[0], error.reason)
        raise AssertionError(f"the bytes at {self.offset} are UTF-8")


class PretokenCounts(NamedTuple):
    """Pre-tokens and their counts.

    Attributes:
        data: the bytes of all pre-tokens, without separators (uint8).
        starts: the offset at which each pre-token starts, and the end of the last one (int64).
        counts: of each pre-token (int64).
    """

    data: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    @classmethod
    def from_counts(cls, counts: Mapping[bytes, int]) -> PretokenCounts:
        """Convert a mapping from pre-tokens to counts."""
        return cls(*joined_bytes(counts), np.array(list(counts.values()), np.int64))

    def to_counter(self) -> Counter[bytes]:
        """Convert distinct pre-tokens to a counter."""
        data, starts = self.data.tobytes(), self.starts.tolist()
        pretokens = (data[start:stop] for start, stop in pairwise(starts))
        return Counter(dict(zip(pretokens, self.counts.tolist(), strict=True)))


def bytes_array(data: bytes) -> np.ndarray:
    """The bytes as a read-only uint8 array."""
    return np.frombuffer(data, np.uint8)


def joined_bytes(strings: Collection[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of all strings in one array (uint8), and where each starts, with the end of the last one (int64)."""
    starts = np.zeros(len(strings) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, strings), np.int64, len(strings)), out=starts[1:])
    return bytes_array(b"".join(strings)), starts
