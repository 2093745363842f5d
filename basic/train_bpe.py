"""Train byte-pair encoding: learn from text which pairs of tokens to merge.

The text is first counted: `build_count_table` splits text of any size into pre-tokens and returns the distinct ones
with their counts, as `Counter(GPT2_PATTERN.find(text))` would. The rest of the training needs only these counts. The
plain algorithm is `_MergeState`; `basic.bpe.kernels.merges.learn_merges` is its compiled version.
"""

from __future__ import annotations

import heapq
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from basic.bpe import compiled, loading
from basic.bpe.arrays import MAX_SYMBOLS, PretokenCounts
from basic.bpe.plain import NumberedMerges, number_merges
from basic.common.arguments import check_integer, check_size
from basic.common.errors import InvalidInputError
from basic.common.progress import progress_bar
from basic.corpus.counting import CountingOptions, build_count_table
from basic.corpus.sources import Inputs
from basic.pretokenization import Pattern, SpecialTokens

__all__ = ["learn_more_merges", "merges_from_counts", "train_bpe"]

Merge = tuple[bytes, bytes]
Pair = tuple[int, int]

_BOUNDARY = -1  # between two pre-tokens; nothing is merged with it
_MERGED = -2  # the position of a token that was merged into the one to its left


def train_bpe(
    inputs: Inputs,
    vocab_size: int,
    special_tokens: Iterable[str],
    *,
    pattern: str | Pattern | None = None,
    max_token_bytes: int | None = None,
    **options: Any,
) -> tuple[dict[int, bytes], list[Merge]]:
    """Train byte-pair encoding on text of any size.

    Args:
        inputs: UTF-8 text: a file, a glob, a URL, "-" for standard input, or several of them; also compressed, as JSON
            lines or as Parquet tables (`basic.corpus.sources`); or an iterator of strings, each of them a document.
            Newlines are not translated.
        vocab_size: the number of tokens, at least 256 plus the number of special tokens. The vocabulary is smaller if
            no pair is left to merge.
        special_tokens: strings that are never split; nothing is merged across them.
        pattern: finds the pre-tokens: a name, a regular expression or a `Pattern`, see
            `basic.pretokenization.resolve_pattern`.
        max_token_bytes: no longer token is learned, at least 1; by default there is no limit. Special tokens may be
            longer.
        options: fields of `basic.corpus.counting.CountingOptions`, such as `num_workers`, `progress`, `kernels`,
            `work_folder` and `min_count`.

    Returns:
        The vocabulary (ids: the special tokens in the order given, the 256 bytes, the merges in order), and the merges
        (pairs of tokens, in order).

    Raises:
        InvalidInputError: `vocab_size` or another number is too small, a special token is empty or given twice, or the
            text is not UTF-8.
        TypeError: `vocab_size` is not an integer, or a special token is not a string.
        OSError: a file cannot be read.

    Source: Sennrich et al. 2016, over bytes with the pre-tokens of Radford et al. 2019; assignment, BPE training.
    """
    vocab_size = check_integer("vocab_size", vocab_size)
    special = SpecialTokens(special_tokens)
    first_tokens = [token.encode() for token in special.tokens] + [bytes([byte]) for byte in range(256)]
    if vocab_size < len(first_tokens):
        raise InvalidInputError(
            f"vocab_size={vocab_size} is too small: the 256 bytes and {len(special.tokens)} special tokens "
            f"need at least {len(first_tokens)}"
        )
    merges = learn_more_merges(
        inputs,
        vocab_size - len(first_tokens),
        (),
        special.tokens,
        pattern=pattern,
        max_token_bytes=max_token_bytes,
        **options,
    )
    tokens = first_tokens + [left + right for left, right in merges]
    return dict(enumerate(tokens)), merges


def learn_more_merges(
    inputs: Inputs,
    num_merges: int,
    merges: Iterable[Merge],
    special_tokens: Iterable[str],
    *,
    pattern: str | Pattern | None = None,
    max_token_bytes: int | None = None,
    **options: Any,
) -> list[Merge]:
    """Continue the training of a tokenizer on another text: learn merges that come after its own.

    The text is first encoded with the merges that are given. `Tokenizer.with_merges` takes the result.

    Args:
        inputs, special_tokens, max_token_bytes, options: as for `train_bpe`.
        num_merges: the largest number of merges to learn, at least 0; there are fewer if no pair is left.
        merges: of the tokenizer, in order; if several make the same token, those that are used
            (`Tokenizer.used_merges.merges`).

    Returns:
        The new merges, in order.

    Raises:
        InvalidInputError, TypeError, OSError: as for `train_bpe`; also if several merges make a token that another one
            needs before.
    """
    learning = _Learning.checked(num_merges, merges, max_token_bytes)
    counting = CountingOptions(**options)
    counts = build_count_table(inputs, SpecialTokens(special_tokens), counting, pattern=pattern)
    return _learn_merges(counts, learning, kernels=counting.kernels, progress=counting.progress)


