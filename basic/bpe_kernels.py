"""The way to the kernels: when they are worth their start, how they are started, and threads that run them.

`python -m basic.bpe_kernels` compiles them ahead of their use. The plain functions of `basic.pretokenization`,
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

import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    from basic.bpe_encode import WordEncoder

# From here on the kernels are worth about a second to load them.
KERNEL_BYTES = 1 << 20

# LLVM ends the process where it gets no memory; this much is enough for Numba, its libraries and threads.
_ADDRESS_SPACE_BYTES = 2 << 30

# A vocabulary beyond this does not fit the encoder's table of merges (see ID_BITS and RANK_BITS there).
MAX_VOCAB_SIZE = (1 << 21) - 1
MAX_SYMBOLS = (1 << 31) - 1  # bytes and words that training numbers with 32 bits
_MERGES_AT_ONCE = 1000
# A thread's table with as many words takes 128 MB, and has room for those of another chunk.
_MOST_WORDS = 1_300_000

T = TypeVar("T")
R = TypeVar("R")
Chunk = tuple[np.ndarray, int, int]  # read-only bytes, start, stop

_lock = threading.RLock()
_loaded: set[str] = set()


class InvalidByteError(ValueError):
    """A byte that is not UTF-8, or that no token of the vocabulary is.

    Attributes:
        place: its index in the data.
        lacks_token: whether it is the second.
    """

    def __init__(self, place: int, lacks_token: bool = False) -> None:
        super().__init__(place)
        self.place, self.lacks_token = place, lacks_token


class Words(NamedTuple):
    """Distinct words and how often each is there.

    Attributes:
        data: the bytes of all words, one after the other (uint8).
        starts: where each begins, and the end of the last (int64).
        counts: of each (int64).
    """

    data: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    @classmethod
    def from_counts(cls, counts: Mapping[bytes, int]) -> Words:
        """The words of a mapping."""
        starts = np.zeros(len(counts) + 1, np.int64)
        np.cumsum([len(word) for word in counts], out=starts[1:])
        return cls(np.frombuffer(b"".join(counts), np.uint8), starts, np.array(list(counts.values()), np.int64))

    def counter(self) -> Counter[bytes]:
        """The words as a counter."""
        data, starts = self.data.tobytes(), self.starts.tolist()
        words = (data[start:stop] for start, stop in pairwise(starts))
        return Counter(dict(zip(words, self.counts.tolist(), strict=True)))


def worth_it(part: str, num_bytes: int, num_mapped_bytes: int = 0) -> bool:
    """Whether a text of this size should go to the kernels: it is large, or they are loaded anyway.

    Args:
        part: "training" or "encoding".
        num_bytes: of the text.
        num_mapped_bytes: how much address space the text will yet take.
    """
    if num_bytes < KERNEL_BYTES and part not in _loaded:
        return False
    return _has_address_space(num_mapped_bytes)


def _has_address_space(num_mapped_bytes: int) -> bool:
    try:
        import resource
    except ImportError:  # a system without such limits
        return True
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return True
    try:
        with open("/proc/self/statm", "rb") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return False
    return limit - used - num_mapped_bytes >= _ADDRESS_SPACE_BYTES


def load(part: str) -> None:
    """Make the kernels of a part ready, from the cache or by compiling them, which says so."""
    if part in _loaded:
        return
    with _lock:
        if part in _loaded:
            return
        from basic.bpe_machine import cache_folder

        folder = cache_folder()
        stamp = None if folder is None else folder / f"{part}.{'-'.join(sys.version.split()[:1])}"
        is_new = stamp is None or not stamp.exists()
        if is_new:
            print(
                f"basic: compiling the kernels for {part}"
                + (", once on this machine (ahead of time: python -m basic.bpe_kernels)" if stamp else ""),
                file=sys.stderr,
                flush=True,
            )
        start = time.perf_counter()
        {"training": _warm_up_training, "encoding": _warm_up_encoding}[part]()
        if is_new:
            print(f"basic: compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if stamp is not None and is_new:
            stamp.touch()
        _loaded.add(part)


def _warm_up_training() -> None:
    """Call each kernel once with the types that it will have."""
    from basic.bpe_count import WordCounter
    from basic.bpe_merge import MergeLearner
    from basic.bpe_sort import sorted_words

    data = _bytes_array(b"the cat and the dog, \xc3\xa9t\xc3\xa9 " + b"long" * 300)
    counter = WordCounter(code_classes(), special_arrays([b"<|endoftext|>"]))
    counter.add_text(data, 0, len(data))
    counter.grow()
    words = sorted_words(counter.words())
    learner = MergeLearner(words, 3)
    learner.grow(1 << 17)
    learner.learn(3)


def _warm_up_encoding() -> None:
    from basic.bpe_apply import merges_as_arrays
    from basic.bpe_decode import TokenBytes
    from basic.bpe_encode import WordEncoder

    data = _bytes_array(b"the cat and the dog, \xc3\xa9t\xc3\xa9 " + b"long" * 300)
    tokens = {i: bytes([i]) for i in range(256)} | {256: b"th", 257: b"the"}
    merges = merges_as_arrays({i: i for i in range(256)}, {(116, 104): 0, (256, 101): 1}, [256, 257])
    encoder = WordEncoder(code_classes(), merges, np.dtype(np.uint16))
    ids = encoder.encode(data, 0, len(data), (*special_arrays([b"<|endoftext|>"]), np.array([258])))
    encoder.grow()
    TokenBytes(tokens).decode(ids)


def _bytes_array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


@cache
def code_classes() -> np.ndarray:
    """The classes of characters, shared by all: filled as characters are met."""
    from basic.bpe_scan import new_classes

    return new_classes()


def special_arrays(tokens: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Special tokens for the scanner, the longest first: bytes, starts, and the bytes that they begin with."""
    starts = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    first_bytes = np.array(sorted({token[0] for token in tokens}), np.uint8)
    return _bytes_array(b"".join(tokens)), starts, first_bytes


