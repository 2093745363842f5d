"""Words to ids in plain Python: the merges of a vocabulary, applied to one word at a time.

The readable twin of `basic.bpe.kernels.encode`, and what serves small texts.
"""

from __future__ import annotations

import heapq
from itertools import pairwise

# Half a megabyte of cached words, of everyday length: memory stays flat on a text without end.
_CACHE_WORDS = 3072
_CACHE_WORD_CHARACTERS = 32

# Up to here the simple loop is the faster one.
_SHORT_WORD_BYTES = 64

Pair = tuple[int, int]
_NO_ID = -1  # where a word ends, and where an id has become part of the one to its left


class PretokenCache(dict[str, tuple[int, ...]]):
    """The ids of each word, worked out where it is first looked up, and kept while there is room.

    Args:
        ids: of the tokens.
        merges: pairs of tokens, the earliest first.
    """

    def __init__(self, ids: dict[bytes, int], merges: list[tuple[bytes, bytes]]) -> None:
        self._byte_ids = {byte: ids[bytes([byte])] for byte in range(256) if bytes([byte]) in ids}
        self._ranks: dict[Pair, int] = {}
        self._results: list[int] = []  # by rank
        for rank, merge in enumerate(merges):
            try:
                left, right = merge
                pair, result = (ids[left], ids[right]), ids[left + right]
            except (KeyError, TypeError, ValueError):
                raise _merge_error(rank, merge, ids) from None
            self._ranks.setdefault(pair, rank)
            self._results.append(result)

    def tables(self) -> tuple[dict[int, int], dict[Pair, int], list[int]]:
        """The id of each byte, the rank of each pair of ids, and the id that each rank makes."""
        return self._byte_ids, self._ranks, self._results

    def __missing__(self, word: str) -> tuple[int, ...]:
        try:
            ids = [self._byte_ids[byte] for byte in word.encode()]
        except KeyError as error:
            raise ValueError(
                f"the vocabulary has no token for the byte 0x{error.args[0]:02x}, which {word[:40]!r} needs; "
                "train the tokenizer with all 256 bytes"
            ) from None
        merge_word = merge_short_word if len(ids) <= _SHORT_WORD_BYTES else merge_long_word
        encoded = tuple(merge_word(ids, self._ranks, self._results))
        if len(word) <= _CACHE_WORD_CHARACTERS:
            if len(self) >= _CACHE_WORDS:
                self.clear()
            self[word] = encoded
        return encoded


def _merge_error(rank: int, merge: tuple[bytes, bytes], ids: dict[bytes, int]) -> Exception:
    """What is wrong with a merge."""
    if not (isinstance(merge, tuple | list) and len(merge) == 2 and all(isinstance(part, bytes) for part in merge)):
        return TypeError(f"merge {rank} must be a pair of bytes, got {merge!r}")
    left, right = merge
    missing = next(token for token in (left, right, left + right) if token not in ids)
    return ValueError(f"merge {rank}, {merge!r}, needs the token {missing!r}, which is not in the vocabulary")


def merge_short_word(ids: list[int], ranks: dict[Pair, int], results: list[int]) -> list[int]:
    """Apply merges to a word: the earliest wherever it can be, from left to right, again and again until none can.

    Takes time quadratic in the length of the word, yet nothing is faster for the length of everyday words.

    Args:
        ids: of the tokens of the word; changed.
        ranks: the place of each pair of ids in the list of merges.
        results: the id that each merge makes, by rank.

    Returns:
        The ids after all merges.
    """
    none = len(results)
    pair_ranks = [ranks.get(pair, none) for pair in pairwise(ids)]
    while pair_ranks and (rank := min(pair_ranks)) < none:
        while rank in pair_ranks:
            i = pair_ranks.index(rank)
            ids[i : i + 2] = [results[rank]]
            del pair_ranks[i]
            if i > 0:
                pair_ranks[i - 1] = ranks.get((ids[i - 1], ids[i]), none)
            if i < len(pair_ranks):
                pair_ranks[i] = ranks.get((ids[i], ids[i + 1]), none)
    return ids


def merge_long_word(ids: list[int], ranks: dict[Pair, int], results: list[int]) -> list[int]:
    """The same, in time that hardly grows faster than the word.

    The places of the pairs are kept by rank, and the ranks in a heap. A merge puts its result into the place of
    the left id, and `right_of` and `left_of` lead past the place of the right one. Places at which the pair is no
    more are not looked for, but passed over.
    """
    right_of, left_of = list(range(1, len(ids) + 1)), list(range(-1, len(ids)))
    ids.append(_NO_ID)  # right of the last place and, as ids[-1], left of the first
    places: dict[int, list[int]] = {}
    for place, pair in enumerate(pairwise(ids)):
        if (rank := ranks.get(pair)) is not None:
            places.setdefault(rank, []).append(place)
    heap = list(places)
    heapq.heapify(heap)
    while heap:
        rank = heapq.heappop(heap)
        result = results[rank]
        for place in sorted(places.pop(rank)):
            right = right_of[place]
            if ranks.get((ids[place], ids[right])) != rank:
                continue
            ids[place], ids[right] = result, _NO_ID
            before, after = left_of[place], right_of[right]
            right_of[place], left_of[after] = after, place
            for new_place, pair in ((before, (ids[before], result)), (place, (result, ids[after]))):
                if (new_rank := ranks.get(pair)) is None:
                    continue
                if new_rank not in places:
                    places[new_rank] = []
                    heapq.heappush(heap, new_rank)
                places[new_rank].append(new_place)
    return [token_id for token_id in ids if token_id != _NO_ID]
