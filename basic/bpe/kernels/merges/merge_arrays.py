"""The merges of a tokenizer as the arrays of `apply_merges`, and which merge makes each of its tokens.

tiktoken's rank files have no merges. Of all pairs with the bytes of a token, its rule joins one, which is found here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import chain

import numpy as np

from basic.bpe.arrays import joined_bytes
from basic.bpe.kernels.hash_table import EMPTY, I64, find_whole_bytes, new_table, whole_token_table
from basic.bpe.kernels.instructions import U64
from basic.bpe.kernels.merges.apply_merges import (
    ID_BITS,
    LINE_SLOTS,
    MAX_SCANNED_BYTES,
    NO_OFFSET,
    NO_RANK,
    ONE_AT_A_TIME,
    RANK_BITS,
    RESULT_OFFSET,
    STEP,
    MergeArrays,
    WholeTokens,
    bytes_to_ids,
    first_line,
    merge_once,
    new_buffers,
    start_pretoken,
)
from basic.bpe.plain import JoinedRanks, MergeRules
from basic.common.native.cache_files import kept_arrays
from basic.common.native.kernel import kernel
from basic.common.native.object_files import cache_folder

# The joins of at least so many tokens are kept in a file.
_MIN_KEPT_TOKENS = 1 << 14


@kernel
def _fill_slots(slots, lefts, rights, ranks):
    for i in range(len(ranks)):
        key = (U64(lefts[i]) << U64(ID_BITS)) | U64(rights[i])
        slot = first_line(slots, key) * U64(LINE_SLOTS)
        while slots[slot] != EMPTY:
            slot = (slot + U64(1)) & U64(len(slots) - 1)
        slots[slot] = (key << U64(RANK_BITS)) | U64(ranks[i] + 1)


@kernel
def _last_joins(data, starts, tokens, byte_ranks, parts, ranks, lasts):
    """Write the two ids that tiktoken's rule joins last in each token; -1 if it does not join all its bytes.

    The rule, as it is defined: of all neighbors whose joined bytes are a token, join those with the lowest id.

    Args:
        tokens: of `whole_token_table`, with all tokens.
        byte_ranks: the id of each pair of bytes, at the index 256 * left + right; NO_RANK if they are no token.
        parts, ranks: work memory: where the parts of a token start, and the rank of each with the next one.
    """
    for t in range(len(starts) - 1):
        start, stop = starts[t], starts[t + 1]
        lasts[0, t] = lasts[1, t] = -1
        n = stop - start
        for i in range(n):
            parts[i] = start + i
            ranks[i] = byte_ranks[256 * I64(data[start + i]) + I64(data[start + i + 1])] if i < n - 1 else NO_RANK
        parts[n] = stop
        while n > 2:
            best = 0
            for i in range(1, n - 1):
                if ranks[i] < ranks[best]:
                    best = i
            if ranks[best] == NO_RANK:
                break
            n -= 1
            for i in range(best + 1, n + 1):
                parts[i] = parts[i + 1]
                ranks[i] = ranks[i + 1] if i < n else NO_RANK
            if n > 2:
                for i in range(max(best - 1, 0), min(best + 1, n - 1)):
                    joined = find_whole_bytes(data, parts[i], parts[i + 2] - parts[i], tokens)
                    ranks[i] = joined if joined >= 0 else NO_RANK
        if n == 2:
            left = find_whole_bytes(data, start, parts[1] - start, tokens)
            right = find_whole_bytes(data, parts[1], stop - parts[1], tokens)
            if left >= 0 and right >= 0:
                lasts[0, t], lasts[1, t] = left, right


@kernel
def _last_merges(data, starts, merges, buffers, lasts):
    """Write the two ids that the last merge of each token joins: -1 if no merges produce it, -2 if it is too long."""
    symbols, right_of = buffers[0][0], buffers[0][3]
    for t in range(len(starts) - 1):
        start, length = starts[t], starts[t + 1] - starts[t]
        lasts[0, t] = lasts[1, t] = -1
        if length > MAX_SCANNED_BYTES:
            lasts[0, t] = -2
        elif length > 1 and bytes_to_ids(data, start, length, merges, symbols, 0) < 0:
            start_pretoken(data, start, length, merges, buffers, 0)
            num_left, left, right = length, 0, 0
            while num_left > 1:
                left, right = symbols[0], symbols[right_of[0]]  # of the last merge, when two are left
                if merge_once(length, merges, buffers, 0) == 0:
                    break
                num_left -= 1
            if num_left == 1:
                lasts[0, t], lasts[1, t] = left, right


def _token_arrays(tokens: Mapping[bytes, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bytes of tokens, the offset of each and the end, and their ids. No pre-token is an empty token."""
    if b"" in tokens:
        tokens = {token: token_id for token, token_id in tokens.items() if token}
    return *joined_bytes(tokens), np.fromiter(tokens.values(), np.int64, len(tokens))