def count_words(
    chunks: Iterable[Chunk], special_tokens: Sequence[bytes], num_threads: int, advance: Callable[[int], object]
) -> Iterator[Words]:
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
    load("training")
    from basic.bpe_count import WordCounter
    from basic.bpe_sort import sorted_words

    idle: list[WordCounter] = []
    specials = special_arrays(special_tokens)

    def count(chunk: Chunk) -> tuple[int | None, Words | None, int]:
        counter = idle.pop() if idle else WordCounter(code_classes(), specials)
        wrong, full = counter.add_text(*chunk), None
        if counter.num_words > _MOST_WORDS:
            full = sorted_words(counter.words())
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
        yield sorted_words(counter.words())


def sort_words(words: Words) -> Words:
    """The words in ascending order of their bytes, equal ones as one with the sum of their counts."""
    load("training")
    from basic.bpe_sort import sorted_words

    return sorted_words(words)


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


def learn_merges(words: Words, num_merges: int, advance: Callable[[int], object]) -> list[tuple[bytes, bytes]]:
    """Learn merges from words of together less than 2**31 bytes and words, whose counts add up to less than 2**63.

    Args:
        advance: is told now and then how many more merges there are.
    """
    load("training")
    from basic.bpe_merge import MergeLearner

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
        load("encoding")
        from basic.bpe_apply import merges_as_arrays
        from basic.bpe_decode import TokenBytes

        self._merges, self.dtype = merges_as_arrays(byte_ids, ranks, results), dtype
        self._specials = (
            *special_arrays([token for token, _ in special_tokens]),
            np.array([token_id for _, token_id in special_tokens], np.int64),
        )
        self._no_specials = (*special_arrays([]), np.zeros(0, np.int64))
        self._idle: list[WordEncoder] = []
        self.decode = TokenBytes(tokens).decode

    def _encoder(self) -> WordEncoder:
        """One that no thread uses; who is done gives it back to the idle ones."""
        from basic.bpe_encode import WordEncoder

        try:
            return self._idle.pop()
        except IndexError:
            return WordEncoder(code_classes(), self._merges, self.dtype)

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
        from basic.bpe_encode import SMALL_BYTES

        specials = self._no_specials if specials_as_text else self._specials

        def encode(chunk: Chunk) -> tuple[np.ndarray, int]:
            encoder = self._encoder()
            try:
                ids = encoder.encode(*chunk, specials)
            except InvalidByteError as error:
                if not replace or error.lacks_token:
                    raise
                data, start, stop = chunk
                repaired = _bytes_array(data[start:stop].tobytes().decode(errors="replace").encode())
                ids = encoder.encode(repaired, 0, len(repaired), specials)
            if chunk[2] - chunk[1] <= SMALL_BYTES:
                ids = ids.copy()  # the array is the encoder's
            self._idle.append(encoder)
            return ids, chunk[2] - chunk[1]

        return _in_order(encode, chunks, num_threads)


if __name__ == "__main__":
    start = time.perf_counter()
    # Not the functions of this file: as a program it is another module than the one that the library imports.
    from basic import bpe_kernels

    for kernels_part in ("training", "encoding"):
        bpe_kernels.load(kernels_part)
    print(f"the kernels are ready after {time.perf_counter() - start:.1f} s (process {os.getpid()})")