def merges_from_counts(
    counts: Mapping[bytes, int],
    num_merges: int,
    *,
    first_merges: Iterable[Merge] = (),
    max_token_bytes: int | None = None,
    kernels: bool | None = None,
    progress: bool = False,
) -> list[Merge]:
    """Learn merges from pre-tokens and their counts.

    Each step merges the most frequent pair of neighboring tokens at all its positions, from left to right. Of several
    equally frequent pairs it takes the one with the greatest (left bytes, right bytes).

    Args:
        counts: pre-token to count, at least 0.
        num_merges: the largest number of merges, at least 0; there are fewer if no pair is left.
        max_token_bytes: no longer token is learned, at least 1; by default there is no limit.
        kernels: whether to use compiled code; by default if there are many pre-tokens. The result is the same.

    Returns:
        The merges, in order.

    Raises:
        InvalidInputError: a number is too small, several first merges make a token that another needs before, or there
            are too many pre-tokens.
        TypeError: a pre-token is not bytes.

    Examples:
        >>> merges_from_counts({b"low": 5, b"lower": 2, b"widest": 3, b"newest": 6}, 3)
        [(b's', b't'), (b'e', b'st'), (b'o', b'w')]
    """
    learning = _Learning.checked(num_merges, first_merges, max_token_bytes)
    for pretoken, count in counts.items():
        if not isinstance(pretoken, bytes):
            raise TypeError(f"pre-tokens must be bytes, got {pretoken!r}; encode text first")
        if count < 0:
            raise InvalidInputError(f"the count of {pretoken!r} is {count}; it must be at least 0")
    return _learn_merges(counts, learning, kernels=kernels, progress=progress)


class _Learning(NamedTuple):
    """What to learn; see `merges_from_counts`."""

    num_merges: int
    first_merges: NumberedMerges
    max_token_bytes: int | None

    @classmethod
    def checked(cls, num_merges: int, first_merges: Iterable[Merge], max_token_bytes: int | None) -> _Learning:
        num_merges = check_integer("num_merges", num_merges)
        if num_merges < 0:
            raise InvalidInputError(f"num_merges={num_merges} must be at least 0")
        if max_token_bytes is not None:
            check_size("max_token_bytes", max_token_bytes)
        try:
            return cls(num_merges, number_merges(first_merges), max_token_bytes)
        except ValueError as error:
            raise InvalidInputError(str(error)) from None


def _learn_merges(
    counts: Mapping[bytes, int] | PretokenCounts, learning: _Learning, *, kernels: bool | None, progress: bool
) -> list[Merge]:
    num_merges, first_merges, max_token_bytes = learning
    with progress_bar(progress, desc="merging", total=num_merges, unit=" merges") as advance:
        if (pretokens := arrays_for_kernels(counts, kernels)) is not None:
            return compiled.learn_merges(
                pretokens, num_merges, advance, first_merges=first_merges, max_token_bytes=max_token_bytes
            )
        state = _MergeState(counts if isinstance(counts, Mapping) else counts.to_counter(), max_token_bytes)
        state.apply(first_merges)
        merges = []
        while len(merges) < num_merges and (pair := state.pop_best_pair()) is not None:
            merges.append((state.tokens[pair[0]], state.tokens[pair[1]]))
            state.merge(pair, state.add_token(pair))
            advance(1)
        return merges


def arrays_for_kernels(
    counts: Mapping[bytes, int] | PretokenCounts, kernels: bool | None, *, max_symbols: int = MAX_SYMBOLS
) -> PretokenCounts | None:
    """Choose between the kernel and the plain path.

    Args:
        max_symbols: the kernel takes fewer bytes and pre-tokens than this.

    Returns:
        The counts as arrays, or None for the plain path: there are few pre-tokens, or the counts are too large.

    Raises:
        InvalidInputError: there are too many pre-tokens.
    """
    if kernels is False:
        return None
    if isinstance(counts, Mapping):
        counts = {pretoken: count for pretoken, count in counts.items() if count > 0 and len(pretoken) > 1}
        num_bytes = sum(map(len, counts))
        # No sum of pair counts can be larger than this.
        largest_sum = sum(count * len(pretoken) for pretoken, count in counts.items())
        if not (kernels or loading.kernels_pay_off("training", 4 * num_bytes)) or largest_sum >= 1 << 63:
            return None
        counts = PretokenCounts.from_counts(counts)
    elif not (kernels or loading.kernels_pay_off("training", 4 * len(counts.data))):
        return None
    if len(counts.data) + len(counts.counts) >= max_symbols:
        raise InvalidInputError(
            f"{len(counts.counts):,} distinct pre-tokens of {len(counts.data):,} bytes are too many to train on: the "
            f"sum of both must be less than {max_symbols:,}; leave out rare pre-tokens (min_count=2, or more)"
        )
    return counts


