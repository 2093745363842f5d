"""Call the compiled kernels, in threads.

The plain functions of `basic.pretokenization`, `basic.train_bpe` and `basic.bpe.plain` are the readable versions, with
the same results. `basic.bpe.loading` decides which texts use the kernels:

    kernels/scan           find where pre-tokens start
    kernels/hash_table     the hash table of pre-tokens
    kernels/special_tokens find special tokens
    kernels/count          scan, look up, add one; sort pre-tokens, sum the counts of equal ones
    kernels/merges/        learn merges from counts; apply merges to a new pre-token
    kernels/encode         scan, look up, copy ids
    kernels/encoders       call it, for arrays and for short strings
    kernels/decode         ids to bytes

Numba compiles them once; `basic.common.native` keeps the machine code and loads it without Numba. They run without the
interpreter's lock, so threads run in parallel on the same text, where processes would need copies. Each thread has its
own hash table. The result does not depend on the number of threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from basic.bpe.arrays import Chunk, InvalidByteError, PretokenCounts, bytes_array, joined_bytes
from basic.bpe.loading import load_kernels
from basic.bpe.plain import MergeRules, NumberedMerges
from basic.common.progress import map_in_threads

if TYPE_CHECKING:
    from basic.bpe.kernels.encoders import PretokenEncoder
    from basic.bpe.patterns.automaton import Automaton

_MERGES_AT_A_TIME = 1000
# A thread's hash table with this many pre-tokens takes 128 MB, and can still hold those of another chunk.
MAX_PRETOKENS = 1_300_000

T = TypeVar("T")
R = TypeVar("R")


def count_pretokens_in_chunks(
    chunks: Iterable[Chunk],
    pattern: Automaton,
    special_tokens: Sequence[bytes],
    num_threads: int,
    advance: Callable[[int], object],
    *,
    max_pretokens: int = MAX_PRETOKENS,
) -> Iterator[PretokenCounts]:
    """Count the pre-tokens of chunks, which must start and end at safe positions.

    Args:
        advance: gets the number of bytes of each finished chunk.
        max_pretokens: a hash table with more is yielded, so that memory does not grow with the text.

    Yields:
        Sorted tables; a pre-token can be in several of them.

    Raises:
        InvalidByteError: the bytes are not UTF-8. It has the first such byte.
    """
    load_kernels("training")
    from basic.bpe.kernels.count import PretokenCounter, sort_and_sum
    from basic.bpe.kernels.scan import pattern_tables
    from basic.bpe.kernels.special_tokens import special_token_tables

    idle: list[PretokenCounter] = []
    tables = pattern_tables(pattern)
    specials = special_token_tables(special_tokens)

    def count(chunk: Chunk) -> tuple[int | None, PretokenCounts | None, int]:
        counter = idle.pop() if idle else PretokenCounter(tables, specials)
        invalid_offset, table = counter.add_text(*chunk), None
        if counter.num_pretokens > max_pretokens:
            table = sort_and_sum(counter.pretokens())
        else:
            idle.append(counter)
        return invalid_offset, table, chunk[2] - chunk[1]

    for invalid_offset, table, num_bytes in _map_in_order(count, chunks, num_threads):
        if invalid_offset is not None:
            raise InvalidByteError(invalid_offset)
        if table is not None:
            yield table
        advance(num_bytes)
    for counter in idle:
        yield sort_and_sum(counter.pretokens())


def sort_pretokens(pretokens: PretokenCounts) -> PretokenCounts:
    """Sort pre-tokens by their bytes; equal ones become one with the sum of their counts."""
    load_kernels("training")
    from basic.bpe.kernels.count import sort_and_sum

    return sort_and_sum(pretokens)


def _map_in_order(function: Callable[[T], R], items: Iterable[T], num_threads: int) -> Iterator[R]:
    if num_threads == 1:
        return map(function, items)
    return map_in_threads(function, items, num_threads, most_waiting=2 * num_threads)


def learn_merges(
    pretokens: PretokenCounts,
    num_merges: int,
    advance: Callable[[int], object],
    *,
    first_merges: NumberedMerges,
    max_token_bytes: int | None,
) -> list[tuple[bytes, bytes]]:
    """Learn merges from distinct pre-tokens.

    Args:
        pretokens: the sum of their number and their bytes is less than 2**31, that of their counts less than 2**63.
        advance: gets the number of new merges, now and then.
    """
    load_kernels("training")
    from basic.bpe.kernels.merges.learn_merges import MergeLearner

    learner = MergeLearner(pretokens, num_merges, first_merges, max_token_bytes)
    num_learned = 0
    while True:
        # Not all in one call, so that the progress bar moves and the user can interrupt.
        before, num_learned = num_learned, learner.learn(num_learned + _MERGES_AT_A_TIME)
        advance(num_learned - before)
        if num_learned < before + _MERGES_AT_A_TIME:
            return learner.merges()


class KernelEncoder:
    """Encodes with the kernels; several threads may use it at the same time.

    Attributes:
        strings: encodes short strings, with special tokens, as fast as possible: see `StringEncoder`.
    """

    def __init__(
        self, rules: MergeRules, pattern: Automaton, special_tokens: Sequence[tuple[bytes, int]], dtype: np.dtype
    ) -> None:
        load_kernels("encoding")
        from basic.bpe.kernels.encoders import StringEncoder
        from basic.bpe.kernels.merges.merge_arrays import merges_as_arrays
        from basic.bpe.kernels.scan import pattern_tables
        from basic.bpe.kernels.special_tokens import special_token_tables

        self._merges, self._pattern, self.dtype = merges_as_arrays(rules), pattern_tables(pattern), dtype
        self._specials = special_token_tables(
            [token for token, _ in special_tokens], [token_id for _, token_id in special_tokens]
        )
        self._no_specials = special_token_tables([])
        self._idle: list[PretokenEncoder] = []  # not in use by a thread
        self._idle_for_streams: list[PretokenEncoder] = []
        self.strings = StringEncoder(self._pattern, self._merges, dtype, self._specials)
        self._idle.append(self._take_encoder())

    def replace_strings(self, status: int) -> None:
        """Continue with another encoder of short strings after `strings.encode` has returned an int."""
        self.strings = self.strings.successor(status)

    def _take_encoder(self) -> PretokenEncoder:
        """An idle encoder or a new one; the caller returns it to the idle ones."""
        try:
            return self._idle.pop()
        except IndexError:
            from basic.bpe.kernels.encoders import PretokenEncoder

            return PretokenEncoder(self._pattern, self._merges, self.dtype)

    def last_merges(self, tokens: Sequence[bytes]) -> list[tuple[int, int] | None]:
        """The two ids that the last merge of each token joins, if one merge is applied at a time; None if none does.

        Raises:
            OverflowError: a token is longer than the kernel can merge.
        """
        from basic.bpe.kernels.merges.merge_arrays import last_merges

        lefts, rights = last_merges(self._merges, *joined_bytes(tokens))
        if (lefts == -2).any():
            raise OverflowError(f"a token has {max(map(len, tokens))} bytes")
        pairs = zip(lefts.tolist(), rights.tolist(), strict=True)
        return [None if pair[0] < 0 else pair for pair in pairs]

    def encode_list(self, data: np.ndarray, specials_as_text: bool) -> list[int]:
        """Encode a text to a list of ids.

        Args:
            specials_as_text: whether special tokens in the text are ordinary text.

        Raises:
            InvalidByteError: a byte is not UTF-8 or has no token.
        """
        encoder = self._take_encoder()
        ids = encoder.encode(data, 0, len(data), self._no_specials if specials_as_text else self._specials).tolist()
        self._idle.append(encoder)
        return ids

    @contextlib.contextmanager
    def stream_encoder(self, specials_as_text: bool) -> Generator[Callable[[np.ndarray], list[int]]]:
        """A function that encodes the texts of one stream as `encode_list`, with a cache of fixed size."""
        from basic.bpe.kernels.encoders import PretokenEncoder

        try:
            encoder = self._idle_for_streams.pop()
        except IndexError:
            encoder = PretokenEncoder(self._pattern, self._merges, self.dtype, max_slots=1 << 17, max_pool=1 << 16)
        specials = self._no_specials if specials_as_text else self._specials
        yield lambda data: encoder.encode(data, 0, len(data), specials).tolist()
        self._idle_for_streams.append(encoder)

    def encode_chunks(
        self,
        chunks: Iterable[Chunk],
        specials_as_text: bool,
        num_threads: int,
        *,
        errors: str = "strict",
        document_mark: tuple[bytes, int] | None = None,
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Encode chunks, which must start and end at safe positions.

        Args:
            errors: "strict" raises; "replace" encodes bytes that are not UTF-8 as U+FFFD.
            document_mark: the mark between documents and its id; it is the only special token then.

        Yields:
            The ids of each chunk and its size in bytes, in order.

        Raises:
            InvalidByteError: a byte is not UTF-8 or has no token. It has the first such byte.
        """
        from basic.bpe.kernels.encode import SMALL_BYTES
        from basic.bpe.kernels.special_tokens import special_token_tables

        specials = self._no_specials if specials_as_text else self._specials
        if document_mark is not None:
            specials = special_token_tables(document_mark[:1], document_mark[1:])

        def encode(chunk: Chunk) -> tuple[np.ndarray, int]:
            encoder = self._take_encoder()
            try:
                ids = encoder.encode(*chunk, specials)
            except InvalidByteError as error:
                if errors != "replace" or error.problem != "not UTF-8":
                    raise
                data, start, stop = chunk
                valid = bytes_array(data[start:stop].tobytes().decode(errors="replace").encode())
                ids = encoder.encode(valid, 0, len(valid), specials)
            if chunk[2] - chunk[1] <= SMALL_BYTES:
                ids = ids.copy()  # the encoder reuses the array
            self._idle.append(encoder)
            return ids, chunk[2] - chunk[1]

        return _map_in_order(encode, chunks, num_threads)
