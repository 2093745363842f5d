"""The arrays that the modules of byte-pair encoding exchange, and their limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np

# A larger vocabulary does not fit the hash table of merges (ID_BITS and RANK_BITS in kernels/merges/apply_merges.py).
MAX_VOCAB_SIZE = (1 << 21) - 1
# Merging a pre-token takes up to fifty bytes of memory a byte. Text has none as long as this.
MAX_PRETOKEN_BYTES = 1 << 24
MAX_SYMBOLS = (1 << 31) - 1  # bytes and pre-tokens, which training numbers with 32 bits

Chunk = tuple[np.ndarray, int, int]  # read-only bytes, start, stop


def describe_long_pretoken(beginning: str) -> str:
    """The message for a pre-token of more than `MAX_PRETOKEN_BYTES`."""
    return (
        "the text has a pre-token (letters, digits, other signs or white space without an end) of more than "
        f"{MAX_PRETOKEN_BYTES} bytes, the limit: {beginning!r}; divide it, for example with spaces"
    )


class InvalidByteError(ValueError):
    """A byte that is not UTF-8, or that has no token, or that begins a pre-token that is too long to merge.

    Attributes:
        max_pretoken_bytes: the limit, if the byte begins such a pre-token.
    """

    def __init__(self, offset: int, lacks_token: bool = False, max_pretoken_bytes: int | None = None) -> None:
        super().__init__(offset)
        self.offset, self.lacks_token, self.max_pretoken_bytes = offset, lacks_token, max_pretoken_bytes


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
