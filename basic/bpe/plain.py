"""Encode pre-tokens in plain Python: apply the merges to one pre-token at a time.

This is the readable version of `basic.bpe.kernels.encode`. Small texts use it.
"""

from __future__ import annotations

import heapq
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import NamedTuple, Protocol, overload

import numpy as np

from basic.bpe import arrays
from basic.bpe.arrays import InvalidByteError

# About half a megabyte of pre-tokens of everyday length, so memory stays bounded on an endless text.
MAX_CACHED_PRETOKENS = 3072
_MAX_CACHED_CHARACTERS = 32

# Up to this length `merge_short` is faster than `merge_long`.
_SHORT_BYTES = 64

Pair = tuple[int, int]
_NO_ID = -1  # the end of a pre-token, or an id that was merged into the one to its left


class PairRanks(Protocol):
    """The rank of the merge of two ids: a dictionary, or `JoinedRanks`."""

    @overload
    def get(self, pair: Pair, /) -> int | None: ...
    @overload
    def get(self, pair: Pair, default: int, /) -> int: ...
    def items(self) -> Iterable[tuple[Pair, int]]: ...


class MergeRules(NamedTuple):
    """The merges of a tokenizer, by id.

    Attributes:
        byte_ids: byte to id; bytes without a token are missing.
        ranks: pair of ids to the rank of its merge.
        results: rank to the id that the merge makes.
        one_at_a_time: whether the lowest rank is looked for again after each single merge, as other programs do.
            Otherwise a merge is applied at all its positions first, as GPT-2 does. Only a merge that comes before those
            that produce its two tokens makes a difference.
        whole_tokens: token to id; a pre-token with these bytes becomes this token at once, whatever the merges are.
    """

    byte_ids: dict[int, int]
    ranks: PairRanks
    results: Sequence[int]
    one_at_a_time: bool = False
    whole_tokens: Mapping[bytes, int] = {}


class JoinedRanks:
    """tiktoken's rule, which has no list of merges: the rank of two tokens is the id of the token with their bytes."""

    def __init__(self, ids: Mapping[bytes, int], tokens: Mapping[int, bytes]) -> None:
        self.ids, self._tokens = ids, tokens

    @overload
    def get(self, pair: Pair, /) -> int | None: ...
    @overload
    def get(self, pair: Pair, default: int, /) -> int: ...
    def get(self, pair: Pair, default: int | None = None, /) -> int | None:
        """The rank of two ids, or the default."""
        return self.ids.get(self._tokens[pair[0]] + self._tokens[pair[1]], default)

    def items(self) -> Iterator[tuple[Pair, int]]:
        """All pairs with their ranks: each token, divided into two tokens at each position where that is possible."""
        get = self.ids.get
        for token, rank in self.ids.items():
            for i in range(1, len(token)):
                if (left := get(token[:i])) is not None and (right := get(token[i:])) is not None:
                    yield (left, right), rank


class NumberedMerges(NamedTuple):
    """Merges for a learner that continues after them.

    Attributes:
        tokens: number to bytes: first the 256 bytes, then the others in the order of the merges.
        triples: of each merge the numbers of the left, the right and the resulting token.
    """

    tokens: list[bytes]
    triples: list[tuple[int, int, int]]


def number_merges(merges: Iterable[tuple[bytes, bytes]]) -> NumberedMerges:
    """Number the tokens of merges, and order the merges so that a learner can apply them one after the other.

    That is the order of their ranks, but a merge that needs the token of a later one comes after it, and then before
    all others of higher rank: as in encoding, where the lowest rank that is possible is applied first. Merges with the
    same result have one token; a merge that is given again counts once.

    Raises:
        TypeError: a merge is not a pair of bytes.
        ValueError: several merges make a token, and not all of them come before those that need it.
    """
    waiting: dict[bytes, list[tuple[int, bytes, bytes]]] = defaultdict(list)  # for a token that no merge has made yet
    ranked: dict[tuple[bytes, bytes], int] = {}
    for rank, merge in enumerate(merges):
        if not is_pair_of_bytes(merge):
            raise TypeError(f"merge {rank} must be a pair of bytes, got {merge!r}")
        ranked.setdefault((merge[0], merge[1]), rank)
    unmade = {left + right for left, right in ranked}
    tokens = [bytes([byte]) for byte in range(256)]
    numbers = {token: number for number, token in enumerate(tokens)}
    triples, needed = [], set()
    heap = [(rank, left, right) for (left, right), rank in ranked.items()]  # sorted, so it is a heap
    while heap:
        rank, left, right = heapq.heappop(heap)
        if missing := [token for token in (left, right) if token in unmade]:
            waiting[missing[0]].append((rank, left, right))
            continue
        for token in (left, right, left + right):
            if numbers.setdefault(token, len(tokens)) == len(tokens):
                tokens.append(token)
        if left + right in needed:
            raise ValueError(
                f"merge {rank}, {(left, right)!r}, makes a token that another merge makes too, and that was needed "
                "before; give only the merges that are used (Tokenizer.used_merges.merges)"
            )
        triples.append((numbers[left], numbers[right], numbers[left + right]))
        needed |= {token for token in (left, right) if len(token) > 1}
        unmade.discard(left + right)
        for merge in waiting.pop(left + right, ()):
            heapq.heappush(heap, merge)
    return NumberedMerges(tokens, triples)


