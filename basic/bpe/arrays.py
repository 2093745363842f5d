"""What the modules of byte-pair encoding hand to each other: arrays of bytes, ids and counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

# A vocabulary beyond this does not fit the encoder's table of merges (see ID_BITS and RANK_BITS there).
MAX_VOCAB_SIZE = (1 << 21) - 1
MAX_SYMBOLS = (1 << 31) - 1  # bytes and words that training numbers with 32 bits

Chunk = tuple[np.ndarray, int, int]  # read-only bytes, start, stop


class InvalidByteError(ValueError):
    """A byte that is not UTF-8, or that no token of the vocabulary is.

    Attributes:
        offset: its index in the data.
        lacks_token: whether it is the second.
    """

    def __init__(self, offset: int, lacks_token: bool = False) -> None:
        super().__init__(offset)
        self.offset, self.lacks_token = offset, lacks_token


class PretokenCounts(NamedTuple):
    """Distinct words and how often each is there.

    Attributes:
        data: the bytes of all words, one after the other (uint8).
        starts: where each begins, and the end of the last (int64).
        counts: of each (int64).
    """

    data: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    @classmethod
    def from_counts(cls, counts: Mapping[bytes, int]) -> PretokenCounts:
        """The words of a mapping."""
        starts = np.zeros(len(counts) + 1, np.int64)
        np.cumsum([len(word) for word in counts], out=starts[1:])
        return cls(np.frombuffer(b"".join(counts), np.uint8), starts, np.array(list(counts.values()), np.int64))

    def to_counter(self) -> Counter[bytes]:
        """The words as a counter."""
        data, starts = self.data.tobytes(), self.starts.tolist()
        words = (data[start:stop] for start, stop in pairwise(starts))
        return Counter(dict(zip(words, self.counts.tolist(), strict=True)))


def bytes_array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def special_token_arrays(tokens: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Special tokens for the scanner, the longest first: bytes, starts, and the bytes that they begin with."""
    starts = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    first_bytes = np.array(sorted({token[0] for token in tokens}), np.uint8)
    return bytes_array(b"".join(tokens)), starts, first_bytes
