"""The scanner: where the pre-tokens of GPT-2's pattern start, in UTF-8 bytes.

The pattern looks like a search. But whether a pre-token starts at a byte depends only on about three bytes before it
and two bytes after it. So the scanner is a few loops without branches over blocks of bytes, which the compiler turns
into vector instructions: classify every byte, mark the starts, mark the contractions. In a prototype on one core, a
loop from pre-token to pre-token ran at 78 MB/s, these loops at 2,500 MB/s.

    bytes        T h e   c a t ' s    2   d o g s .
    class        L L L S L L L O L S  N S L L L L O      letter, number, space, other
    start        1 0 0 1 0 0 0 1 0 1  0 1 0 0 0 0 1      " cat" includes the space, "'s" is a contraction

The classes of characters beyond ASCII come from a table that the `regex` package itself fills (`fill_classes`), so the
scanner and the pattern agree by construction. UTF-8 is checked only in blocks that have bytes beyond ASCII.
"""

from __future__ import annotations

import contextlib
from functools import cache

import numpy as np
import regex

from basic.bpe.kernels.instructions import U64, count_ones, kernel, load8, store8, trailing_zeros

U8, I64 = np.uint8, np.int64

UNKNOWN, LETTER, NUMBER, OTHER, SPACE = 0, 1, 2, 3, 4

# Bytes that are scanned at a time: five arrays of this length fit the first-level cache.
BLOCK = 1024
# In its arrays a block starts at BEFORE, so that loops can look back; the elements after it are for looking ahead.
BEFORE = 8
SCRATCH_LENGTH = BLOCK + 192

_PLANE_SIZE = 1 << 16


def new_scratch() -> np.ndarray:
    """The work arrays of `scan_block`, as rows: text, classes, start flags, flags of two- and three-byte contractions.

    One array instead of five: passing an array to a kernel takes as long as encoding four pre-tokens.
    """
    return np.zeros((5, SCRATCH_LENGTH), np.uint8)


@cache
def code_classes() -> np.ndarray:
    """The class of every code point, shared by all threads.

    Only the first plane is filled, which takes 3 ms (all planes: 190 ms); `learn_class` fills others when they occur.
    """
    classes = np.zeros(0x110000, np.uint8)
    fill_classes(classes, 0)
    return classes


def fill_classes(classes: np.ndarray, code_point: int) -> None:
    """Fill in the classes of the 65,536 code points of a plane, with the `regex` package."""
    first = code_point // _PLANE_SIZE * _PLANE_SIZE
    code_points = np.arange(first, first + _PLANE_SIZE, dtype="<u4")
    code_points[(code_points >= 0xD800) & (code_points < 0xE000)] = 0x21  # surrogates are not characters: "!" instead
    plane = code_points.tobytes().decode("utf-32-le")
    result = np.full(_PLANE_SIZE, OTHER, np.uint8)
    for pattern, char_class in ((r"\p{L}+", LETTER), (r"\p{N}+", NUMBER), (r"\s+", SPACE)):
        for match in regex.finditer(pattern, plane):
            result[match.start() : match.end()] = char_class
    classes[first : first + _PLANE_SIZE] = result  # in one assignment, because other threads may read


def learn_class(code_classes: np.ndarray, data: np.ndarray, offset: int) -> bool:
    """Fill in the class for which the scanner stopped; returns False if the bytes at the offset are not UTF-8."""
    four = data[offset : offset + 4].tobytes()
    for size in (1, 2, 3, 4):
        with contextlib.suppress(UnicodeDecodeError):
            code_point = ord(four[:size].decode())
            if code_classes[code_point] == UNKNOWN:
                fill_classes(code_classes, code_point)
            return True
    return False


@kernel
def _classify_ascii(text, length, classes):
    """Classify all bytes as if they were ASCII.

    It selects values instead of computing with bytes, because Numba would widen each byte to 64 bits. Here and below, a
    loop counts from 0 and adds BEFORE in the index. For a loop from BEFORE the compiler cannot prove that the index is
    never negative, and does not vectorise it: a block would take 18 microseconds instead of 0.4.
    """
    for i in range(length):
        c = text[i + BEFORE]
        lower = c | U8(32)
        letter = (lower >= U8(97)) & (lower <= U8(122))
        number = (c >= U8(48)) & (c <= U8(57))
        # U+001C to U+001F are white space for str.isspace, but not for the pattern.
        space = (c == U8(32)) | ((c >= U8(9)) & (c <= U8(13)))
        char_class = U8(LETTER) if letter else (U8(NUMBER) if number else (U8(SPACE) if space else U8(OTHER)))
        classes[i + BEFORE] = char_class


