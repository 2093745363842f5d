"""Documents packed into rows: which tokens are the row of a batch if every row has complete documents only.

A document of n tokens has n inputs, each with the token after it as its target; the last target is the token that
follows the document, usually the separator. Documents with more inputs than a row are cut into several, of which only
the last may share a row with others. Rows that are not full end with padding.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from basic.tokens.index import Tokens
from basic.tokens.info import BEGINS_DOCUMENT
from basic.tokens.shuffled_order import epoch_keys, permute

_CHUNK_TOKENS = 1 << 22


def chunks(count: int) -> Iterator[slice]:
    """Slices in which so many tokens are read, however many there are."""
    return (slice(start, start + _CHUNK_TOKENS) for start in range(0, count, _CHUNK_TOKENS))


def find_documents(tokens: Tokens, separator_id: int | None, mask: np.ndarray | None) -> np.ndarray:
    """Return the positions at which documents begin, int64, ascending: as the mask says, or else at each separator.

    Args:
        tokens: one-dimensional integer array of token ids, may be a memory map.
        separator_id: id of the token before (or between) documents.
        mask: of the tokens, see `basic.tokens.info.mask_path`; None if there is none.
    """
    positions = [np.empty(0, np.int64)]
    for chunk in chunks(len(tokens)):
        begins = tokens[chunk] == separator_id if mask is None else mask[chunk] & BEGINS_DOCUMENT > 0
        positions.append(chunk.start + np.flatnonzero(begins))
    return np.concatenate(positions)


class PackedDocuments:
    """The rows of packed documents, each once an epoch, in an order that is shuffled for every epoch.

    Which documents share a row is the same in all epochs: no document sees another, so it does not matter.

    Args:
        starts: positions at which documents begin, ascending. Tokens before the first are a document too.
        seed: >= 0; other seeds give other orders.
    """

    def __init__(self, starts: np.ndarray, num_tokens: int, context_length: int, seed: int):
        self.context_length, self.seed = context_length, seed
        bounds = np.unique(np.concatenate([[0], starts, [num_tokens - 1]]))  # the last token is a target only
        lengths = np.diff(bounds)
        num_pieces = -(-lengths // context_length)
        offsets = np.arange(num_pieces.sum()) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
        self._starts = np.repeat(bounds[:-1], num_pieces) + offsets * context_length
        self._lengths = np.minimum(np.repeat(bounds[1:], num_pieces) - self._starts, context_length)
        rows = pack(self._lengths, context_length)
        self.num_rows = int(rows.max(initial=-1)) + 1
        order = np.argsort(rows, kind="stable")
        self._starts, self._lengths = self._starts[order], self._lengths[order]
        self._row_bounds = np.searchsorted(rows[order], np.arange(self.num_rows + 1))

    def rows(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows with these numbers, counted from 0 through all epochs.

        Returns:
            The position of each input, and the index in its row at which its document begins; both are int64
            (rows, context_length). Padding has the position -1, and is a document of its own.
        """
        epochs, numbers = np.divmod(sequences, self.num_rows)
        positions = np.full((len(sequences), self.context_length), -1, np.int64)
        document_starts = np.empty_like(positions)
        for epoch in np.unique(epochs):
            _, keys = epoch_keys(self.seed, int(epoch))
            numbers[epochs == epoch] = permute(numbers[epochs == epoch], self.num_rows, keys)
        for index, row in enumerate(numbers):
            documents = slice(self._row_bounds[row], self._row_bounds[row + 1])
            lengths = self._lengths[documents]
            ends = np.cumsum(lengths)
            begins, length = np.repeat(ends - lengths, lengths), ends[-1]
            positions[index, :length] = np.repeat(self._starts[documents], lengths) + np.arange(length) - begins
            document_starts[index, :length], document_starts[index, length:] = begins, length
        return positions, document_starts


def pack(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the row of each document, so that few rows hold them all (best-fit decreasing).

    From the longest to the shortest, each goes into the fullest row that has room for it. Documents of one length are
    placed together: a row that is the fullest for the first of them is the fullest for the next too, until it is full.

    Args:
        lengths: 1 to `capacity`.

    Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling", algorithm 1.

    Examples:
        >>> pack(np.array([2, 5, 3, 1]), capacity=5).tolist()
        [1, 0, 1, 2]
    """
    rows = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(-lengths, return_counts=True)
    with_room: dict[int, list[np.ndarray]] = {}  # rows by how many more tokens they have room for
    first, num_rows = 0, 0
    for size, count in zip((-sizes).tolist(), counts.tolist(), strict=True):
        waiting = order[first : first + count]
        first += count
        for room in [*sorted(room for room in with_room if room >= size), capacity]:
            if len(waiting) == 0:
                break
            per_row = room // size
            if room in with_room:
                candidates = np.concatenate(with_room.pop(room))
            else:
                candidates = np.arange(num_rows, num_rows + -(-len(waiting) // per_row))
                num_rows += len(candidates)
            chosen = np.repeat(candidates, per_row)[: len(waiting)]
            rows[waiting[: len(chosen)]] = chosen
            waiting = waiting[len(chosen) :]
            num_full = len(chosen) // per_row
            others = {room - per_row * size: candidates[:num_full], room: candidates[-(-len(chosen) // per_row) :]}
            if rest := len(chosen) % per_row:
                others[room - rest * size] = candidates[num_full : num_full + 1]
            for left, which in others.items():
                if left and len(which):
                    with_room.setdefault(left, []).append(which)
    return rows
