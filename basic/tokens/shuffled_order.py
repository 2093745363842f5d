"""A shuffled order of windows that needs no memory: a cipher permutes the numbers of the windows.

The order of 10**10 windows would be an array of 80 GB. A block cipher is a permutation of all numbers of some bits, and
each image is computed from its number alone. Numbers outside the range are enciphered again until they are inside.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6
"""Of the Feistel network; four are enough for a permutation that looks random to a program without the keys."""


class ShuffledWindows:
    """Non-overlapping windows of a token array, each once an epoch, in an order that is shuffled for every epoch.

    The windows of an epoch start at a random offset below their size, so another epoch cuts the text elsewhere.

    Args:
        num_tokens: of the array, at least context_length + 1.
        context_length: tokens per window, and from one window's start to the next.
    """

    def __init__(self, num_tokens: int, context_length: int, seed: int):
        self.context_length, self.seed = context_length, seed
        # As many as fit at every offset below context_length; a window needs one more token for its last target.
        self.num_windows = max(1, (num_tokens - context_length) // context_length)
        self._num_offsets = min(context_length, num_tokens - self.num_windows * context_length)

    def starts(self, sequences: np.ndarray) -> np.ndarray:
        """The start positions of sequences that are numbered from 0 through all epochs, int64."""
        epochs, numbers = np.divmod(sequences, self.num_windows)
        starts = np.empty(len(sequences), np.int64)
        for epoch in np.unique(epochs):
            offset, keys = epoch_keys(self.seed, int(epoch), self._num_offsets)
            windows = permute(numbers[epochs == epoch], self.num_windows, keys)
            starts[epochs == epoch] = offset + windows * self.context_length
        return starts


def epoch_keys(seed: int, epoch: int, num_offsets: int = 1) -> tuple[int, np.ndarray]:
    """A random offset below `num_offsets`, and the keys of the permutation of an epoch."""
    random = np.random.default_rng([seed, epoch])
    return int(random.integers(num_offsets)), random.integers(2**63, size=_ROUNDS, dtype=np.uint64)


def permute(numbers: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """The images of some numbers under a permutation of 0 .. size - 1 that the keys choose, int64.

    Source: Luby and Rackoff 1988 (Feistel networks as random permutations); Black and Rogaway 2002, "Ciphers with
    Arbitrary Finite Domains", method 2 (enciphering again).

    Examples:
        >>> keys = np.arange(6, dtype=np.uint64)
        >>> sorted(permute(np.arange(5), 5, keys).tolist())
        [0, 1, 2, 3, 4]
    """
    half_bits = max(1, (int(size - 1).bit_length() + 1) // 2)
    images = numbers.astype(np.uint64)
    outside = np.ones(len(images), bool)
    while outside.any():  # at most 4 numbers of the cipher a number of the range, so about 4 rounds
        images[outside] = _encipher(images[outside], np.uint64(half_bits), keys)
        outside = images >= size
    return images.astype(np.int64)


def _encipher(numbers: np.ndarray, half_bits: np.uint64, keys: np.ndarray) -> np.ndarray:
    """A Feistel network: each round adds a hash of one half to the other, which can be undone."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = numbers >> half_bits, numbers & mask
    for key in keys:
        left, right = right, left ^ (_hash(right ^ key) & mask)
    return (left << half_bits) | right


def _hash(numbers: np.ndarray) -> np.ndarray:
    """Mix the bits of 64-bit numbers. Source: Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators"."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
