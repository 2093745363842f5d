"""The way to the kernels: when they are worth their start, how they are started, and threads that run them.

`python -m basic.bpe.compiled` compiles them ahead of their use. The plain functions of `basic.pretokenization`,
`basic.train_bpe` and `basic.Tokenizer` are their readable twins, with the same results; small texts never come here:

    bpe_scan      where words begin        |
    bpe_words     the table of words       |  all of them arrays and Numba;
    bpe_count     scan, look up, add one   |  this module imports them
    bpe_sort      sort words, add up equal |  when they are needed
    bpe_merge     learn merges from counts |
    bpe_encode    scan, look up, copy ids  |
    bpe_decode    ids to bytes             |

Kernels run without the interpreter's lock. Threads need no copies of text and counts, as
processes would. Each has its own table; the result does not depend on their number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from basic.bpe.arrays import Chunk, InvalidByteError, PretokenCounts, bytes_array, special_token_arrays
from basic.bpe.loading import load_kernels

if TYPE_CHECKING:
    from basic.bpe.kernels.encode import PretokenEncoder


_MERGES_AT_ONCE = 1000
# A thread's table with as many words takes 128 MB, and has room for those of another chunk.
_MOST_WORDS = 1_300_000

T = TypeVar("T")
R = TypeVar("R")


def count_pretokens_in_chunks(
    chunks: Iterable[Chunk], special_tokens: Sequence[bytes], num_threads: int, advance: Callable[[int], object]
) -> Iterator[PretokenCounts]:
    """Count the words of chunks, which must begin and end where words do.

    Args:
        special_tokens: the longest first.
        advance: is told the bytes of a chunk that is done.

    Yields:
        Sorted tables, in which a word has more than one count: they are put out before they are large, so that memory
        does not grow with the text.

    Raises:
        InvalidByteError: the bytes are not UTF-8; of several places the first.
    """
    load_kernels("training")
    from basic.bpe.kernels.count import PretokenCounter
    from basic.bpe.kernels.scan import code_classes
    from basic.bpe.kernels.sort import sort_and_sum

    idle: list[PretokenCounter] = []
    specials = special_token_arrays(special_tokens)

    def count(chunk: Chunk) -> tuple[int | None, PretokenCounts | None, int]:
        counter = idle.pop() if idle else PretokenCounter(code_classes(), specials)
        wrong, full = counter.add_text(*chunk), None
        if counter.num_words > _MOST_WORDS:
            full = sort_and_sum(counter.words())
        else:
            idle.append(counter)
        return wrong, full, chunk[2] - chunk[1]

    for wrong, full, num_bytes in _in_order(count, chunks, num_threads):
        if wrong is not None:
            raise InvalidByteError(wrong)
        if full is not None:
            yield full
        advance(num_bytes)
    for counter in idle:
        yield sort_and_sum(counter.words())


def sort_pretokens(words: PretokenCounts) -> PretokenCounts:
    """The words in ascending order of their bytes, equal ones as one with the sum of their counts."""
    load_kernels("training")
    from basic.bpe.kernels.sort import sort_and_sum

    return sort_and_sum(words)


def _in_order(function: Callable[[T], R], items: Iterable[T], num_threads: int) -> Iterator[R]:
    """Map in threads; only a few results wait to be taken."""
    if num_threads == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(num_threads) as executor:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(executor.submit(function, item))
                if len(waiting) > 2 * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def learn_merges(words: PretokenCounts, num_merges: int, advance: Callable[[int], object]) -> list[tuple[bytes, bytes]]:
    """Learn merges from words of together less than 2**31 bytes and words, whose counts add up to less than 2**63.

    Args:
        advance: is told now and then how many more merges there are.
    """
    load_kernels("training")
    from basic.bpe.kernels.learn_merges import MergeLearner

    learner = MergeLearner(words, num_merges)
    learned = 0
    while True:
        # Not all at once, so that the bar moves and the user can interrupt.
        now = learner.learn(learned + _MERGES_AT_ONCE)
        advance(now - learned)
        if now < learned + _MERGES_AT_ONCE:
            return learner.merges()
        learned = now


class KernelEncoder:
    """Encodes and decodes for one tokenizer, for any number of threads at a time.

    Args:
        byte_ids: byte to id.
        ranks: pair of ids to its place among the merges.
        results: the id that each merge makes.
        tokens: id to bytes.
        special_tokens: bytes and id of each, the longest first.
        dtype: of the ids, uint16 or uint32.
    """

    def __init__(
        self,
        byte_ids: dict[int, int],
        ranks: dict[tuple[int, int], int],
        results: list[int],
        tokens: dict[int, bytes],
        special_tokens: Sequence[tuple[bytes, int]],
        dtype: np.dtype,
    ) -> None:
        load_kernels("encoding")
        from basic.bpe.kernels.apply_merges import merges_as_arrays
        from basic.bpe.kernels.decode import TokenBytes

        self._merges, self.dtype = merges_as_arrays(byte_ids, ranks, results), dtype
        self._specials = (
            *special_token_arrays([token for token, _ in special_tokens]),
            np.array([token_id for _, token_id in special_tokens], np.int64),
        )
        self._no_specials = (*special_token_arrays([]), np.zeros(0, np.int64))
        self._idle: list[PretokenEncoder] = []
        self.decode = TokenBytes(tokens).decode

    def _encoder(self) -> PretokenEncoder:
        """One that no thread uses; who is done gives it back to the idle ones."""
        from basic.bpe.kernels.encode import PretokenEncoder
        from basic.bpe.kernels.scan import code_classes

        try:
            return self._idle.pop()
        except IndexError:
            return PretokenEncoder(code_classes(), self._merges, self.dtype)

    def encode_list(self, data: np.ndarray, specials_as_text: bool) -> list[int]:
        """The ids of a text.

        Raises:
            InvalidByteError: see there.
        """
        encoder = self._idle.pop() if self._idle else self._encoder()
        ids = encoder.encode(data, 0, len(data), self._no_specials if specials_as_text else self._specials).tolist()
        self._idle.append(encoder)
        return ids

    def encode_chunks(
        self, chunks: Iterable[Chunk], specials_as_text: bool, num_threads: int, *, replace: bool = False
    ) -> Iterator[tuple[np.ndarray, int]]:
        """The ids of each chunk and its bytes, in order; chunks must begin and end where words do.

        Args:
            replace: whether bytes that are not UTF-8 become U+FFFD.

        Raises:
            InvalidByteError: see there; of several places the first.
        """
        from basic.bpe.kernels.encode import SMALL_BYTES

        specials = self._no_specials if specials_as_text else self._specials

        def encode(chunk: Chunk) -> tuple[np.ndarray, int]:
            encoder = self._encoder()
            try:
                ids = encoder.encode(*chunk, specials)
            except InvalidByteError as error:
                if not replace or error.lacks_token:
                    raise
                data, start, stop = chunk
                repaired = bytes_array(data[start:stop].tobytes().decode(errors="replace").encode())
                ids = encoder.encode(repaired, 0, len(repaired), specials)
            if chunk[2] - chunk[1] <= SMALL_BYTES:
                ids = ids.copy()  # the array is the encoder's
            self._idle.append(encoder)
            return ids, chunk[2] - chunk[1]

        return _in_order(encode, chunks, num_threads)
