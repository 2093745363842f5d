"""The scanner: where the pre-tokens of a pattern start, in UTF-8 bytes.

It runs the table of the pattern's automaton (`basic.bpe.patterns`) over blocks of bytes. One table look-up waits for
the one before, about five cycles. So eight parts of a block are run side by side, seven of them from a guessed state a
few symbols earlier: an automaton soon forgets where it began. A part whose guess was wrong is run again.

    bytes      T h e   c a t ' s    2   d o g s .
    symbols    characters below 128 are themselves; others are their class, then CONTINUATION for each further byte
    states     table[state before + symbol]
    starts     1 0 0 1 0 0 0 1 0 1  0 1 0 0 0 0 1      from the marks of the states, 64 at a time

What a state says is mostly seen from its number. States that refer to a register are rare, and looked at one by one.
English is scanned at 1.6 GB/s on one core of an AMD Zen 4; one look-up after the other, at 0.5.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from basic.bpe.kernels.instructions import U64, at_least_64, count_ones, load8, store8, trailing_zeros
from basic.bpe.patterns.automaton import FIRST_CLASS, Automaton
from basic.common.native.kernel import kernel

U16, I64 = np.uint16, np.int64

# Bytes that are scanned at a time.
BLOCK = 2048
# In its row a block starts at BEFORE; the elements after it are for looking ahead.
BEFORE = 8
SCRATCH_LENGTH = BLOCK + 192
_PARTS = 8
_PART = BLOCK // _PARTS
_WARM_UP = 32  # symbols before a part that its guessed state has seen

# The marks in the last column of the table: A marks of four registers, C marks, BEGIN, BACK.
_C_SHIFT, _REGISTERS, _BEGIN, _BACK = 4, 15, 256, 512
# Indices in `PatternTables.numbers`.
_WIDTH, _START, _CONTINUATION, _END, _FIRST_BACK, _FIRST_BOTH, _FIRST_BEGIN, _FIRST_RARE = 0, 1, 2, 3, 4, 5, 6, 7

_HIGH = U64(0x8080808080808080)
_WORD = U64(64)


class PatternTables(NamedTuple):
    """A pattern for the scanner; may be shared by threads.

    Attributes:
        code_classes: the symbol of each code point (uint8).
        numbers: what else the scanner needs of the automaton (int64).
    """

    table: np.ndarray
    code_classes: np.ndarray
    numbers: np.ndarray


def pattern_tables(automaton: Automaton) -> PatternTables:
    """Convert an automaton for the scanner."""
    lengths = np.diff(automaton.first_codes, append=0x110000)
    continuation = FIRST_CLASS + len(automaton.safe_pairs)
    return PatternTables(
        automaton.table,
        np.repeat(automaton.class_of_range + np.uint8(FIRST_CLASS), lengths),
        np.array([automaton.width, automaton.start, continuation, continuation + 1, *automaton.bounds], np.int64),
    )


class Scratch(NamedTuple):
    """The work arrays of `scan_block`.

    Attributes:
        bytes: two rows: the text, from BEFORE on, and the symbols (uint8).
        states: of the automaton after each symbol (uint16).
        bits: a bit for each byte where a pre-token starts (uint64).
    """

    bytes: np.ndarray
    states: np.ndarray
    bits: np.ndarray


def new_scratch() -> Scratch:
    """New work arrays, for one thread."""
    return Scratch(
        np.zeros((2, SCRATCH_LENGTH), np.uint8),
        np.zeros(SCRATCH_LENGTH, np.uint16),
        np.zeros(SCRATCH_LENGTH // 64, np.uint64),
    )


@kernel
def decode_character(c, c1, c2, c3):
    """Decode the character that starts with four bytes.

    Returns:
        The code point, and the length in bytes: 0 if the bytes are not UTF-8.
    """
    if c < 0x80:
        return c, 1
    if c < 0xC2 or (c1 & 0xC0) != 0x80:
        return 0, 0
    if c < 0xE0:
        return ((c & 0x1F) << 6) | (c1 & 0x3F), 2
    if (c2 & 0xC0) != 0x80:
        return 0, 0
    if c < 0xF0:
        code_point = ((c & 0xF) << 12) | ((c1 & 0x3F) << 6) | (c2 & 0x3F)
        if code_point < 0x800 or 0xD800 <= code_point <= 0xDFFF:
            return 0, 0
        return code_point, 3
    if c > 0xF4 or (c3 & 0xC0) != 0x80:
        return 0, 0
    code_point = ((c & 7) << 18) | ((c1 & 0x3F) << 12) | ((c2 & 0x3F) << 6) | (c3 & 0x3F)
    if code_point < 0x10000 or code_point > 0x10FFFF:
        return 0, 0
    return code_point, 4


@kernel
def _copy(data, start, size, text, symbols):
    """Copy bytes, with eight zeros after them; returns whether all are ASCII.

    A character that the end of the text cuts then has a zero where it is not complete, so it is not UTF-8.
    """
    i, from_, stop, high = U64(0), U64(start), U64(size), U64(0)
    while i + U64(8) <= stop:
        eight = load8(data, from_ + i)
        high |= eight
        store8(text, i + U64(BEFORE), eight)
        store8(symbols, i, eight)
        i += U64(8)
    store8(text, stop + U64(BEFORE), U64(0))
    while i < stop:
        text[i + U64(BEFORE)] = symbols[i] = data[from_ + i]
        high |= U64(data[from_ + i])
        i += U64(1)
    return (high & _HIGH) == U64(0)


@kernel
def _classify_non_ascii(text, length, symbols, code_classes, continuation):
    """Write the symbols of the characters beyond ASCII.

    The class is stored with seven CONTINUATION after it; where a run of such characters ends, the bytes are put back.

    Returns:
        The offset of the first byte that is not UTF-8, or -1.
    """
    i, stop, continuations = U64(0), U64(length), U64(continuation) * U64(0x0101010101010100)
    while i < stop:
        high = load8(text, i + U64(BEFORE)) & _HIGH
        i += trailing_zeros(high) >> U64(3)  # 8 if there is none
        if high == U64(0):
            continue
        while i < stop:
            w = load8(text, i + U64(BEFORE))
            if (w & U64(0xC0C0F0)) == U64(0x8080E0):
                code_point = ((w & U64(0xF)) << U64(12)) | ((w >> U64(2)) & U64(0xFC0)) | ((w >> U64(16)) & U64(0x3F))
                valid = (code_point >= U64(0x800)) & ((code_point >> U64(11)) != U64(27))  # 27: the surrogates
                size = U64(3) if valid else U64(0)
            elif (w & U64(0xC0E0)) == U64(0x80C0):
                code_point = ((w & U64(0x1F)) << U64(6)) | ((w >> U64(8)) & U64(0x3F))
                size = U64(2) if code_point >= U64(0x80) else U64(0)
            elif (w & U64(0x80)) == U64(0):
                break
            else:
                c, c1, c2, c3 = w & U64(255), (w >> U64(8)) & U64(255), (w >> U64(16)) & U64(255), w >> U64(24)
                code_point_4, size_4 = decode_character(I64(c), I64(c1), I64(c2), I64(c3 & U64(255)))
                code_point, size = U64(code_point_4), U64(size_4)
            if size == U64(0):
                return I64(i)
            store8(symbols, i, U64(code_classes[code_point]) | continuations)
            i += size
        store8(symbols, i, load8(text, i + U64(BEFORE)))
    return -1


@kernel
def _run_part(table, symbols, first, stop, state, states):
    """Run the automaton over some symbols, one after the other; returns the last state."""
    for i in range(U64(first), U64(stop)):
        state = U64(table[state + U64(symbols[i])])
        states[i] = U16(state)
    return state


@kernel
def _run_block(table, symbols, start, states):
    """Run the automaton over a full block, eight parts side by side; returns the last state.

    Written out, so that the states stay in registers.
    """
    s1 = s2 = s3 = s4 = s5 = s6 = s7 = U64(start)
    for i in range(U64(_PART - _WARM_UP), U64(_PART)):
        s1 = U64(table[s1 + U64(symbols[i])])
        s2 = U64(table[s2 + U64(symbols[i + U64(_PART)])])
        s3 = U64(table[s3 + U64(symbols[i + U64(2 * _PART)])])
        s4 = U64(table[s4 + U64(symbols[i + U64(3 * _PART)])])
        s5 = U64(table[s5 + U64(symbols[i + U64(4 * _PART)])])
        s6 = U64(table[s6 + U64(symbols[i + U64(5 * _PART)])])
        s7 = U64(table[s7 + U64(symbols[i + U64(6 * _PART)])])
    g1, g2, g3, g4, g5, g6, g7 = s1, s2, s3, s4, s5, s6, s7
    s0 = U64(start)
    for i in range(U64(_PART)):
        s0 = U64(table[s0 + U64(symbols[i])])
        s1 = U64(table[s1 + U64(symbols[i + U64(_PART)])])
        s2 = U64(table[s2 + U64(symbols[i + U64(2 * _PART)])])
        s3 = U64(table[s3 + U64(symbols[i + U64(3 * _PART)])])
        s4 = U64(table[s4 + U64(symbols[i + U64(4 * _PART)])])
        s5 = U64(table[s5 + U64(symbols[i + U64(5 * _PART)])])
        s6 = U64(table[s6 + U64(symbols[i + U64(6 * _PART)])])
        s7 = U64(table[s7 + U64(symbols[i + U64(7 * _PART)])])
        states[i] = U16(s0)
        states[i + U64(_PART)] = U16(s1)
        states[i + U64(2 * _PART)] = U16(s2)
        states[i + U64(3 * _PART)] = U16(s3)
        states[i + U64(4 * _PART)] = U16(s4)
        states[i + U64(5 * _PART)] = U16(s5)
        states[i + U64(6 * _PART)] = U16(s6)
        states[i + U64(7 * _PART)] = U16(s7)
    # If a part began with the state with which the part before it ended, its states are right.
    if s0 != g1:
        s1 = _run_part(table, symbols, _PART, 2 * _PART, s0, states)
    if s1 != g2:
        s2 = _run_part(table, symbols, 2 * _PART, 3 * _PART, s1, states)
    if s2 != g3:
        s3 = _run_part(table, symbols, 3 * _PART, 4 * _PART, s2, states)
    if s3 != g4:
        s4 = _run_part(table, symbols, 4 * _PART, 5 * _PART, s3, states)
    if s4 != g5:
        s5 = _run_part(table, symbols, 5 * _PART, 6 * _PART, s4, states)
    if s5 != g6:
        s6 = _run_part(table, symbols, 6 * _PART, 7 * _PART, s5, states)
    if s6 != g7:
        s7 = _run_part(table, symbols, 7 * _PART, 8 * _PART, s6, states)
    return s7


@kernel
def _resolve(states, i, table, width, bits):
    """Set the bits that the marks of state i mean; of a C mark, that of the last state before with the A mark."""
    column, j = width - U64(1), i
    marks = I64(table[U64(states[i]) + column])
    if marks & _BEGIN:
        bits[i // _WORD] |= U64(1) << i % _WORD
    if marks & _BACK:
        bits[(i - U64(1)) // _WORD] |= U64(1) << (i - U64(1)) % _WORD
    registers = (marks >> _C_SHIFT) & _REGISTERS
    while registers:
        j -= U64(1)
        here = I64(table[U64(states[j]) + column]) & registers
        if here:
            bits[j // _WORD] |= U64(1) << j % _WORD
            registers ^= here


@kernel
def _mark_starts(states, num_words, table, numbers, bits):
    """Set the bits of the bytes where pre-tokens start, from the states."""
    back, both = U16(numbers[_FIRST_BACK]), U16(numbers[_FIRST_BOTH])
    begin, rare = U16(numbers[_FIRST_BEGIN]), U16(numbers[_FIRST_RARE])
    carry, any_rare = U64(0), U64(0)
    for k in range(num_words):
        w = num_words - U64(1) - k
        rares = at_least_64(states, w * _WORD, rare)
        any_rare |= rares
        backs = at_least_64(states, w * _WORD, back) & ~at_least_64(states, w * _WORD, begin)
        bits[w] = (at_least_64(states, w * _WORD, both) & ~rares) | (backs >> U64(1)) | carry
        carry = backs << U64(63)
    if any_rare:
        for w in range(num_words):
            rares = at_least_64(states, w * _WORD, rare)
            while rares:
                _resolve(states, w * _WORD + trailing_zeros(rares), table, U64(numbers[_WIDTH]), bits)
                rares &= rares - U64(1)


@kernel
def _collect_starts(bits, num_words, starts):
    """Write the offsets of the one bits, in order; returns their number.

    The processor cannot predict how many a word has. So sixteen offsets are always written, and later ones overwrite
    those that are too many.
    """
    n = U64(0)
    for w in range(num_words):
        word, to = bits[w], n
        n += count_ones(word)
        for _ in range(16):
            starts[to] = w * _WORD + trailing_zeros(word)
            to += U64(1)
            word &= word - U64(1)
        while word:
            starts[to] = w * _WORD + trailing_zeros(word)
            to += U64(1)
            word &= word - U64(1)
    return I64(n)


@kernel
def scan_block(data, start, stop, pattern, scratch, starts):
    """Find the complete pre-tokens in the first `BLOCK` bytes from `start`, where a pre-token must start.

    Args:
        scratch: of `new_scratch`. On return the first row of its bytes has, from BEFORE on, the bytes from `start` and
            at least 16 readable bytes after them.
        starts: int64, SCRATCH_LENGTH; output: the offset from `start` of each pre-token, and the end of the last one.

    Returns:
        The number of pre-tokens, 0 if the first one may be longer than a block; and the offset from `start` of a byte
        that is not UTF-8, else -1.
    """
    table, code_classes, numbers = pattern
    both_rows, states, bits = scratch
    text, symbols = both_rows[0], both_rows[1]
    length = min(BLOCK, stop - start)
    if not _copy(data, start, min(stop - start, length + 32), text, symbols):
        invalid = _classify_non_ascii(text, length, symbols, code_classes, numbers[_CONTINUATION])
        if invalid >= 0:
            return 0, invalid
    if length == BLOCK:
        state = _run_block(table, symbols, numbers[_START], states)
    else:
        state = _run_part(table, symbols, 0, length, U64(numbers[_START]), states)
        for k in range(64):
            states[length + k] = U16(0)
    num_words = U64(length + 63) // _WORD
    _mark_starts(states, num_words, table, numbers, bits)
    bits[num_words] = U64(0)
    if start + length == stop:
        end = U64(length)
        states[end] = table[state + U64(numbers[_END])]
        _resolve(states, end, table, U64(numbers[_WIDTH]), bits)
        bits[end // _WORD] |= U64(1) << end % _WORD
    bits[0] |= U64(1)
    return _collect_starts(bits, num_words + U64(1), starts) - 1, -1


@kernel
def end_of_long_pretoken(data, start, stop, pattern, registers):
    """Find the end of the pre-token at `start`, however long it is, one symbol at a time.

    Args:
        registers: int64, at least 4; overwritten.

    Returns:
        The end; or -1 minus the offset of a byte that is not UTF-8.
    """
    table, code_classes, numbers = pattern
    width, state, i = numbers[_WIDTH], numbers[_START], start
    while i < stop:
        symbol, size = I64(data[i]), 1
        if symbol >= FIRST_CLASS:
            c1 = I64(data[i + 1]) if i + 1 < stop else 0
            c2 = I64(data[i + 2]) if i + 2 < stop else 0
            c3 = I64(data[i + 3]) if i + 3 < stop else 0
            code_point, size = decode_character(symbol, c1, c2, c3)
            if size == 0:
                return -1 - i
            symbol = I64(code_classes[code_point])
        state = I64(table[state + symbol])
        end = _known_start(I64(table[state + width - 1]), i, stop + 1, registers)
        if end <= stop:
            return end
        if size > 1:
            state = I64(table[state + numbers[_CONTINUATION]])
        i += size
    state = I64(table[state + numbers[_END]])
    return _known_start(I64(table[state + width - 1]), stop, stop, registers)


@kernel
def _known_start(marks, i, otherwise, registers):
    """The first pre-token start that the marks of the state after symbol i mean; updates the registers."""
    first = i if marks & _BEGIN else otherwise
    if marks & _BACK:
        first = min(first, i - 1)
    for register in range(4):
        if (marks >> _C_SHIFT >> register) & 1:
            first = min(first, registers[register])
        if (marks >> register) & 1:
            registers[register] = i
    return first
