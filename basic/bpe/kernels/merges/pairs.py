"""The pairs of tokens while merges are learned: an index that finds a pair, and a heap that has the next one on top.

Both are flat arrays, like the other arrays of `learn_merges`, which lists them.
"""

from __future__ import annotations

from basic.bpe.kernels.hash_table import EMPTY, MULTIPLIER, compare_bytes
from basic.bpe.kernels.instructions import U64
from basic.common.native.kernel import kernel

# Indices in the state: merges learned so far, pairs so far, entries of the heap, used elements of the occurrences,
# tokens so far, given merges applied so far, the pair for which an array is too small, the limit for a token.
NUM_MERGES, NUM_PAIRS, HEAP_SIZE, NUM_OCCURRENCES, NUM_TOKENS, NUM_APPLIED, LARGE_PAIR, MAX_TOKEN_BYTES = range(8)


@kernel
def _is_merged_before(count, pair, other_count, other, pairs, tokens):
    """Whether a pair is merged before another: the more frequent one, then the one with the greater bytes."""
    if count != other_count:
        return count > other_count
    data, starts = tokens
    difference = compare_bytes(data, starts, pairs[0][pair], pairs[0][other])
    if difference == 0:
        difference = compare_bytes(data, starts, pairs[1][pair], pairs[1][other])
    return difference > 0


@kernel
def sift_down(heap, size, count, pair, pairs, tokens):
    """Put an entry at the top of the heap, and move it down to its position."""
    counts, numbers = heap
    i = 0
    while True:
        child = 2 * i + 1
        if child + 1 < size and _is_merged_before(
            counts[child + 1], numbers[child + 1], counts[child], numbers[child], pairs, tokens
        ):
            child += 1
        if child >= size or not _is_merged_before(counts[child], numbers[child], count, pair, pairs, tokens):
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
        if not _is_merged_before(count, pair, counts[parent], numbers[parent], pairs, tokens):
            break
        counts[i], numbers[i] = counts[parent], numbers[parent]
        i = parent
    counts[i], numbers[i] = count, pair


@kernel
def find_pair(keys, left, right):
    """The slot of a pair in the index of pairs, or the empty slot where it belongs."""
    key = (U64(left) << U64(32)) | U64(right)
    mask = U64(len(keys) - 1)
    slot = ((key * MULTIPLIER) >> U64(32)) & mask
    while keys[slot] != key and keys[slot] != EMPTY:
        slot = (slot + U64(1)) & mask
    return slot


@kernel
def add_pair(left, right, count, first, num_positions, pairs, index, heap, tokens, state):
    """Add a pair to all tables, which must have enough capacity; to the heap only if it may be merged."""
    lefts, rights, counts, firsts, sizes = pairs
    pair = state[NUM_PAIRS]
    state[NUM_PAIRS] = pair + 1
    lefts[pair], rights[pair], counts[pair], firsts[pair], sizes[pair] = left, right, count, first, num_positions
    slot = find_pair(index[0], left, right)
    index[0][slot] = (U64(left) << U64(32)) | U64(right)
    index[1][slot] = pair
    starts = tokens[1]
    num_bytes = starts[left + 1] - starts[left] + starts[right + 1] - starts[right]
    if count > 0 and num_bytes <= state[MAX_TOKEN_BYTES]:
        _push(heap, state[HEAP_SIZE], count, pair, pairs, tokens)
        state[HEAP_SIZE] += 1


@kernel
def fill_index(pairs, num_pairs, keys, numbers):
    for pair in range(num_pairs):
        slot = find_pair(keys, pairs[0][pair], pairs[1][pair])
        keys[slot] = (U64(pairs[0][pair]) << U64(32)) | U64(pairs[1][pair])
        numbers[slot] = pair
