"""Apply merges to the bytes of a pre-token, until no merge applies.

Most of the time is spent in looking up pairs. The merges of a tokenizer fill a megabyte, which the text repeatedly
evicts from the first-level cache. So a lookup costs one cache line and has no branch that is hard to predict. And
several pre-tokens are merged in turn, one merge of each at a time, so that one continues while another waits for
memory. A new pre-token of mixed scripts has ten merges on average and takes 0.58 microseconds. One pre-token after the
other, with one probe after the other, took 1.05 microseconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import chain
from typing import NamedTuple

import numpy as np

from basic.bpe.arrays import joined_bytes
from basic.bpe.kernels.hash_table import I64, find_whole_bytes, new_table, whole_token_table
from basic.bpe.kernels.instructions import U64, low_bits_where, smallest16
from basic.bpe.plain import JoinedRanks, MergeRules
from basic.common.native.cache_files import kept_arrays
from basic.common.native.kernel import inlined_kernel, kernel
from basic.common.native.object_files import cache_folder

# A slot of the hash table of merges is one number: left id, right id, rank + 1.
ID_BITS, RANK_BITS = 21, 22
NO_RANK = (1 << RANK_BITS) - 1
_EMPTY = U64(0xFFFFFFFFFFFFFFFF)
_LINE_SLOTS = 8  # slots in a cache line, which are compared at once
_MULTIPLIER = U64(0x9E3779B97F4A7C15)

# Up to this length, each merge scans all pairs of the pre-token for the lowest rank, which is the fastest way for usual
# lengths; a longer pre-token uses a heap. The rank of a pair and its position are one number.
POSITION_BITS = 8
MAX_SCANNED_BYTES = (1 << POSITION_BITS) - 1
STEP = 16  # pairs that are compared at once
_NO_PAIR = np.int32(NO_RANK << POSITION_BITS)
_NO_OFFSET = -(1 << 31)

# The merges of at least so many tokens are kept in a file.
_MIN_KEPT_TOKENS = 1 << 14

ONE_AT_A_TIME, RESULT_OFFSET = 256, 257
BYTE_RANKS = 258
RESULTS = BYTE_RANKS + 256 * 256


WholeTokens = tuple[np.ndarray, np.ndarray]  # of `whole_token_table`


class MergeArrays(NamedTuple):
    """The merges of a tokenizer as arrays.

    Attributes:
        slots: hash table of left id, right id and rank (uint64).
        numbers: three tables in one array (int32). First the id of each byte, -1 if it has none. At ONE_AT_A_TIME 1 or
            0 (see `MergeRules`). At RESULT_OFFSET, if every result is its rank and a constant, this constant, which
            saves an access to memory; else _NO_OFFSET. From BYTE_RANKS on the rank of each pair of bytes, at the index
            256 * left + right, which needs no hash. From RESULTS on the id that each merge produces, by rank.
    """

    slots: np.ndarray
    numbers: np.ndarray
    whole_tokens: WholeTokens


@kernel
def _first_line(slots, key):
    """The cache line in which the search for a pair starts."""
    return ((key * _MULTIPLIER) >> U64(36)) & U64(len(slots) // _LINE_SLOTS - 1)


@inlined_kernel
def _rank(slots, left, right):
    """The rank of the merge of two ids, or NO_RANK.

    A line is filled from its first slot on. The search continues in the next line only if a line is full.
    """
    key = (U64(left) << U64(ID_BITS)) | U64(right)
    line = _first_line(slots, key)
    while True:
        slot = line * U64(_LINE_SLOTS)
        low_bits = low_bits_where(slots, slot, key, U64(RANK_BITS))
        if (low_bits != U64(0)) | (slots[slot + U64(_LINE_SLOTS - 1)] == _EMPTY):
            return I64((low_bits - U64(1)) & U64(NO_RANK))
        line = (line + U64(1)) & U64(len(slots) // _LINE_SLOTS - 1)


@kernel
def _fill_slots(slots, lefts, rights, ranks):
    for i in range(len(ranks)):
        key = (U64(lefts[i]) << U64(ID_BITS)) | U64(rights[i])
        slot = _first_line(slots, key) * U64(_LINE_SLOTS)
        while slots[slot] != _EMPTY:
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
    slots[:] = _EMPTY
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
    ids[RESULT_OFFSET] = offsets[0] if len(offsets) == 1 else _NO_OFFSET
    return MergeArrays(slots, np.concatenate([ids, byte_ranks.reshape(-1), results]), whole_tokens)


def new_buffers(length: int) -> tuple[np.ndarray, np.ndarray]:
    """The arrays in which pre-tokens of this total length are merged.

    Returns:
        The first array has four rows, with one element a byte: the symbols (ids; -1 after a merge with the symbol
        before), the pairs (rank and position of each symbol's pair with the next one, as one number), and the left and
        the right neighbors. The second array is the heap for a long pre-token, followed by the positions of one rank.
    """
    return np.empty((4, length), np.int32), np.empty(4 * length, np.int64)


@inlined_kernel
def bytes_to_ids(data, start, length, merges, symbols, first):
    """Write the ids of the bytes of a pre-token to the symbols; returns the offset of a byte without an id, else -1."""
    numbers, missing = merges[1], I64(-1)
    for i in range(length):
        token_id = numbers[data[start + i]]
        symbols[first + i] = token_id
        if token_id < 0 and missing < 0:
            missing = start + i
    return missing


@inlined_kernel
def start_pretoken(data, start, length, merges, buffers, first):
    """Prepare the other rows for `merge_once`, where the symbols of the pre-token start at `first`.

    After the last pair, empty pairs fill the rest of a step. Returns where the next pre-token may start.
    """
    pairs, left_of, right_of, numbers = buffers[0][1], buffers[0][2], buffers[0][3], merges[1]
    for i in range(length - 1):
        pair = (U64(data[start + i]) << U64(8)) | U64(data[start + i + 1])
        pairs[first + i] = (numbers[U64(BYTE_RANKS) + pair] << POSITION_BITS) | i
    stop = (length + STEP - 1) // STEP * STEP
    for i in range(length - 1, stop):
        pairs[first + i] = _NO_PAIR
    for i in range(length):
        left_of[first + i], right_of[first + i] = i - 1, i + 1
    return first + stop


@inlined_kernel
def merge_once(length, merges, buffers, first):
    """Apply the merge with the lowest rank, at its first position: the smallest number of the pairs.

    Returns:
        1 after a merge; 0 if no merge applies; -1 if the merge creates a pair of a lower rank that has to wait for the
        other positions of the current rank. It does not happen with merges that were learned.
    """
    slots, numbers = merges[0], merges[1]
    symbols, pairs, left_of, right_of = buffers[0][0], buffers[0][1], buffers[0][2], buffers[0][3]
    best = smallest16(pairs, U64(first))
    for i in range(U64(STEP), U64(length), U64(STEP)):
        best = min(best, smallest16(pairs, U64(first) + i))
    if best >= _NO_PAIR:
        return 0
    i, rank = first + (best & ((1 << POSITION_BITS) - 1)), I64(best >> POSITION_BITS)
    right = first + right_of[i]
    after, before = right_of[right], left_of[i]
    offset = numbers[RESULT_OFFSET]
    symbols[i] = rank + offset if offset != _NO_OFFSET else numbers[RESULTS + rank]
    symbols[right] = -1
    pairs[i] = pairs[right] = _NO_PAIR
    right_of[i] = after
    new_rank = I64(NO_RANK)
    if after < length:
        left_of[first + after] = i - first
        new_rank = _rank(slots, symbols[i], symbols[first + after])
        pairs[i] = (new_rank << POSITION_BITS) | (i - first)
    if before >= 0:
        rank_before = _rank(slots, symbols[first + before], symbols[i])
        pairs[first + before] = (rank_before << POSITION_BITS) | before
        new_rank = min(new_rank, rank_before)
    return 1 if new_rank >= rank or numbers[ONE_AT_A_TIME] else -1


@kernel
def compact_ids(symbols, first, length):
    """Move the ids that are left to the front of the symbols of a pre-token; returns their number."""
    n = first
    for i in range(first, first + length):
        if symbols[i] >= 0:
            symbols[n] = symbols[i]
            n += 1
    return n - first


@kernel
def _heap_push(heap, size, value):
    i = size
    while i > 0 and heap[(i - 1) // 2] > value:
        heap[i] = heap[(i - 1) // 2]
        i = (i - 1) // 2
    heap[i] = value


@kernel
def _heap_pop(heap, size):
    """Remove the smallest value and return it."""
    smallest, last, i = heap[0], heap[size - 1], 0
    while True:
        child = 2 * i + 1
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if child >= size or heap[child] >= last:
            break
        heap[i] = heap[child]
        i = child
    heap[i] = last
    return smallest


@kernel
def merge_all(length, merges, buffers):
    """Merge a pre-token of any length, whose symbols start at 0, and leave its ids there; returns their number.

    The time is almost linear: a heap holds the pairs, by rank and position. All positions of a rank are removed from
    the heap before the first is merged, since a merge may create a pair of a lower rank, which has to wait; only one is
    removed if one merge is applied at a time. A position where the pair no longer exists is skipped.
    """
    slots, numbers = merges[0], merges[1]
    symbols, left_of, right_of, heap = buffers[0][0], buffers[0][2], buffers[0][3], buffers[1]
    positions_offset, size = 3 * len(symbols), 0
    for i in range(length):
        left_of[i], right_of[i] = i - 1, i + 1
        if i + 1 < length:
            rank = _rank(slots, symbols[i], symbols[i + 1])
            if rank < NO_RANK:
                _heap_push(heap, size, (rank << 40) | i)
                size += 1
    while size > 0:
        rank, n = heap[0] >> 40, 0
        while size > 0 and heap[0] >> 40 == rank and (n == 0 or not numbers[ONE_AT_A_TIME]):
            heap[positions_offset + n] = _heap_pop(heap, size) & ((1 << 40) - 1)
            size -= 1
            n += 1
        for k in range(n):
            i = heap[positions_offset + k]
            right = right_of[i]
            if symbols[i] < 0 or right >= length or _rank(slots, symbols[i], symbols[right]) != rank:
                continue
            symbols[i], symbols[right] = numbers[RESULTS + rank], -1
            after = right_of[right]
            right_of[i] = after
            if after < length:
                left_of[after] = i
                new_rank = _rank(slots, symbols[i], symbols[after])
                if new_rank < NO_RANK:
                    _heap_push(heap, size, (new_rank << 40) | i)
                    size += 1
            before = left_of[i]
            if before >= 0:
                new_rank = _rank(slots, symbols[before], symbols[i])
                if new_rank < NO_RANK:
                    _heap_push(heap, size, (new_rank << 40) | before)
                    size += 1
    return compact_ids(symbols, 0, length)