@kernel
def _has_non_ascii(text, length):
    found = U64(0)
    for i in range(0, length, 32):
        u = U64(i + BEFORE)
        found |= load8(text, u) | load8(text, u + U64(8)) | load8(text, u + U64(16)) | load8(text, u + U64(24))
    return (found & U64(0x8080808080808080)) != U64(0)


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
def _classify_non_ascii(text, length, classes, code_classes, wide_spaces):
    """Give each byte of a character beyond ASCII the class of the character.

    Args:
        wide_spaces: output, offset * 8 + length of each space of more than one byte.

    Returns:
        The number of such spaces; and the offset of the first byte that is not UTF-8 or whose class is unknown, or -1.
    """
    i, num_spaces = 0, 0
    while i < length:
        # Find the next byte with its highest bit set, eight bytes at a time.
        high = load8(text, U64(i + BEFORE)) & U64(0x8080808080808080)
        if high == U64(0):
            i += 8
            continue
        i += I64(trailing_zeros(high) >> U64(3))
        while i < length and text[i + BEFORE] >= 0x80:
            j = i + BEFORE
            code_point, size = decode_character(I64(text[j]), I64(text[j + 1]), I64(text[j + 2]), I64(text[j + 3]))
            char_class = code_classes[code_point]
            if size == 0 or char_class == UNKNOWN:
                return num_spaces, i
            for k in range(size):
                classes[j + k] = char_class
            if char_class == SPACE:
                wide_spaces[num_spaces] = i * 8 + size
                num_spaces += 1
            i += size
    return num_spaces, -1


@kernel
def _mark_starts(text, length, classes, start_flags):
    for i in range(length):
        this_class, before, after = classes[i + BEFORE], classes[i + BEFORE - 1], classes[i + BEFORE + 1]
        # The last of several spaces is a pre-token of its own, or starts the next pre-token if it is U+0020.
        space = (this_class == U8(SPACE)) & ((before != U8(SPACE)) | (after != U8(SPACE)))
        run = (this_class != U8(SPACE)) & (this_class != before) & (text[i + BEFORE - 1] != U8(32))
        start_flags[i + BEFORE] = U8(space | run)


@kernel
def _mark_contractions(text, length, start_flags, two_flags, three_flags):
    """Mark 's 'd 'm 't and 'll 've 're: a pre-token ends after their two or three bytes, whatever follows."""
    for i in range(length):
        apostrophe = (text[i + BEFORE] == U8(39)) & (start_flags[i + BEFORE] == U8(1))
        c, d = text[i + BEFORE + 1], text[i + BEFORE + 2]
        two = (c == U8(115)) | (c == U8(100)) | (c == U8(109)) | (c == U8(116))
        three = ((c == U8(108)) & (d == U8(108))) | (((c == U8(118)) | (c == U8(114))) & (d == U8(101)))
        two_flags[i + BEFORE] = U8(apostrophe & two)
        three_flags[i + BEFORE] = U8(apostrophe & three)
    for i in range(length):
        within = two_flags[i + BEFORE - 1] | three_flags[i + BEFORE - 1]
        start_flags[i + BEFORE] = (
            (start_flags[i + BEFORE] & (U8(1) ^ within)) | two_flags[i + BEFORE - 2] | three_flags[i + BEFORE - 3]
        )


@kernel
def _collect_starts(start_flags, length, starts):
    """Write the offsets of the start flags, in order; returns their number.

    64 flags are packed into one number, and its lowest one bit is found and removed repeatedly. The processor cannot
    predict how often. So twelve offsets are always written, and later ones overwrite those that are too many.
    """
    n, base, end = U64(0), U64(0), U64(length)
    while base < end:
        bits = U64(0)
        for byte in range(8):
            offset = U64(8) * U64(byte)
            # The multiplication moves the lowest bits of eight bytes to the highest byte.
            flags = load8(start_flags, base + offset + U64(BEFORE)) * U64(0x0102040810204080)
            bits |= (flags >> U64(56)) << offset
        count, to = count_ones(bits), n
        for _ in range(12):
            starts[to] = base + trailing_zeros(bits)
            to += U64(1)
            bits &= bits - U64(1)
        while bits:
            starts[to] = base + trailing_zeros(bits)
            to += U64(1)
            bits &= bits - U64(1)
        n += count
        base += U64(64)
    return I64(n)