def merges_as_arrays(rules: MergeRules) -> MergeArrays:
    """Convert merges to arrays; all ids must be less than 2**21 - 1, and the number of merges less than 2**22 - 2."""
    arrays = _token_arrays(rules.whole_tokens)
    whole_tokens = whole_token_table(*arrays)
    if isinstance(rules.ranks, JoinedRanks):
        every_token = whole_tokens
        if rules.ranks.ids is not rules.whole_tokens:  # some are special
            arrays = _token_arrays(rules.ranks.ids)
            every_token = None
        data, starts, ids = arrays
        if np.diff(starts).max(initial=0) <= MAX_SCANNED_BYTES:  # the search for a longer token's merge takes too long
            lasts = _kept_last_joins(data, starts, ids, every_token)
            # Of all pairs with the bytes of a token, merges join one: a table of these is small.
            kept = lasts[0] >= 0
            return _merge_arrays(rules, lasts[0, kept], lasts[1, kept], ids[kept], whole_tokens)
    ranks = dict(rules.ranks.items())
    pairs = np.fromiter(chain.from_iterable(ranks), np.int64, 2 * len(ranks)).reshape(-1, 2)
    numbers = np.fromiter(ranks.values(), np.int64, len(ranks))
    return _merge_arrays(rules, pairs[:, 0].copy(), pairs[:, 1].copy(), numbers, whole_tokens)


def _kept_last_joins(data: np.ndarray, starts: np.ndarray, ids: np.ndarray, tokens: WholeTokens | None) -> np.ndarray:
    """`last_joins`, of a large vocabulary from a file: it is half of what a tokenizer's tables cost."""

    def make() -> dict[str, np.ndarray]:
        table = whole_token_table(data, starts, ids) if tokens is None else tokens
        return {"lasts": last_joins(data, starts, ids, table).astype(np.int32)}

    folder = cache_folder() if len(ids) >= _MIN_KEPT_TOKENS else None
    digest = hashlib.sha256(data.tobytes() + starts.tobytes() + ids.tobytes()).hexdigest()
    return kept_arrays(folder and folder / f"joins.{digest[:32]}", make)["lasts"].astype(np.int64)


def last_joins(data: np.ndarray, starts: np.ndarray, ids: np.ndarray, tokens: WholeTokens) -> np.ndarray:
    """The left and the right id that tiktoken's rule joins last in each token, or -1; the ids are the ranks."""
    byte_ranks = np.full(256 * 256, NO_RANK, np.int64)
    pairs = np.diff(starts) == 2
    first = starts[:-1][pairs]
    byte_ranks[256 * data[first].astype(np.int64) + data[first + 1]] = ids[pairs]
    lasts = np.empty((2, len(ids)), np.int64)
    parts, ranks = np.empty((2, MAX_SCANNED_BYTES + 2), np.int64)
    _last_joins(data, starts, tokens, byte_ranks, parts, ranks, lasts)
    return lasts


def last_merges(merges: MergeArrays, data: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The left and the right id that the last merge of each token joins, if one merge is applied at a time.

    Args:
        starts: the offset of each token, and the end of the last one.

    Returns:
        Two rows. In the first, -1: merges do not produce the token; -2: it is longer than `MAX_SCANNED_BYTES`.
    """
    numbers = merges.numbers.copy()
    numbers[ONE_AT_A_TIME] = 1
    lasts = np.empty((2, len(starts) - 1), np.int64)
    _last_merges(data, starts, (merges.slots, numbers), new_buffers(MAX_SCANNED_BYTES + STEP), lasts)
    return lasts


def _merge_arrays(
    rules: MergeRules, lefts: np.ndarray, rights: np.ndarray, ranks: np.ndarray, whole_tokens: WholeTokens
) -> MergeArrays:
    slots = new_table(1 << max(2, (len(ranks) // 2).bit_length()))
    slots[:] = EMPTY
    _fill_slots(slots, lefts, rights, ranks)
    byte_ids = rules.byte_ids
    ids = np.full(258, -1, np.int32)
    ids[list(byte_ids)] = list(byte_ids.values())
    ids[ONE_AT_A_TIME] = rules.one_at_a_time
    byte_ranks = np.full((256, 256), NO_RANK, np.int32)
    largest = max(max(byte_ids.values(), default=0), int(lefts.max(initial=0)), int(rights.max(initial=0)))
    bytes_of = np.full(largest + 1, -1, np.int64)
    bytes_of[list(byte_ids.values())] = list(byte_ids)
    of_bytes = (bytes_of[lefts] >= 0) & (bytes_of[rights] >= 0)
    byte_ranks[bytes_of[lefts[of_bytes]], bytes_of[rights[of_bytes]]] = ranks[of_bytes]
    results = np.fromiter(rules.results, np.int32, len(rules.results))
    offsets = np.unique(results - np.arange(len(results)))
    ids[RESULT_OFFSET] = offsets[0] if len(offsets) == 1 else NO_OFFSET
    return MergeArrays(slots, np.concatenate([ids, byte_ranks.reshape(-1), results]), whole_tokens)
