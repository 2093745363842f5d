"""Training byte-pair encoding: which pairs of tokens to merge, learned from how often they stand together.

A text is counted once into pre-tokens (`basic.corpus.counting`); from then on only the distinct ones matter.
"""

from __future__ import annotations

import heapq
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from itertools import pairwise

from basic.bpe import arrays, compiled, loading
from basic.bpe.arrays import PretokenCounts
from basic.common.progress import progress_bar
from basic.corpus.counting import count_words
from basic.corpus.sources import Inputs
from basic.pretokenization import SpecialTokens

Pair = tuple[int, int]

_BOUNDARY = -1  # stands between the words, where nothing is merged
_MERGED = -2  # the place of a token that is now part of the one to its left


def train_bpe(
    inputs: Inputs,
    vocab_size: int,
    special_tokens: Iterable[str],
    *,
    pattern: str | None = None,
    executor: Executor | None = None,
    work_folder: str | os.PathLike | None = None,
    start_over: bool = False,
    min_count: int = 1,
    num_workers: int | None = None,
    shard_bytes: int | None = None,
    kernels: bool | None = None,
    progress: bool = False,
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """Train a byte-pair encoding on text of any size.

    Args:
        inputs: text in UTF-8, read as it is (newlines are not translated): a file, a glob, a URL, or several of them;
            also compressed or as JSON lines (`basic.corpus.sources`).
        vocab_size: the number of tokens wanted, at least 256 plus the special tokens. There are fewer where
            the text runs out of pairs.
        special_tokens: strings that are never split and across which nothing is merged.
        pattern: finds the pre-tokens, in the syntax of the `regex` package; GPT-2's by default.
        executor, work_folder, start_over, shard_bytes: what counts, where, and how much at a time, see
            `basic.corpus.counting.count_words`; the result does not depend on it. A folder that holds the counts
            serves any `vocab_size` and `min_count`.
        min_count: words that are there less often in all of the text take no part. That saves time and memory where
            the distinct words are many; by default all of them do.
        num_workers: threads or processes that count, by default one a processor; the result does not depend on it.
        kernels: whether to use compiled code; by default where the text is large. The result is the same.
        progress: whether to show progress bars.

    Returns:
        The vocabulary (ids: the special tokens in the order given, the 256 bytes, the merges in order) and the
        merges, pairs of tokens, in order.

    Raises:
        ValueError: `vocab_size` is too small, a special token is empty or given twice, the file is not UTF-8.
        TypeError: a special token is not a string.
        OSError: the file cannot be read.

    Source: Sennrich et al. 2016, over bytes with the pre-tokens of Radford et al. 2019; handout, BPE training.
    """
    special = SpecialTokens(special_tokens)
    first_tokens = [token.encode() for token in special.tokens] + [bytes([byte]) for byte in range(256)]
    if vocab_size < len(first_tokens):
        raise ValueError(
            f"vocab_size={vocab_size} is too small: the 256 bytes and {len(special.tokens)} special tokens "
            f"need at least {len(first_tokens)}"
        )
    words = count_words(
        inputs,
        special,
        pattern=pattern,
        executor=executor,
        work_folder=work_folder,
        start_over=start_over,
        min_count=min_count,
        num_workers=num_workers,
        shard_bytes=shard_bytes,
        kernels=kernels,
        progress=progress,
    )
    merges = _merges_from_words(words, vocab_size - len(first_tokens), kernels=kernels, progress=progress)
    tokens = first_tokens + [left + right for left, right in merges]
    return dict(enumerate(tokens)), merges


def merges_from_counts(
    counts: Mapping[bytes, int], num_merges: int, *, kernels: bool | None = None, progress: bool = False
) -> list[tuple[bytes, bytes]]:
    """Learn merges from how often each word is there.

    At each step the most frequent pair of neighbouring tokens is merged wherever it stands, from left to right;
    among equally frequent pairs the one with the greatest (left bytes, right bytes).

    Args:
        counts: words (pre-tokens) and how often each is there, at least 0.
        num_merges: the most merges to learn, at least 0; fewer where no pair is left.
        kernels: whether to use compiled code; by default where the words are many. The result is the same.
        progress: whether to show a progress bar.

    Returns:
        The merges, in order.

    Example:
        >>> merges_from_counts({b"low": 5, b"lower": 2, b"widest": 3, b"newest": 6}, 3)
        [(b's', b't'), (b'e', b'st'), (b'o', b'w')]
    """
    if num_merges < 0:
        raise ValueError(f"num_merges={num_merges} must be at least 0")
    for word, count in counts.items():
        if not isinstance(word, bytes):
            raise TypeError(f"words must be bytes, got {word!r}; encode text first")
        if count < 0:
            raise ValueError(f"the count of {word!r} is {count}; it must be at least 0")
    return _merges_from_words(counts, num_merges, kernels=kernels, progress=progress)


def _merges_from_words(
    words: Mapping[bytes, int] | PretokenCounts, num_merges: int, *, kernels: bool | None, progress: bool
) -> list[tuple[bytes, bytes]]:
    with progress_bar(progress, desc="merging", total=num_merges, unit=" merges") as advance:
        if (arrays := _for_kernels(words, kernels)) is not None:
            return compiled.learn_merges(arrays, num_merges, advance)
        state = _MergeState(words if isinstance(words, Mapping) else words.to_counter())
        merges = []
        while len(merges) < num_merges and (pair := state.pop_best()) is not None:
            merges.append((state.tokens[pair[0]], state.tokens[pair[1]]))
            state.merge(pair)
            advance(1)
        return merges


def _for_kernels(words: Mapping[bytes, int] | PretokenCounts, kernels: bool | None) -> PretokenCounts | None:
    """The words as arrays, None where the plain path shall merge them: they are few, or the numbers too large."""
    if kernels is False:
        return None
    if isinstance(words, Mapping):
        words = {word: count for word, count in words.items() if count > 0 and len(word) > 1}
        num_bytes = sum(map(len, words))
        # No sum of pair counts can be larger than this.
        most = sum(count * len(word) for word, count in words.items())
        if not (kernels or loading.kernels_pay_off("training", 4 * num_bytes)) or most >= 1 << 63:
            return None
        words = PretokenCounts.from_counts(words)
    elif not (kernels or loading.kernels_pay_off("training", 4 * len(words.data))):
        return None
    if len(words.data) + len(words.counts) >= arrays.MAX_SYMBOLS:
        raise ValueError(
            f"{len(words.counts):,} distinct words of {len(words.data):,} bytes are too many to train on: they must be "
            f"less than {arrays.MAX_SYMBOLS:,} bytes and words; leave out the rare ones (min_count=2, or more)"
        )
    return words


class _MergeState:
    """All words as they are after the merges so far, and how often each pair of tokens stands in them.

    The words lie one after the other in one list, a boundary around each. A merge puts the new token into the
    place of the left one and takes the place of the right one out of the chain of neighbours, so that it costs
    as much as the pair has occurrences, however long the words are:

        place     0   1   2   3   4        merge s, t       0   1   2   3   4
        token     |   e   s   t   |           --->          |   e   st  -   |
        right     1   2   3   4                             1   2   4       -

    A token is known by its number, as good as its bytes: what becomes of a stretch of bytes whose ends no token
    crosses does not depend on what is around it, so that no two merges ever make the same bytes.
    """

    def __init__(self, counts: Mapping[bytes, int]):
        self.tokens = [bytes([byte]) for byte in range(256)]
        self._order = [_descending(token) for token in self.tokens]

        self._token_at = [_BOUNDARY]
        self._count_at = [0]  # of the word that the place lies in
        for word, count in counts.items():
            if count > 0 and len(word) > 1:
                self._token_at += [*word, _BOUNDARY]
                self._count_at += [count] * (len(word) + 1)
        self._left_of = list(range(-1, len(self._token_at) - 1))
        self._right_of = list(range(1, len(self._token_at) + 1))

        self._pair_counts: Counter[Pair] = Counter()
        self._places: defaultdict[Pair, list[int]] = defaultdict(list)  # also places where the pair is no more
        for place, pair in enumerate(pairwise(self._token_at)):
            if _BOUNDARY not in pair:
                self._pair_counts[pair] += self._count_at[place]
                self._places[pair].append(place)
        self._heap = [self._heap_entry(pair) for pair in self._pair_counts]
        heapq.heapify(self._heap)

    def pop_best(self) -> Pair | None:
        """The pair to be merged next, None where there is no pair.

        A pair gets its entry in the heap in the step that makes it; from then on its count can only fall. Entries
        are not corrected: one that turns up with an old count goes back with the present one.
        """
        while self._heap:
            entry = heapq.heappop(self._heap)
            pair = entry[-1]
            if -entry[0] == self._pair_counts[pair]:
                return pair
            if self._pair_counts[pair] > 0:
                heapq.heappush(self._heap, self._heap_entry(pair))
        return None

    def merge(self, pair: Pair) -> None:
        """Merge the pair wherever it stands, and correct the counts of the pairs with its neighbours."""
        left, right = pair
        new = len(self.tokens)
        self.tokens.append(self.tokens[left] + self.tokens[right])
        self._order.append(_descending(self.tokens[new]))
        token_at, left_of, right_of = self._token_at, self._left_of, self._right_of
        pair_counts, places = self._pair_counts, self._places
        made = set()
        for place in places.pop(pair):  # from left to right, as they were found
            right_place = right_of[place]
            if token_at[place] != left or token_at[right_place] != right:
                continue  # merged into something else since, or just now: in "aaa" there is one "aa"
            before, after = left_of[place], right_of[right_place]
            count = self._count_at[place]
            token_at[place], token_at[right_place] = new, _MERGED
            right_of[place], left_of[after] = after, place
            pair_counts[pair] -= count
            if (neighbour := token_at[before]) != _BOUNDARY:
                pair_counts[neighbour, left] -= count
                pair_counts[neighbour, new] += count
                places[neighbour, new].append(before)
                made.add((neighbour, new))
            if (neighbour := token_at[after]) != _BOUNDARY:
                pair_counts[right, neighbour] -= count
                pair_counts[new, neighbour] += count
                places[new, neighbour].append(place)
                made.add((new, neighbour))
        for made_pair in made:
            if pair_counts[made_pair] > 0:  # in "abab" the first "ab" makes a pair with "a" that the second ends
                heapq.heappush(self._heap, self._heap_entry(made_pair))

    def _heap_entry(self, pair: Pair) -> tuple[int, str, str, Pair]:
        """Smallest first: the highest count, then the greatest bytes."""
        left, right = pair
        return -self._pair_counts[pair], self._order[left], self._order[right], pair


def _descending(token: bytes) -> str:
    """A key that sorts tokens from the greatest to the smallest; at its end is more than any byte gives, so that a
    token comes after its continuations."""
    return "".join([chr(255 - byte) for byte in token]) + "\u0100"
