"""Call the encoding kernel: for arrays of text, and for short strings in one call out of Python.

A `PretokenEncoder` belongs to one thread at a time. Its table is a cache: it grows to a fixed size and is then emptied.
"""

from __future__ import annotations

import numpy as np

from basic.bpe import arrays
from basic.bpe.arrays import InvalidByteError
from basic.bpe.kernels.encode import (
    BUFFER_LENGTH,
    BUFFERS_FULL,
    FULL,
    LONG_TEXT,
    MARGIN_IDS,
    NO_TOKEN,
    OUTPUT_FULL,
    SMALL_BYTES,
    encode,
    for_string,
    new_work,
)
from basic.bpe.kernels.hash_table import (
    ENTRIES,
    POOL_USED,
    POSITION,
    PROBLEM,
    SLOT_LENGTH,
    STATE_LENGTH,
    WRITTEN,
    new_table,
    rehash,
)
from basic.bpe.kernels.instructions import readonly
from basic.bpe.kernels.merges.apply_merges import MergeArrays, new_buffers
from basic.bpe.kernels.scan import BLOCK, PatternTables
from basic.bpe.kernels.special_tokens import SpecialTokenTables
from basic.common.native.kernel import PreparedCall, functions_are_safe

_FEWEST_SLOTS, _USUAL_SLOTS = 1 << 14, 1 << 17
_MAX_SLOTS, _MAX_POOL = 1 << 19, 1 << 21  # 16 MB each
# For strings: a small table has few pages that are not yet in memory; a full one is replaced by a larger one.
_FEWEST_FOR_STRINGS, _MOST_FOR_STRINGS = 1 << 13, 1 << 17


def _prepared(
    pattern: PatternTables,
    specials: SpecialTokenTables,
    arrays: tuple,
    out: np.ndarray,
    dtype: np.dtype,
    state: np.ndarray,
) -> PreparedCall:
    """A call of `encode` without a text yet; `arrays` are those from `table` to `heap`."""
    strings, nothing = for_string(out), readonly(out[:0])
    return PreparedCall(encode, 0, *strings, nothing, 0, pattern, specials, *arrays, out, dtype.itemsize, state, 0)


