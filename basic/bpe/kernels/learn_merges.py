"""Learning merges from counted words, fast.

All words stand in one array of symbols, one element a byte, NO_TOKEN between words. A token of several bytes has its
number at its first and its last byte, so that both neighbours are found without following links:

    place      0   1   2   3   4   5   6      merge s, t      0   1   2   3   4   5   6
    symbol     |   n   e   s   t   |   ...      --->          |   n   e   st  st  |   ...

What makes it fast is a fact about BPE: a pair gains occurrences only in the step that makes one of its tokens; from
then on it can only lose some. So

- the occurrences of a pair are one stretch of a long array, written once, when the pair is new. Places at which the
  pair is no more are passed over; within a word the places rise, so "aaa" is merged from the left;
- the counts of the pairs that a step makes are summed up in arrays by token number, and cleared after the step;
- the heap is lazy: a count can only fall, so an entry whose count is no longer true goes down to where it belongs
  when it comes up.

Another fact saves comparing tokens by their bytes: no two merges make the same bytes. What happens inside a stretch
of text that becomes one token depends on nothing around it, or a merge would have crossed its edge. So the same
bytes always come about by the same merges, and a number stands for them.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from basic.bpe.arrays import PretokenCounts
from basic.bpe.kernels.hash_table import DONE, FULL, I64
from basic.bpe.kernels.instructions import U64, kernel, prefetch

NO_TOKEN, INSIDE = -1, -2  # symbols: between words, and inside a token

# Places in the state.
MERGES, PAIRS, HEAP, USED = 0, 1, 2, 3

_EMPTY = U64(0xFFFFFFFFFFFFFFFF)
_ODD = U64(0x9E3779B97F4A7C15)
_AHEAD = 12  # occurrences between asking for a symbol and reading it


@kernel
def _compare(tokens, x, y):
    """Which of two tokens has the greater bytes: negative, 0 or positive."""
    data, starts = tokens
    size_x, size_y = starts[x + 1] - starts[x], starts[y + 1] - starts[y]
    for i in range(min(size_x, size_y)):
        difference = I64(data[starts[x] + i]) - I64(data[starts[y] + i])
        if difference != 0:
            return difference
    return size_x - size_y


@kernel
def _before(count, pair, other_count, other, pairs, tokens):
    """Whether a pair is merged before another: the more frequent, then the one with the greater bytes."""
    if count != other_count:
        return count > other_count
    difference = _compare(tokens, pairs[0][pair], pairs[0][other])
    if difference == 0:
        difference = _compare(tokens, pairs[1][pair], pairs[1][other])
    return difference > 0


@kernel
def _sift_down(heap, size, count, pair, pairs, tokens):
    """Put an entry in the place of the first one, and let it down to where it belongs."""
    counts, numbers = heap
    i = 0
    while True:
        child = 2 * i + 1
        if child + 1 < size and _before(
            counts[child + 1], numbers[child + 1], counts[child], numbers[child], pairs, tokens
        ):
            child += 1
        if child >= size or not _before(counts[child], numbers[child], count, pair, pairs, tokens):
            break
        counts[i], numbers[i] = counts[child], numbers[child]
        i = child
    counts[i], numbers[i] = count, pair


@kernel
def _push(heap, size, count, pair, pairs, tokens):
    counts, numbers = heap
    i = size
    while i > 0:
        parent = (i - 1) // 2
        if not _before(count, pair, counts[parent], numbers[parent], pairs, tokens):
            break
        counts[i], numbers[i] = counts[parent], numbers[parent]
        i = parent
    counts[i], numbers[i] = count, pair


@kernel
def _slot(keys, left, right):
    """Where a pair stands in the index of pairs, or would stand."""
    key = (U64(left) << U64(32)) | U64(right)
    mask = U64(len(keys) - 1)
    slot = ((key * _ODD) >> U64(32)) & mask
    while keys[slot] != key and keys[slot] != _EMPTY:
        slot = (slot + U64(1)) & mask
    return slot


@kernel
def _new_pair(left, right, count, first, num_places, pairs, index, heap, tokens, state):
    """Enter a pair into all tables; there must be room."""
    lefts, rights, counts, firsts, sizes = pairs
    pair = state[PAIRS]
    state[PAIRS] = pair + 1
    lefts[pair], rights[pair], counts[pair], firsts[pair], sizes[pair] = left, right, count, first, num_places
    slot = _slot(index[0], left, right)
    index[0][slot] = (U64(left) << U64(32)) | U64(right)
    index[1][slot] = pair
    if count > 0:
        _push(heap, state[HEAP], count, pair, pairs, tokens)
        state[HEAP] += 1


@kernel
def _first_pairs(symbols, counts, sums, firsts, places, words):
    """Sum up the pairs of bytes and list their occurrences; `words` says in which word each lies.

    Called first without room for the places: fills `sums` and, as numbers of occurrences, `firsts`.
    """
    word = -1
    for place in range(len(symbols) - 1):
        left, right = symbols[place], symbols[place + 1]
        if left < 0:
            word += 1
        elif right >= 0:
            key = I64(left) * 256 + I64(right)
            if len(places) == 0:
                sums[key] += counts[word]
            else:
                places[firsts[key]], words[firsts[key]] = place, word
            firsts[key] += 1


@kernel
def _enter_first_pairs(sums, firsts, pairs, index, heap, tokens, state):
    for key in range(65536):
        if firsts[key + 1] > firsts[key]:
            size = firsts[key + 1] - firsts[key]
            _new_pair(key >> 8, key & 255, sums[key], firsts[key], size, pairs, index, heap, tokens, state)


@kernel
def _merge_places(left, right, new, first, size, symbols, counts, occurrences, tokens, before, after, records):
    """Merge a pair at its places, and sum up what changes around them.

    Args:
        before, after: of the tokens that stand before (after) the new token: the sum of the new pairs, their number,
            the sum that the old pairs lose, and a list of the tokens that were seen.
        records: gets the occurrences of new pairs: the neighbour (-1 - neighbour for one after), place, word.

    Returns:
        How many tokens stand before and after, and how many records there are.
    """
    places, words = occurrences
    before_sums, before_sizes, before_losses, before_list = before
    after_sums, after_sizes, after_losses, after_list = after
    neighbours, new_places, new_words = records
    starts = tokens[1]
    left_size, right_size = starts[left + 1] - starts[left], starts[right + 1] - starts[right]
    num_before, num_after, n = 0, 0, 0
    for i in range(first, first + size):
        if i + _AHEAD < first + size:
            prefetch(symbols, U64(places[i + _AHEAD]))
        place = I64(places[i])
        middle, end = place + left_size, place + left_size + right_size
        if symbols[place] != left or symbols[middle] != right:
            continue  # no more there
        word = words[i]
        count = counts[word]
        x, y = I64(symbols[place - 1]), I64(symbols[end])
        symbols[middle - 1], symbols[middle] = INSIDE, INSIDE
        symbols[place], symbols[end - 1] = new, new
        if x >= 0:
            if before_sizes[x] == 0:
                before_list[num_before] = x
                num_before += 1
            before_sums[x] += count
            before_sizes[x] += 1
            if x == new:
                # In "abab" the first merge made (new, a), which is no more; (b, a) was taken off then.
                after_sums[left] -= count
            else:
                before_losses[x] += count
            neighbours[n], new_places[n], new_words[n] = x, place - (starts[x + 1] - starts[x]), word
            n += 1
        if y >= 0:
            if after_sizes[y] == 0:
                after_list[num_after] = y
                num_after += 1
            after_sums[y] += count
            after_sizes[y] += 1
            after_losses[y] += count
            neighbours[n], new_places[n], new_words[n] = -1 - y, place, word
            n += 1
    return num_before, num_after, n


@kernel
def _enter_new_pairs(
    left,
    right,
    new,
    num_before,
    num_after,
    num_records,
    occurrences,
    tokens,
    before,
    after,
    records,
    pairs,
    index,
    heap,
    state,
):
    """Take the losses off the old pairs, enter the new ones, and write their occurrences where they belong."""
    before_sums, before_sizes, before_losses, before_list = before
    after_sums, after_sizes, after_losses, after_list = after
    neighbours, new_places, new_words = records
    counts = pairs[2]
    used = state[USED]
    for i in range(num_before):
        x = before_list[i]
        if before_losses[x] != 0:
            counts[index[1][_slot(index[0], x, left)]] -= before_losses[x]
        _new_pair(x, new, before_sums[x], used, before_sizes[x], pairs, index, heap, tokens, state)
        # From here on the sum is where the next occurrence is to be written.
        before_sums[x] = used
        used += before_sizes[x]
    for i in range(num_after):
        y = after_list[i]
        counts[index[1][_slot(index[0], right, y)]] -= after_losses[y]
        _new_pair(new, y, after_sums[y], used, after_sizes[y], pairs, index, heap, tokens, state)
        after_sums[y] = used
        used += after_sizes[y]
    state[USED] = used
    places, words = occurrences
    for i in range(num_records):
        neighbour = neighbours[i]
        sums, token = (before_sums, neighbour) if neighbour >= 0 else (after_sums, -1 - neighbour)
        places[sums[token]], words[sums[token]] = new_places[i], new_words[i]
        sums[token] += 1
    for i in range(num_before):
        x = before_list[i]
        before_sums[x] = before_sizes[x] = before_losses[x] = 0
    for i in range(num_after):
        y = after_list[i]
        after_sums[y] = after_sizes[y] = after_losses[y] = 0


@kernel
def _learn(limit, symbols, counts, merges, tokens, pairs, index, heap, occurrences, before, after, records, state):
    """Learn merges until there are `limit`, or no pair is left (both DONE), or some array has no room (FULL)."""
    lefts, rights, pair_counts, firsts, sizes = pairs
    while state[MERGES] < limit and state[HEAP] > 0:
        count, pair = heap[0][0], heap[1][0]
        stale = pair_counts[pair] != count
        if stale and pair_counts[pair] > 0:
            _sift_down(heap, state[HEAP], pair_counts[pair], pair, pairs, tokens)
            continue
        left, right, first, size = I64(lefts[pair]), I64(rights[pair]), firsts[pair], sizes[pair]
        new = 256 + state[MERGES]
        start = tokens[1][new]
        left_start, right_start = tokens[1][left], tokens[1][right]
        left_size, right_size = tokens[1][left + 1] - left_start, tokens[1][right + 1] - right_start
        num_pairs = state[PAIRS] + 2 * min(size, new + 1)
        if not stale and (
            2 * size > len(records[0])
            or state[USED] + 2 * size > len(occurrences[0])
            or num_pairs > len(lefts)
            or start + left_size + right_size > len(tokens[0])
        ):
            return FULL
        state[HEAP] -= 1
        last = state[HEAP]
        _sift_down(heap, last, heap[0][last], heap[1][last], pairs, tokens)
        if stale:
            continue
        for i in range(left_size):
            tokens[0][start + i] = tokens[0][left_start + i]
        for i in range(right_size):
            tokens[0][start + left_size + i] = tokens[0][right_start + i]
        tokens[1][new + 1] = start + left_size + right_size
        merges[0][state[MERGES]], merges[1][state[MERGES]] = left, right
        state[MERGES] += 1
        num_before, num_after, num_records = _merge_places(
            left, right, new, first, size, symbols, counts, occurrences, tokens, before, after, records
        )
        _enter_new_pairs(
            left, right, new, num_before, num_after, num_records,
            occurrences, tokens, before, after, records, pairs, index, heap, state,
        )  # fmt: skip
        pair_counts[pair] = 0  # also what "aaa" took off from the pair itself
    return DONE


@kernel
def _fill_index(pairs, num_pairs, keys, numbers):
    for pair in range(num_pairs):
        slot = _slot(keys, pairs[0][pair], pairs[1][pair])
        keys[slot] = (U64(pairs[0][pair]) << U64(32)) | U64(pairs[1][pair])
        numbers[slot] = pair


def _longer(array: np.ndarray, length: int) -> np.ndarray:
    """The array with room for at least `length`, and for as much again as it had."""
    if length <= len(array):
        return array
    result = np.empty(max(length, 2 * len(array)), array.dtype)
    result[: len(array)] = array
    return result


class MergeLearner:
    """Learns merges, some at a time.

    Args:
        words: distinct words with counts; together less than 2**31 bytes and words.
        num_merges: the most merges that will be asked for.
    """

    def __init__(self, words: PretokenCounts, num_merges: int) -> None:
        lengths = np.diff(words.starts)
        num_symbols = len(words.data) + len(lengths) + 1
        self._symbols = np.full(num_symbols, NO_TOKEN, np.int32)
        gaps = np.repeat(np.arange(1, len(lengths) + 1), lengths)  # each word is after one gap more
        self._symbols[np.arange(len(words.data)) + gaps] = words.data
        self._counts = words.counts
        num_merges = min(num_merges, len(words.data))
        self.num_merges = num_merges
        self._merges = (np.zeros(num_merges, np.int32), np.zeros(num_merges, np.int32))
        token_starts = np.zeros(256 + num_merges + 1, np.int64)
        token_starts[:257] = np.arange(257)
        self._tokens = (np.arange(1 << 14).astype(np.uint8), token_starts)
        self._before, self._after = (
            tuple(np.zeros(256 + num_merges, dtype) for dtype in (np.int64, np.int64, np.int64, np.int32))
            for _ in range(2)
        )
        self._records = tuple(np.zeros(1 << 12, np.int32) for _ in range(3))
        self._state = np.zeros(4, np.int64)
        self._make_first_pairs()

    def _make_first_pairs(self) -> None:
        sums, sizes, nothing = np.zeros(65536, np.int64), np.zeros(65537, np.int64), np.zeros(0, np.int32)
        _first_pairs(self._symbols, self._counts, sums, sizes, nothing, nothing)
        firsts = np.concatenate([[0], np.cumsum(sizes[:-1])])
        used = int(firsts[-1])
        self._occurrences = (np.empty(3 * used + 16, np.int32), np.empty(3 * used + 16, np.int32))
        _first_pairs(self._symbols, self._counts, sums, firsts.copy(), *self._occurrences)
        self._state[USED] = used
        self._make_pairs(1 << 16)
        _enter_first_pairs(sums, firsts, self._pairs, self._index, self._heap, self._tokens, self._state)

    def _make_pairs(self, room: int) -> None:
        dtypes = (np.int32, np.int32, np.int64, np.int64, np.int64)
        self._pairs = tuple(np.zeros(room, dtype) for dtype in dtypes)
        self._heap = (np.zeros(room, np.int64), np.zeros(room, np.int32))
        self._index = (np.full(2 * room, _EMPTY), np.zeros(2 * room, np.int32))

    def learn(self, limit: int) -> int:
        """Go on until `limit` merges are learned or no pair is left; returns how many there are."""
        while (
            _learn(
                min(limit, self.num_merges), self._symbols, self._counts, self._merges, self._tokens, self._pairs,
                self._index, self._heap, self._occurrences, self._before, self._after, self._records, self._state,
            )
            == FULL
        ):  # fmt: skip
            self.grow(0)
        return int(self._state[MERGES])

    def grow(self, num_pairs: int) -> None:
        """Make room for the next merge, whichever array lacks it, and for as many pairs."""
        pair = self._heap[1][0]
        left, right, size = self._pairs[0][pair], self._pairs[1][pair], int(self._pairs[4][pair])
        starts, new = self._tokens[1], 256 + int(self._state[MERGES])
        num_bytes = int(starts[new] + starts[left + 1] - starts[left] + starts[right + 1] - starts[right])
        self._tokens = (_longer(self._tokens[0], num_bytes), starts)
        self._records = tuple(_longer(array, 2 * size) for array in self._records)
        self._occurrences = tuple(_longer(array, int(self._state[USED]) + 2 * size) for array in self._occurrences)
        needed = max(num_pairs, int(self._state[PAIRS]) + 2 * min(size, new + 1))
        if needed > len(self._pairs[0]):
            room = 1 << (2 * needed - 1).bit_length()
            self._pairs = tuple(_longer(array, room) for array in self._pairs)
            self._heap = tuple(_longer(array, room) for array in self._heap)
            self._index = (np.full(2 * room, _EMPTY), np.zeros(2 * room, np.int32))
            _fill_index(self._pairs, int(self._state[PAIRS]), *self._index)

    def merges(self) -> list[tuple[bytes, bytes]]:
        """All merges so far, in order."""
        num_merges = int(self._state[MERGES])
        starts = self._tokens[1][: 257 + num_merges].tolist()
        data = self._tokens[0][: starts[-1]].tobytes()
        tokens = [data[start:stop] for start, stop in pairwise(starts)]
        left, right = (ids[:num_merges].tolist() for ids in self._merges)
        return [(tokens[x], tokens[y]) for x, y in zip(left, right, strict=True)]
