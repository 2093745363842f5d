"""Decode: copy the bytes of one token after the other, eight at a time."""

from __future__ import annotations

import numpy as np

from basic.bpe.kernels.instructions import U64, kernel, load8, store8

_BLOCK_IDS = 1 << 20  # decoded at a time, so that the temporary arrays are small


@kernel
def _copy_tokens(ids, data, starts, lengths, out):
    """Write the bytes of tokens, and up to seven bytes after the last one."""
    offset_out = U64(0)
    for i in range(len(ids)):
        start, length = U64(starts[ids[i]]), U64(lengths[ids[i]])
        # Almost all tokens have at most eight bytes: one copy without a branch.
        store8(out, offset_out, load8(data, start))
        for k in range(U64(8), length, U64(8)):
            store8(out, offset_out + k, load8(data, start + k))
        offset_out += length


class TokenBytes:
    """The bytes of all tokens in one array.

    Args:
        tokens: id to bytes.
    """

    def __init__(self, tokens: dict[int, bytes]) -> None:
        ids = np.array(list(tokens), np.int64)
        self._lengths = np.full(ids.max(initial=-1) + 1, -1, np.int64)
        self._lengths[ids] = [len(token) for token in tokens.values()]
        self._starts = np.zeros(len(self._lengths), np.int64)
        self._starts[ids] = np.cumsum([0, *map(len, tokens.values())])[:-1]
        self._data = np.frombuffer(b"".join([*tokens.values(), bytes(8)]), np.uint8)

    def decode(self, ids: np.ndarray) -> bytes | None:
        """The bytes of integer ids, or None if an id is not in the vocabulary."""
        blocks = []
        for start in range(0, len(ids), _BLOCK_IDS):
            block = ids[start : start + _BLOCK_IDS]
            if block.min() < 0 or block.max() >= len(self._lengths) or self._lengths[block].min() < 0:
                return None
            num_bytes = int(self._lengths[block].sum())
            out = np.empty(num_bytes + 8, np.uint8)
            _copy_tokens(block.astype(np.int64), self._data, self._starts, self._lengths, out)
            blocks.append(out[:num_bytes])
        return b"".join(block_bytes.data for block_bytes in blocks)
