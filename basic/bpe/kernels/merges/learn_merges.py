"""Learn merges from counted pre-tokens, fast.

The symbols of all pre-tokens are in one array, with one element a byte and NO_TOKEN between pre-tokens. A token of
several bytes has its number at its first and at its last byte, so both neighbors are found without links:

    position   0   1   2   3   4   5   6      merge s, t      0   1   2   3   4   5   6
    symbol     |   n   e   s   t   |   ...      --->          |   n   e   st  st  |   ...

It is fast because a pair gains occurrences only in the step that creates one of its tokens; after that step it can only
lose them. So

- the occurrences of a pair are a slice of one long array, written once, when the pair is new. Positions where the pair
  no longer exists are skipped. In a pre-token the positions increase, so "aaa" is merged from the left;
- the counts of the pairs that a step creates are summed in arrays indexed by token, which are cleared after the step;
- the heap is lazy: a count can only decrease, so an entry with an outdated count is corrected and moved down when it
  reaches the top.

A learner can continue after merges that are given: it first applies these, one after the other, wherever their pairs
are, and leaves their entries in the heap, where they are outdated.

Tokens are compared by number instead of by bytes; `basic.train_bpe` has the reason.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from basic.bpe.arrays import PretokenCounts, joined_bytes
from basic.bpe.kernels.hash_table import DONE, EMPTY, FULL, I64
from basic.bpe.kernels.instructions import U64, prefetch
from basic.bpe.kernels.merges.pairs import (
    HEAP_SIZE,
    LARGE_PAIR,
    MAX_TOKEN_BYTES,
    NUM_APPLIED,
    NUM_MERGES,
    NUM_OCCURRENCES,
    NUM_PAIRS,
    NUM_TOKENS,
    add_pair,
    fill_index,
    find_pair,
    sift_down,
)
from basic.bpe.plain import NumberedMerges
from basic.common.native.kernel import Kernel, kernel

NO_TOKEN, INSIDE = -1, -2  # symbols: between pre-tokens, and inside a token

# The kernels take as `arrays`:
#   symbols                         see above
#   counts                          of each pre-token
#   tokens                          the bytes of all tokens; where each starts, and the end of the last one
#   pairs                           left and right token, count, first occurrence and number of occurrences of each
#   index                           hash table: the two tokens of a pair as one number, and the number of the pair
#   heap                            counts, as they were when an entry was made, and pairs
#   occurrences                     position and pre-token of each
#   before, after                   by the token before (after) the new one: the count of the new pair, its number of
#                                   occurrences, and the count that the old pair loses; and a list of these tokens
#   records                         of each occurrence of a new pair the neighbor (-1 - neighbor for one after), the
#                                   position and the pre-token
#   state                           numbers, whose indices `pairs` has
_PREFETCH_DISTANCE = 12  # occurrences between the prefetch of a symbol and its use


@kernel
def _first_pairs(symbols, counts, sums, firsts, positions, pretokens):
    """Sum the counts of the pairs of bytes, and list their occurrences; `pretokens` gets the pre-token of each.

    The first call passes empty `positions`; it computes `sums`, and the numbers of occurrences in `firsts`.
    """
    pretoken = -1
    for position in range(len(symbols) - 1):
        left, right = symbols[position], symbols[position + 1]
        if left < 0:
            pretoken += 1
        elif right >= 0:
            key = I64(left) * 256 + I64(right)
            if len(positions) == 0:
                sums[key] += counts[pretoken]
            else:
                positions[firsts[key]], pretokens[firsts[key]] = position, pretoken
            firsts[key] += 1


@kernel
def _add_first_pairs(sums, firsts, pairs, index, heap, tokens, state):
    for key in range(65536):
        if firsts[key + 1] > firsts[key]:
            size = firsts[key + 1] - firsts[key]
            add_pair(key >> 8, key & 255, sums[key], firsts[key], size, pairs, index, heap, tokens, state)


@kernel
def _merge_positions(left, right, new, first, size, arrays):
    """Merge a pair at its positions, and sum the changes of the pairs around them.

    Returns:
        The number of tokens before, the number of tokens after, and the number of records.
    """
    symbols, counts, tokens, _, _, _, occurrences, before, after, records, _ = arrays
    positions, pretokens = occurrences
    before_sums, before_sizes, before_losses, before_tokens = before
    after_sums, after_sizes, after_losses, after_tokens = after
    neighbors, new_positions, new_pretokens = records
    starts = tokens[1]
    left_size, right_size = starts[left + 1] - starts[left], starts[right + 1] - starts[right]
    num_before, num_after, num_records = 0, 0, 0
    for i in range(first, first + size):
        if i + _PREFETCH_DISTANCE < first + size:
            prefetch(symbols, U64(positions[i + _PREFETCH_DISTANCE]))
        position = I64(positions[i])
        middle, end = position + left_size, position + left_size + right_size
        if symbols[position] != left or symbols[middle] != right:
            continue  # the pair no longer exists here
        pretoken = pretokens[i]
        count = counts[pretoken]
        x, y = I64(symbols[position - 1]), I64(symbols[end])
        # Written out for both sides: learning takes 4 % longer with a function for what is equal.
        symbols[middle - 1], symbols[middle] = INSIDE, INSIDE
        symbols[position], symbols[end - 1] = new, new
        if x >= 0:
            if before_sizes[x] == 0:
                before_tokens[num_before] = x
                num_before += 1
            before_sums[x] += count
            before_sizes[x] += 1
            if x == new:
                # In "abab" the first merge created (new, a), which this merge removes; (b, a) was subtracted then.
                after_sums[left] -= count
            else:
                before_losses[x] += count
            position_x = position - (starts[x + 1] - starts[x])
            neighbors[num_records], new_positions[num_records], new_pretokens[num_records] = x, position_x, pretoken
            num_records += 1
        if y >= 0:
            if after_sizes[y] == 0:
                after_tokens[num_after] = y
                num_after += 1
            after_sums[y] += count
            after_sizes[y] += 1
            after_losses[y] += count
            neighbors[num_records], new_positions[num_records], new_pretokens[num_records] = -1 - y, position, pretoken
            num_records += 1
    return num_before, num_after, num_records


@kernel
def _add_new_pairs(left, right, new, num_before, num_after, num_records, arrays):
    """Subtract the losses from the old pairs, add the new pairs, and write their occurrences."""
    _, _, tokens, pairs, index, heap, occurrences, before, after, records, state = arrays
    before_sums, before_sizes, before_losses, before_tokens = before
    after_sums, after_sizes, after_losses, after_tokens = after
    neighbors, new_positions, new_pretokens = records
    counts = pairs[2]
    num_occurrences = state[NUM_OCCURRENCES]
    for i in range(num_before):
        x = before_tokens[i]
        if before_losses[x] != 0:
            counts[index[1][find_pair(index[0], x, left)]] -= before_losses[x]
        add_pair(x, new, before_sums[x], num_occurrences, before_sizes[x], pairs, index, heap, tokens, state)
        # From here on, the sum is the index of the next occurrence to write.
        before_sums[x] = num_occurrences
        num_occurrences += before_sizes[x]
    for i in range(num_after):
        y = after_tokens[i]
        counts[index[1][find_pair(index[0], right, y)]] -= after_losses[y]
        add_pair(new, y, after_sums[y], num_occurrences, after_sizes[y], pairs, index, heap, tokens, state)
        after_sums[y] = num_occurrences
        num_occurrences += after_sizes[y]
    state[NUM_OCCURRENCES] = num_occurrences
    positions, pretokens = occurrences
    for i in range(num_records):
        neighbor = neighbors[i]
        sums, token = (before_sums, neighbor) if neighbor >= 0 else (after_sums, -1 - neighbor)
        positions[sums[token]], pretokens[sums[token]] = new_positions[i], new_pretokens[i]
        sums[token] += 1
    for i in range(num_before):
        x = before_tokens[i]
        before_sums[x] = before_sizes[x] = before_losses[x] = 0
    for i in range(num_after):
        y = after_tokens[i]
        after_sums[y] = after_sizes[y] = after_losses[y] = 0


@kernel
def _has_room(pair, arrays):
    """Whether the arrays have enough capacity to merge a pair; otherwise the state has the pair for `grow`."""
    _, _, _, pairs, _, _, occurrences, _, _, records, state = arrays
    size = pairs[4][pair]
    num_pairs = state[NUM_PAIRS] + 2 * min(size, state[NUM_TOKENS] + 1)
    has_room = (
        2 * size <= len(records[0])
        and state[NUM_OCCURRENCES] + 2 * size <= len(occurrences[0])
        and num_pairs <= len(pairs[0])
    )
    if not has_room:
        state[LARGE_PAIR] = pair
    return has_room


@kernel
def _merge(pair, new, arrays):
    """Merge a pair to the token `new` wherever it is, and update the pairs around it."""
    pairs = arrays[3]
    left, right, first, size = I64(pairs[0][pair]), I64(pairs[1][pair]), pairs[3][pair], pairs[4][pair]
    num_before, num_after, num_records = _merge_positions(left, right, new, first, size, arrays)
    _add_new_pairs(left, right, new, num_before, num_after, num_records, arrays)
    pairs[2][pair] = 0  # also what "aaa" subtracted from the pair itself


@kernel
def _apply(given, arrays):
    """Apply the merges that are given, in order: DONE, or FULL if an array is too small."""
    lefts, rights, results = given
    pairs, index, state = arrays[3], arrays[4], arrays[10]
    while state[NUM_APPLIED] < len(lefts):
        i = state[NUM_APPLIED]
        slot = find_pair(index[0], lefts[i], rights[i])
        if index[0][slot] != EMPTY and pairs[2][index[1][slot]] > 0:
            pair = I64(index[1][slot])
            if not _has_room(pair, arrays):
                return FULL
            _merge(pair, I64(results[i]), arrays)
        state[NUM_APPLIED] += 1
    return DONE


@kernel
def _learn(limit, merges, arrays):
    """Learn merges until there are `limit` or no pair is left (both DONE), or an array is too small (FULL)."""
    _, _, tokens, pairs, _, heap, _, _, _, _, state = arrays
    lefts, rights, pair_counts = pairs[0], pairs[1], pairs[2]
    while state[NUM_MERGES] < limit and state[HEAP_SIZE] > 0:
        count, pair = heap[0][0], I64(heap[1][0])
        stale = pair_counts[pair] != count
        if stale and pair_counts[pair] > 0:
            sift_down(heap, state[HEAP_SIZE], pair_counts[pair], pair, pairs, tokens)
            continue
        left, right, new = I64(lefts[pair]), I64(rights[pair]), state[NUM_TOKENS]
        start = tokens[1][new]
        left_start, right_start = tokens[1][left], tokens[1][right]
        left_size, right_size = tokens[1][left + 1] - left_start, tokens[1][right + 1] - right_start
        if not stale:
            if not _has_room(pair, arrays):
                return FULL
            if start + left_size + right_size > len(tokens[0]):
                state[LARGE_PAIR] = pair
                return FULL
        state[HEAP_SIZE] -= 1
        last = state[HEAP_SIZE]
        sift_down(heap, last, heap[0][last], heap[1][last], pairs, tokens)
        if stale:
            continue
        for i in range(left_size):
            tokens[0][start + i] = tokens[0][left_start + i]
        for i in range(right_size):
            tokens[0][start + left_size + i] = tokens[0][right_start + i]
        tokens[1][new + 1] = start + left_size + right_size
        merges[0][state[NUM_MERGES]], merges[1][state[NUM_MERGES]] = left, right
        state[NUM_MERGES] += 1
        state[NUM_TOKENS] += 1
        _merge(pair, new, arrays)
    return DONE


def _extended(array: np.ndarray, length: int) -> np.ndarray:
    """The array with at least this length; if it grows, at least twice as long."""
    if length <= len(array):
        return array
    result = np.empty(max(length, 2 * len(array)), array.dtype)
    result[: len(array)] = array
    return result


class MergeLearner:
    """Learns merges, some at a time.

    Args:
        pretokens: distinct; the sum of their number and their bytes is less than 2**31.
        first_merges: applied first; not counted.
        max_token_bytes: no longer token is learned; None for no limit.
    """

    def __init__(
        self,
        pretokens: PretokenCounts,
        num_merges: int,
        first_merges: NumberedMerges,
        max_token_bytes: int | None = None,
    ) -> None:
        lengths = np.diff(pretokens.starts)
        num_symbols = len(pretokens.data) + len(lengths) + 1
        self._symbols = np.full(num_symbols, NO_TOKEN, np.int32)
        gaps = np.repeat(np.arange(1, len(lengths) + 1), lengths)  # one more boundary before each next pre-token
        self._symbols[np.arange(len(pretokens.data)) + gaps] = pretokens.data
        self._counts = pretokens.counts
        num_merges = min(num_merges, len(pretokens.data))
        self.num_merges = num_merges
        self._merges = (np.zeros(num_merges, np.int32), np.zeros(num_merges, np.int32))
        first_tokens = first_merges.tokens
        self._num_first_tokens = num_first = len(first_tokens)
        data, starts = joined_bytes(first_tokens)
        self._tokens = (_extended(data, len(data) + (1 << 14)), np.pad(starts, (0, num_merges)))
        self._before, self._after = (
            tuple(np.zeros(num_first + num_merges, dtype) for dtype in (np.int64, np.int64, np.int64, np.int32))
            for _ in range(2)
        )
        self._records = tuple(np.zeros(1 << 12, np.int32) for _ in range(3))
        self._state = np.zeros(8, np.int64)
        self._state[NUM_TOKENS] = num_first
        self._state[MAX_TOKEN_BYTES] = np.iinfo(np.int64).max if max_token_bytes is None else max_token_bytes
        self._find_first_pairs()
        self._run(_apply, tuple(np.array(first_merges.triples, np.int32).reshape(-1, 3).T.copy()))

    def _run(self, step: Kernel, *arguments: Any) -> None:
        """Call a kernel until it is done, with larger arrays where they are too small."""
        while step(*arguments, self._arrays()) == FULL:
            self.grow(0)

    def _arrays(self) -> tuple[Any, ...]:
        """What the kernels take as `arrays`."""
        pairs = self._pairs, self._index, self._heap, self._occurrences
        return self._symbols, self._counts, self._tokens, *pairs, self._before, self._after, self._records, self._state

    def _find_first_pairs(self) -> None:
        sums, sizes, nothing = np.zeros(65536, np.int64), np.zeros(65537, np.int64), np.zeros(0, np.int32)
        _first_pairs(self._symbols, self._counts, sums, sizes, nothing, nothing)
        firsts = np.concatenate([[0], np.cumsum(sizes[:-1])])
        num_occurrences = int(firsts[-1])
        self._occurrences = (np.empty(3 * num_occurrences + 16, np.int32), np.empty(3 * num_occurrences + 16, np.int32))
        _first_pairs(self._symbols, self._counts, sums, firsts.copy(), *self._occurrences)
        self._state[NUM_OCCURRENCES] = num_occurrences
        self._allocate_pairs(1 << 16)
        _add_first_pairs(sums, firsts, self._pairs, self._index, self._heap, self._tokens, self._state)

    def _allocate_pairs(self, capacity: int) -> None:
        dtypes = (np.int32, np.int32, np.int64, np.int64, np.int64)
        self._pairs = tuple(np.zeros(capacity, dtype) for dtype in dtypes)
        self._heap = (np.zeros(capacity, np.int64), np.zeros(capacity, np.int32))
        self._index = (np.full(2 * capacity, EMPTY), np.zeros(2 * capacity, np.int32))

    def learn(self, limit: int) -> int:
        """Learn until there are `limit` merges or no pair is left; returns the number of merges so far."""
        self._run(_learn, min(limit, self.num_merges), self._merges)
        return int(self._state[NUM_MERGES])

    def grow(self, num_pairs: int) -> None:
        """Extend the arrays that are too small for the next merge, and to at least `num_pairs` pairs."""
        pair = self._state[LARGE_PAIR]
        left, right, size = self._pairs[0][pair], self._pairs[1][pair], int(self._pairs[4][pair])
        starts, new = self._tokens[1], int(self._state[NUM_TOKENS])
        num_bytes = int(starts[new] + starts[left + 1] - starts[left] + starts[right + 1] - starts[right])
        self._tokens = (_extended(self._tokens[0], num_bytes), starts)
        self._records = tuple(_extended(array, 2 * size) for array in self._records)
        self._occurrences = tuple(
            _extended(array, int(self._state[NUM_OCCURRENCES]) + 2 * size) for array in self._occurrences
        )
        needed = max(num_pairs, int(self._state[NUM_PAIRS]) + 2 * min(size, new + 1))
        if needed > len(self._pairs[0]):
            capacity = 1 << (2 * needed - 1).bit_length()
            self._pairs = tuple(_extended(array, capacity) for array in self._pairs)
            self._heap = tuple(_extended(array, capacity) for array in self._heap)
            self._index = (np.full(2 * capacity, EMPTY), np.zeros(2 * capacity, np.int32))
            fill_index(self._pairs, int(self._state[NUM_PAIRS]), *self._index)

    def merges(self) -> list[tuple[bytes, bytes]]:
        """The merges learned so far, in order, as bytes."""
        num_merges = int(self._state[NUM_MERGES])
        starts = self._tokens[1][: self._num_first_tokens + num_merges + 1].tolist()
        data = self._tokens[0][: starts[-1]].tobytes()
        tokens = [data[start:stop] for start, stop in pairwise(starts)]
        left, right = (ids[:num_merges].tolist() for ids in self._merges)
        return [(tokens[x], tokens[y]) for x, y in zip(left, right, strict=True)]
