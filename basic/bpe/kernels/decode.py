"""Decoding: the bytes of one token after the other, eight at a time."""

from __future__ import annotations

import numpy as np

from basic.bpe.kernels.instructions import U64, kernel, load8, store8

_BLOCK = 1 << 20  # ids at a time, so that what is worked out about them is small


@kernel
def _copy_tokens(ids, data, starts, lengths, out):
    """Write the bytes of tokens, up to seven beyond the last."""
    to = U64(0)
    for i in range(len(ids)):
        start, length = U64(starts[ids[i]]), U64(lengths[ids[i]])
        # Nearly all tokens are of at most eight bytes: one copy without a question.
        store8(out, to, load8(data, start))
        for k in range(U64(8), length, U64(8)):
            store8(out, to + k, load8(data, start + k))
        to += length


class TokenBytes:
    """The bytes of all tokens, one after the other.

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
        """The bytes of integer ids, None where one of them is no token's."""
        parts = []
        for begin in range(0, len(ids), _BLOCK):
            block = ids[begin : begin + _BLOCK]
            if block.min() < 0 or block.max() >= len(self._lengths) or self._lengths[block].min() < 0:
                return None
            num_bytes = int(self._lengths[block].sum())
            out = np.empty(num_bytes + 8, np.uint8)
            _copy_tokens(block.astype(np.int64), self._data, self._starts, self._lengths, out)
            parts.append(out[:num_bytes])
        return b"".join(part.data for part in parts)