@kernel
def scan_block(data, start, stop, code_classes, scratch, starts):
    """Find the complete pre-tokens in the first `BLOCK` bytes from `start`, where a pre-token must start.

    Args:
        data: UTF-8 bytes; the text ends at `stop`.
        code_classes: of `code_classes`.
        scratch: of `new_scratch`. On return its first row has, from BEFORE on, the bytes from `start` and at least 16
            readable bytes after them.
        starts: int64, SCRATCH_LENGTH; output: the offset from `start` of each pre-token, and the end of the last one.

    Returns:
        The number of pre-tokens, 0 if the first one is longer than a block; and the offset from `start` of a byte that
        is not UTF-8 or starts a character of unknown class, else -1.
    """
    text, classes, start_flags, two_flags, three_flags = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4]
    length = min(BLOCK, stop - start)
    available = min(stop - start, length + 32)
    i, from_, size = U64(0), U64(start), U64(available)
    while i + U64(8) <= size:
        store8(text, i + U64(BEFORE), load8(data, from_ + i))
        i += U64(8)
    while i < size:
        text[i + U64(BEFORE)] = data[from_ + i]
        i += U64(1)
    if available < length + 32:
        # Add spaces after the end of the text, so that white space at the end stays one pre-token.
        while i < U64(length + 72):
            text[i + U64(BEFORE)] = U8(32)
            i += U64(1)
    _classify_ascii(text, length + 16, classes)
    num_spaces = 0
    if _has_non_ascii(text, length + 16):
        num_spaces, invalid = _classify_non_ascii(text, length + 16, classes, code_classes, starts)
        if invalid >= 0:
            return 0, invalid
    _mark_starts(text, length, classes, start_flags)
    for k in range(num_spaces):  # their flags were set as if each byte were a character
        offset, size_ = starts[k] >> 3, starts[k] & 7
        if offset < length:
            j = offset + BEFORE
            start_flags[j] = U8((classes[j - 1] != SPACE) | (classes[j + size_] != SPACE))
            for q in range(1, size_):
                start_flags[j + q] = 0
    start_flags[BEFORE] = 1
    _mark_contractions(text, length, start_flags, two_flags, three_flags)
    for q in range(8):  # _collect_starts reads 64 flags at a time
        store8(start_flags, U64(length + BEFORE + 8 * q), U64(0))
    num_pretokens = _collect_starts(start_flags, length, starts)
    if start + length == stop:
        starts[num_pretokens] = length
        return num_pretokens, -1
    return num_pretokens - 1, -1


@kernel
def _class_at(data, i, stop, code_classes):
    """The class and the length of the character at an offset; UNKNOWN and 0 if it is not UTF-8."""
    c1 = I64(data[i + 1]) if i + 1 < stop else 0
    c2 = I64(data[i + 2]) if i + 2 < stop else 0
    c3 = I64(data[i + 3]) if i + 3 < stop else 0
    code_point, size = decode_character(I64(data[i]), c1, c2, c3)
    return (I64(code_classes[code_point]), size) if size else (I64(UNKNOWN), 0)


@kernel
def end_of_long_pretoken(data, start, stop, code_classes):
    """Find the end of a pre-token that is longer than a block (so it is no contraction), one character at a time.

    Returns:
        The end; or -1 minus the offset of a byte that is not UTF-8 or starts a character of unknown class.
    """
    i = start
    char_class, size = _class_at(data, i, stop, code_classes)
    if data[i] == 32:
        next_class, next_size = _class_at(data, i + 1, stop, code_classes)
        if next_class != SPACE:
            i, char_class, size = i + 1, next_class, next_size
    last = i
    while char_class != UNKNOWN:
        last = i
        i += size
        if i == stop:
            return stop
        this_class, size = _class_at(data, i, stop, code_classes)
        if this_class == UNKNOWN:
            char_class = this_class
        elif this_class != char_class:
            # The last character of white space belongs to the next pre-token.
            return last if char_class == SPACE and last > start else i
    return -1 - i


@kernel
def _equal_bytes(eight, byte):
    """The highest bit of each of eight bytes that equals `byte`; bits above the lowest one found may be wrong."""
    difference = eight ^ (U64(byte) * U64(0x0101010101010101))
    return (difference - U64(0x0101010101010101)) & ~difference & U64(0x8080808080808080)


@kernel
def find_special(data, start, stop, specials, special_starts, first_bytes):
    """Find the next special token.

    Args:
        specials, special_starts: the bytes of the special tokens, the longest first, and where each starts.
        first_bytes: the distinct first bytes of the special tokens.

    Returns:
        Its offset and its index among the special tokens; `stop` and -1 if there is none.
    """
    if len(first_bytes) == 0:
        return stop, -1
    i = start
    while i < stop:
        # Skip 32 bytes, or else eight bytes, without any of the first bytes.
        if i + 32 <= stop:
            u, matches = U64(i), U64(0)
            for first in first_bytes:
                matches |= _equal_bytes(load8(data, u), first) | _equal_bytes(load8(data, u + U64(8)), first)
                matches |= _equal_bytes(load8(data, u + U64(16)), first) | _equal_bytes(load8(data, u + U64(24)), first)
            if matches == U64(0):
                i += 32
                continue
        if i + 8 <= stop:
            matches = U64(0)
            for first in first_bytes:
                matches |= _equal_bytes(load8(data, U64(i)), first)
            if matches == U64(0):
                i += 8
                continue
            i += I64(trailing_zeros(matches) >> U64(3))
        for number in range(len(special_starts) - 1):
            first_byte, size = special_starts[number], special_starts[number + 1] - special_starts[number]
            if i + size <= stop:
                k = 0
                while k < size and data[i + k] == specials[first_byte + k]:
                    k += 1
                if k == size:
                    return i, number
        i += 1
    return stop, -1