class _MergeState:
    """All pre-tokens after the merges so far, and the counts of their pairs of tokens.

    The tokens of all pre-tokens are in one list, with a boundary before and after each pre-token. A merge writes the
    new token at the position of the left one, and removes the position of the right one from the linked list of
    neighbors. So its cost is the number of occurrences of the pair, however long the pre-tokens are:

        position    0   1   2   3   4        merge s, t       0   1   2   3   4
        token       |   e   s   t   |           --->          |   e   st  -   |
        right       1   2   3   4                             1   2   4       -

    Tokens are compared by number instead of by bytes. This is correct because no two merges produce the same bytes:
    what is merged inside a token does not depend on the text around it, so equal bytes result from equal merges. (Of
    given merges with the same result, at most one is ever applied.)
    """

    def __init__(self, counts: Mapping[bytes, int], max_token_bytes: int | None = None):
        self.tokens = [bytes([byte]) for byte in range(256)]
        self._max_token_bytes = sys.maxsize if max_token_bytes is None else max_token_bytes
        self._sort_keys = [_descending_key(token) for token in self.tokens]

        self._token_at = [_BOUNDARY]
        self._count_at = [0]  # of the pre-token at this position
        for pretoken, count in counts.items():
            if count > 0 and len(pretoken) > 1:
                self._token_at += [*pretoken, _BOUNDARY]
                self._count_at += [count] * (len(pretoken) + 1)
        self._left_of = list(range(-1, len(self._token_at) - 1))
        self._right_of = list(range(1, len(self._token_at) + 1))

        self._pair_counts: Counter[Pair] = Counter()
        self._positions: defaultdict[Pair, list[int]] = defaultdict(list)  # some no longer have the pair
        for position, pair in enumerate(pairwise(self._token_at)):
            if _BOUNDARY not in pair:
                self._pair_counts[pair] += self._count_at[position]
                self._positions[pair].append(position)
        self._heap = [self._heap_entry(pair) for pair in self._pair_counts if self._may_be_merged(pair)]
        heapq.heapify(self._heap)

    def apply(self, merges: NumberedMerges) -> None:
        """Apply merges at the beginning, in their order. What they leave in the heap is outdated."""
        for token in merges.tokens[256:]:
            self._append_token(token)
        for left, right, new in merges.triples:
            self.merge((left, right), new)

    def add_token(self, pair: Pair) -> int:
        """Add the token that merging a pair makes; return its number."""
        self._append_token(self.tokens[pair[0]] + self.tokens[pair[1]])
        return len(self.tokens) - 1

    def _append_token(self, token: bytes) -> None:
        self.tokens.append(token)
        self._sort_keys.append(_descending_key(token))

    def _may_be_merged(self, pair: Pair) -> bool:
        return len(self.tokens[pair[0]]) + len(self.tokens[pair[1]]) <= self._max_token_bytes

    def pop_best_pair(self) -> Pair | None:
        """The pair to merge next, or None if no pair is left.

        A pair is pushed to the heap in the step that creates it. After that step its count can only decrease, so an
        entry with an outdated count is pushed again with the current one.
        """
        while self._heap:
            entry = heapq.heappop(self._heap)
            pair = entry[-1]
            if -entry[0] == self._pair_counts[pair]:
                return pair
            if self._pair_counts[pair] > 0:
                heapq.heappush(self._heap, self._heap_entry(pair))
        return None

    def merge(self, pair: Pair, new: int) -> None:
        """Merge the pair to the token `new` at all its positions, and update the counts of the pairs next to it."""
        left, right = pair
        token_at, left_of, right_of = self._token_at, self._left_of, self._right_of
        pair_counts, positions = self._pair_counts, self._positions
        new_pairs = set()
        for position in positions.pop(pair, ()):  # from left to right, as they were added
            right_position = right_of[position]
            if token_at[position] != left or token_at[right_position] != right:
                continue  # merged in an earlier step, or in this one: "aaa" has only one "aa"
            before, after = left_of[position], right_of[right_position]
            count = self._count_at[position]
            token_at[position], token_at[right_position] = new, _MERGED
            right_of[position], left_of[after] = after, position
            pair_counts[pair] -= count
            if (neighbor := token_at[before]) != _BOUNDARY:
                pair_counts[neighbor, left] -= count
                pair_counts[neighbor, new] += count
                positions[neighbor, new].append(before)
                new_pairs.add((neighbor, new))
            if (neighbor := token_at[after]) != _BOUNDARY:
                pair_counts[right, neighbor] -= count
                pair_counts[new, neighbor] += count
                positions[new, neighbor].append(position)
                new_pairs.add((new, neighbor))
        for new_pair in new_pairs:
            # In "abab" the first "ab" makes ("ab", "a"), which the second one removes.
            if pair_counts[new_pair] > 0 and self._may_be_merged(new_pair):
                heapq.heappush(self._heap, self._heap_entry(new_pair))

    def _heap_entry(self, pair: Pair) -> tuple[int, str, str, Pair]:
        """The smallest entry is the pair with the highest count; of several, the one with the greatest bytes."""
        left, right = pair
        return -self._pair_counts[pair], self._sort_keys[left], self._sort_keys[right], pair


def _descending_key(token: bytes) -> str:
    """A key that sorts tokens in descending order.

    It ends in a character greater than that of any byte, so that a token comes after the tokens that start with it.
    """
    return "".join([chr(255 - byte) for byte in token]) + "\u0100"