class PretokenEncoder:
    """Encodes for one thread at a time, and caches pre-tokens.

    Args:
        max_slots, max_pool: the largest size of the table in slots, and of the pool in elements.
    """

    def __init__(
        self,
        pattern: PatternTables,
        merges: MergeArrays,
        dtype: np.dtype,
        *,
        max_slots: int = _MAX_SLOTS,
        max_pool: int = _MAX_POOL,
    ) -> None:
        self._pattern, self._merges, self._dtype = pattern, merges, dtype
        self._max_slots, self._max_pool = max_slots, max_pool
        # Half a megabyte, because the first text may be short, and the system has to clear this memory.
        self._table, self._pool = new_table(_FEWEST_SLOTS), np.zeros(1 << 14, np.uint64)
        self._state = np.zeros(STATE_LENGTH, np.int64)
        self._small_ids = np.empty(SMALL_BYTES + MARGIN_IDS, dtype)
        self._small = self._small_ids.view(np.uint8)
        self._nothing = readonly(self._small[:0])
        self._work = new_work()
        self._buffers = new_buffers(BUFFER_LENGTH)
        self._call: PreparedCall | None = None
        self._specials: SpecialTokenTables | None = None
        self._clear()  # the system provides the memory at the first write: now, not in the first text

    def encode(self, data: np.ndarray, start: int, stop: int, specials: SpecialTokenTables) -> np.ndarray:
        """Encode data[start:stop], which must start and end at safe positions.

        Returns:
            An array of ids, which the next call overwrites if the text has at most `SMALL_BYTES`.

        Raises:
            InvalidByteError: a byte is not UTF-8 or has no token.
        """
        is_small = stop - start <= SMALL_BYTES
        id_bytes, call = self._dtype.itemsize, self._prepared_call(specials)
        out = self._small if is_small else np.empty(((stop - start) // 3 + 2 * MARGIN_IDS) * id_bytes, np.uint8)
        call.set(data=data, stop=stop, out=out, start=start)
        try:
            status = self._run(call, data, start, stop, out)
        finally:
            call.set(data=self._nothing, out=self._small)  # not kept in memory
        if is_small:
            return self._small_ids[: status // id_bytes]
        out.resize(status, refcheck=False)
        return out.view(self._dtype)

    def _run(self, call: PreparedCall, data: np.ndarray, start: int, stop: int, out: np.ndarray) -> int:
        """Call the kernel until it is done, and give it what it stops for; returns the size of the ids in bytes."""
        state, id_bytes = self._state, self._dtype.itemsize
        while (status := call()) < 0:
            if status == FULL:
                self.grow()
            elif status == OUTPUT_FULL:
                # Estimate the total from the ids so far; a long pre-token may need one id for each byte.
                written, done = int(state[WRITTEN]), int(state[POSITION]) - start
                estimate = written * (stop - start) // max(done, 1) * 9 // 8
                # In place if the system can remap pages, so that nothing is copied.
                estimate = max(estimate, written + int(state[PROBLEM]) * id_bytes) + 2 * MARGIN_IDS * id_bytes
                out.resize(estimate, refcheck=False)
                call.set(out=out)
            elif status == BUFFERS_FULL:
                if state[PROBLEM] > arrays.MAX_PRETOKEN_BYTES:
                    raise InvalidByteError(int(state[POSITION]), "too long")
                symbols, heap = new_buffers(int(state[PROBLEM]))  # for this text only
                call.set(symbol_buffers=symbols, heap=heap)
                self._call = None
            elif status == NO_TOKEN:
                self._clear()
                raise InvalidByteError(int(state[PROBLEM]), "no token")
            else:
                raise InvalidByteError(int(state[PROBLEM]))
            call.set(start=-1, table=self._table, pool=self._pool)
        return status

    def _prepared_call(self, specials: SpecialTokenTables) -> PreparedCall:
        if self._call is None or self._specials is not specials:
            arrays = self._table, self._pool, *self._merges, *self._work, *self._buffers
            self._call = _prepared(self._pattern, specials, arrays, self._small, self._dtype, self._state)
            self._specials = specials
        return self._call

    def grow(self) -> None:
        """Make the table or the pool larger, whichever is too small; at the limit, clear both."""
        table_is_full = (int(self._state[ENTRIES]) + BLOCK) * 2 * SLOT_LENGTH > len(self._table)
        if table_is_full and len(self._table) < self._max_slots * SLOT_LENGTH:
            # At first to 4 MB, so that it seldom grows: with a growing table a new pre-token takes up to twice as long.
            num_slots = max(2 * (len(self._table) // SLOT_LENGTH), _USUAL_SLOTS)
            larger = new_table(min(num_slots, self._max_slots))
            rehash(self._table, larger)
            self._table = larger
        elif not table_is_full and len(self._pool) < self._max_pool:
            self._pool = np.pad(self._pool, (0, 3 * len(self._pool)))
        else:
            self._clear()

    def _clear(self) -> None:
        self._table[:] = 0
        self._state[ENTRIES] = self._state[POOL_USED] = 0


class StringEncoder:
    """Encodes short strings as fast as Python can call it; it has its own table, and keeps the interpreter's lock.

    The kernel takes the string and makes the list itself, with the functions of Python's C interface: 100 bytes take a
    third of a microsecond. With arrays for input and output, Python needs three.

    Args:
        num_slots: the size of its table, which does not grow.

    Attributes:
        encode: a built-in function from a string to the list of its ids; for a string that it cannot encode, to an int.
            Then see `successor`.
    """

    def __init__(
        self,
        pattern: PatternTables,
        merges: MergeArrays,
        dtype: np.dtype,
        specials: SpecialTokenTables,
        num_slots: int = _FEWEST_FOR_STRINGS,
    ) -> None:
        self._parameters, self._num_slots = (pattern, merges, dtype, specials), num_slots
        out = np.empty(SMALL_BYTES + MARGIN_IDS, dtype).view(np.uint8)
        table, pool, state = new_table(num_slots), np.zeros(1 << 14, np.uint64), np.zeros(STATE_LENGTH, np.int64)
        arrays = table, pool, *merges, *new_work(), *new_buffers(BUFFER_LENGTH)
        self._call = _prepared(pattern, specials, arrays, out, dtype, state)
        # Threads without the interpreter's lock would share the table.
        self.encode = self._call.as_function() if functions_are_safe() else lambda text: LONG_TEXT

    def successor(self, status: int) -> StringEncoder:
        """The encoder to use after one has returned an int: itself, or an empty one.

        One that is replaced instead of changed needs no lock.
        """
        if status == FULL:
            return StringEncoder(*self._parameters, min(4 * self._num_slots, _MOST_FOR_STRINGS))
        return self