def merge_rules(ids: dict[bytes, int], merges: Iterable[tuple[bytes, bytes]]) -> MergeRules:
    """Look up the ids of all merges.

    Args:
        merges: pairs of tokens, the lowest rank first; of two equal merges the first one counts.

    Raises:
        TypeError: a merge is not a pair of bytes.
        ValueError: a merge needs a token that has no id.
    """
    ranks: dict[Pair, int] = {}
    results: list[int] = []
    for rank, merge in enumerate(merges):
        try:
            left, right = merge
            pair, result = (ids[left], ids[right]), ids[left + right]
        except (KeyError, TypeError, ValueError):
            raise _merge_error(rank, merge, ids) from None
        ranks.setdefault(pair, rank)
        results.append(result)
    return MergeRules(_byte_ids(ids), ranks, results)


def rules_of_ranks(ids: Mapping[bytes, int], tokens: Mapping[int, bytes]) -> MergeRules:
    """The rules of tiktoken, where the ids are the ranks; a pre-token that is a token is not split."""
    results = range(max(tokens, default=-1) + 1)
    return MergeRules(_byte_ids(ids), JoinedRanks(ids, tokens), results, one_at_a_time=True, whole_tokens=ids)


def _byte_ids(ids: Mapping[bytes, int]) -> dict[int, int]:
    return {byte: ids[bytes([byte])] for byte in range(256) if bytes([byte]) in ids}


def _merge_error(rank: int, merge: tuple[bytes, bytes], ids: dict[bytes, int]) -> Exception:
    if not is_pair_of_bytes(merge):
        return TypeError(f"merge {rank} must be a pair of bytes, got {merge!r}")
    left, right = merge
    missing = next(token for token in (left, right, left + right) if token not in ids)
    return ValueError(f"merge {rank}, {merge!r}, needs the token {missing!r}, which is not in the vocabulary")


def is_pair_of_bytes(merge: object) -> bool:
    """Whether something is a merge: the left and the right token."""
    return isinstance(merge, tuple | list) and len(merge) == 2 and all(isinstance(token, bytes) for token in merge)


class PretokenCache(dict[str, tuple[int, ...]]):
    """Maps each pre-token to its ids, which are computed at the first lookup. A full cache is emptied.

    Args:
        max_pretokens: the largest number of pre-tokens in the cache.

    Raises:
        ValueError: (at a lookup) a byte of the pre-token has no token, or the pre-token is too long.
    """

    def __init__(self, rules: MergeRules, *, max_pretokens: int = MAX_CACHED_PRETOKENS) -> None:
        self.rules, self._max_pretokens = rules, max_pretokens

    def __missing__(self, pretoken: str) -> tuple[int, ...]:
        rules = self.rules
        data = pretoken.encode()
        if len(data) > arrays.MAX_PRETOKEN_BYTES:
            raise ValueError(arrays.describe_long_pretoken(pretoken[:40]))
        if (whole := rules.whole_tokens.get(data)) is not None:
            merged = (whole,)
        else:
            try:
                ids = [rules.byte_ids[byte] for byte in data]
            except KeyError as error:
                raise ValueError(
                    f"the vocabulary has no token for the byte 0x{error.args[0]:02x}, which {pretoken[:40]!r} needs; "
                    "encode with errors='replace', or train a tokenizer with all 256 bytes"
                ) from None
            merged = tuple(apply_merges(ids, rules.ranks, rules.results, rules.one_at_a_time))
        if len(pretoken) <= _MAX_CACHED_CHARACTERS:
            if len(self) >= self._max_pretokens:
                self.clear()
            self[pretoken] = merged
        return merged

    def encode(self, pretokens: Iterable[str]) -> list[int]:
        """The ids of consecutive pre-tokens.

        Raises:
            InvalidByteError: a byte has no token; it has the index of the first one in the joined pre-tokens.
            ValueError: a pre-token is too long.
        """
        try:
            return list(chain.from_iterable(map(self.__getitem__, pretokens)))
        except ValueError:
            start = 0
            for data in map(str.encode, pretokens):
                for index, byte in enumerate(data if data not in self.rules.whole_tokens else b""):
                    if byte not in self.rules.byte_ids:
                        raise InvalidByteError(start + index, "no token") from None
                start += len(data)
            raise


