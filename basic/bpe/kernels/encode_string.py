"""Encode a short string to a list in one call out of Python, which takes longer than the work inside it.

The kernel takes the string and makes the list itself, with the functions of Python's C interface: 100 bytes take a
third of a microsecond. With arrays for input and output, Python needs three.
"""

from __future__ import annotations

import numpy as np

from basic.bpe.kernels.apply_merges import MergeArrays, new_buffers
from basic.bpe.kernels.encode import (
    BUFFER_LENGTH,
    FULL,
    LONG_TEXT,
    MARGIN_IDS,
    SMALL_BYTES,
    encode,
    for_string,
    new_work,
)
from basic.bpe.kernels.hash_table import STATE_LENGTH, new_table
from basic.bpe.kernels.instructions import readonly
from basic.bpe.kernels.scan import PatternTables
from basic.bpe.kernels.special_tokens import SpecialTokenTables
from basic.bpe.native.kernel import PreparedCall, functions_are_safe

# A small table has few pages that are not yet in memory; a full one is replaced by a larger one.
_FEWEST_SLOTS, _MOST_SLOTS = 1 << 13, 1 << 17


class StringEncoder:
    """Encodes short strings as fast as Python can call it; it has its own table, and keeps the interpreter's lock.

    Args:
        pattern, merges: as for `PretokenEncoder`.
        specials: as for `PretokenEncoder.encode`.
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
        num_slots: int = _FEWEST_SLOTS,
    ) -> None:
        self._parameters, self._num_slots = (pattern, merges, dtype, specials), num_slots
        out = np.empty(SMALL_BYTES + MARGIN_IDS, dtype).view(np.uint8)
        self._call = PreparedCall(
            encode, 0, *for_string(out), readonly(out[:0]), 0, pattern, specials, new_table(num_slots),
            np.zeros(1 << 14, np.uint64), *merges, *new_work(), *new_buffers(BUFFER_LENGTH), out, dtype.itemsize,
            np.zeros(STATE_LENGTH, np.int64), 0,
        )  # fmt: skip
        # Threads without the interpreter's lock would share the table.
        self.encode = self._call.as_function() if functions_are_safe() else lambda text: LONG_TEXT

    def successor(self, status: int) -> StringEncoder:
        """The encoder to use after one has returned an int: itself, or an empty one.

        One that is replaced instead of changed needs no lock.
        """
        if status == FULL:
            return StringEncoder(*self._parameters, min(4 * self._num_slots, _MOST_SLOTS))
        return self