def apply_merges(ids: list[int], ranks: PairRanks, results: Sequence[int], one_at_a_time: bool = False) -> list[int]:
    """Apply merges to a pre-token, in place: the lowest rank first, from left to right, until none applies.

    Returns:
        The ids of the pre-token.

    Source: Sennrich et al. 2016, algorithm 1, applied to one word.
    """
    if len(ids) <= _SHORT_BYTES:
        return merge_short(ids, ranks, results, one_at_a_time)
    return (merge_long_one_at_a_time if one_at_a_time else merge_long)(ids, ranks, results)


def merge_short(
    ids: list[int], ranks: PairRanks, results: Sequence[int], one_at_a_time: bool = False, *, fewest: int = 1
) -> list[int]:
    """`apply_merges` by definition, in time quadratic in the length: the fastest way for everyday lengths.

    Args:
        fewest: where one merge is applied at a time, the number of ids at which it stops.
    """
    no_rank = len(results)
    pair_ranks = [ranks.get(pair, no_rank) for pair in pairwise(ids)]
    while len(pair_ranks) >= fewest and (rank := min(pair_ranks)) < no_rank:
        while rank in pair_ranks:
            i = pair_ranks.index(rank)
            ids[i : i + 2] = [results[rank]]
            del pair_ranks[i]
            if i > 0:
                pair_ranks[i - 1] = ranks.get((ids[i - 1], ids[i]), no_rank)
            if i < len(pair_ranks):
                pair_ranks[i] = ranks.get((ids[i], ids[i + 1]), no_rank)
            if one_at_a_time:
                break
    return ids


def merge_long(ids: list[int], ranks: PairRanks, results: Sequence[int]) -> list[int]:
    """`apply_merges` in almost linear time, each merge at all its positions.

    The positions of the pairs are listed by rank, and a heap holds the ranks. A merge writes its result at the position
    of the left id; `right_of` and `left_of` then skip the position of the right id. Positions where the pair no longer
    exists stay in the lists and are skipped.
    """
    right_of, left_of = array("q", range(1, len(ids) + 1)), array("q", range(-1, len(ids)))
    ids.append(_NO_ID)  # to the right of the last position and, as ids[-1], to the left of the first
    positions: dict[int, array[int]] = defaultdict(partial(array, "q"))
    for position, pair in enumerate(pairwise(ids)):
        if (rank := ranks.get(pair)) is not None:
            positions[rank].append(position)
    heap = list(positions)
    heapq.heapify(heap)
    while heap:
        rank = heapq.heappop(heap)
        result = results[rank]
        with_rank = positions.pop(rank)
        np.frombuffer(with_rank, np.int64).sort()
        for position in with_rank:
            right = right_of[position]
            if ranks.get((ids[position], ids[right])) != rank:
                continue
            ids[position], ids[right] = result, _NO_ID
            before, after = left_of[position], right_of[right]
            right_of[position], left_of[after] = after, position
            for new_position, pair in ((before, (ids[before], result)), (position, (result, ids[after]))):
                if (new_rank := ranks.get(pair)) is None:
                    continue
                if new_rank not in positions:
                    heapq.heappush(heap, new_rank)
                positions[new_rank].append(new_position)
    return [token_id for token_id in ids if token_id != _NO_ID]


def merge_long_one_at_a_time(ids: list[int], ranks: PairRanks, results: Sequence[int]) -> list[int]:
    """`apply_merges` in almost linear time, one merge at a time: a heap holds the rank and the position of each pair.

    An entry whose pair no longer exists is skipped. The symbols are linked as in `merge_long`.
    """
    length = len(ids)
    right_of, left_of = array("q", range(1, length + 1)), array("q", range(-1, length))
    heap = [(rank, i) for i, pair in enumerate(pairwise(ids)) if (rank := ranks.get(pair)) is not None]
    heapq.heapify(heap)
    while heap:
        rank, position = heapq.heappop(heap)
        right = right_of[position]
        if ids[position] == _NO_ID or right == length or ranks.get((ids[position], ids[right])) != rank:
            continue
        ids[position], ids[right] = results[rank], _NO_ID
        before, after = left_of[position], right_of[right]
        right_of[position], left_of[after] = after, position
        for left, right in ((before, position), (position, after)):
            if left >= 0 and right < length and (new_rank := ranks.get((ids[left], ids[right]))) is not None:
                heapq.heappush(heap, (new_rank, left))
    return [token_id for token_id in ids if token_id != _NO_ID]
