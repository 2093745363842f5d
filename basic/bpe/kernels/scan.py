"""The scanner: where the words (pre-tokens) of GPT-2's pattern begin, in UTF-8 bytes.

The pattern looks like a search, yet whether a word begins at a byte depends on about three bytes before it and two
after it. So it can be written as loops without a branch over blocks of bytes, which the compiler turns into vector
instructions: classify every byte, mark the beginnings, mark the contractions. A loop that goes from word to word
ran at 78 MB/s on one core in a prototype, these at 2,500.

    bytes        T h e   c a t ' s    2   d o g s .
    class        L L L S L L L O L S  N S L L L L O      letter, number, space, other
    begins       1 0 0 1 0 0 0 1 0 1  0 1 0 0 0 0 1      " cat" takes the space, "'s" is a contraction

Classes of characters beyond ASCII come from a table that the `regex` package itself fills (`fill_classes`), so that
both paths agree by construction. UTF-8 is checked on the way, and only where a block has bytes beyond ASCII.
"""

from __future__ import annotations

import contextlib
from functools import cache

import numpy as np
import regex

from basic.bpe.kernels.instructions import U64, count_ones, kernel, load8, store8, trailing_zeros

U8, I64 = np.uint8, np.int64

UNKNOWN, LETTER, NUMBER, OTHER, SPACE = 0, 1, 2, 3, 4

# Bytes looked at in one go: five arrays of this length stay in the first-level cache.
BLOCK = 1024
# The block lies behind BEFORE bytes in its arrays, so that it can look back; behind it is room to look ahead.
BEFORE = 8
ROOM = BLOCK + 192

_PLANE = 1 << 16


def new_scratch() -> np.ndarray:
    """What `scan_block` works in: rows for text, classes, begins, contractions of two and of three bytes.

    One array instead of five: handing an array over to a kernel takes as long as encoding four words.
    """
    return np.zeros((5, ROOM), np.uint8)


def new_classes() -> np.ndarray:
    """The class of every code point, none known yet but the first plane, which takes 3 ms (all of them 190)."""
    classes = np.zeros(0x110000, np.uint8)
    fill_classes(classes, 0)
    return classes


@cache
def code_classes() -> np.ndarray:
    """The classes of characters, shared by all: filled as characters are met."""
    return new_classes()


def fill_classes(classes: np.ndarray, code_point: int) -> None:
    """Ask the `regex` package for the classes of the 65,536 code points of a plane."""
    first = code_point // _PLANE * _PLANE
    codes = np.arange(first, first + _PLANE, dtype="<u4")
    codes[(codes >= 0xD800) & (codes < 0xE000)] = 0x21  # surrogates are no characters: "!" instead
    plane = codes.tobytes().decode("utf-32-le")
    result = np.full(_PLANE, OTHER, np.uint8)
    for pattern, kind in ((r"\p{L}+", LETTER), (r"\p{N}+", NUMBER), (r"\s+", SPACE)):
        for match in regex.finditer(pattern, plane):
            result[match.start() : match.end()] = kind
    classes[first : first + _PLANE] = result  # in one go: other threads may read


def learn_classes(code_classes: np.ndarray, data: np.ndarray, place: int) -> bool:
    """Fill in the class that the scanner stopped for; False where the bytes there are not UTF-8."""
    four = data[place : place + 4].tobytes()
    for size in (1, 2, 3, 4):
        with contextlib.suppress(UnicodeDecodeError):
            code_point = ord(four[:size].decode())
            if code_classes[code_point] == UNKNOWN:
                fill_classes(code_classes, code_point)
            return True
    return False


@kernel
def _classify_ascii(text, length, classes):
    """Selects, not arithmetic on bytes: Numba would widen each of them to 64 bits.

    Here and below: a loop from 0 with an offset in the index, not a loop from BEFORE, of whose index the compiler
    cannot tell that it is never negative; it would then not vectorise it, and a block take 18 microseconds, not 0.4.
    """
    for i in range(length):
        c = text[i + BEFORE]
        lower = c | U8(32)
        letter = (lower >= U8(97)) & (lower <= U8(122))
        number = (c >= U8(48)) & (c <= U8(57))
        # U+001C to U+001F are spaces to str.isspace, not to the pattern.
        space = (c == U8(32)) | ((c >= U8(9)) & (c <= U8(13)))
        kind = U8(LETTER) if letter else (U8(NUMBER) if number else (U8(SPACE) if space else U8(OTHER)))
        classes[i + BEFORE] = kind


@kernel
def _has_non_ascii(text, length):
    found = U64(0)
    for i in range(0, length, 32):
        u = U64(i + BEFORE)
        found |= load8(text, u) | load8(text, u + U64(8)) | load8(text, u + U64(16)) | load8(text, u + U64(24))
    return (found & U64(0x8080808080808080)) != U64(0)


@kernel
def character(c, c1, c2, c3):
    """Code point and length of the character that four bytes begin with, length 0 where they are not UTF-8."""
    if c < 0x80:
        return c, 1
    if c < 0xC2 or (c1 & 0xC0) != 0x80:
        return 0, 0
    if c < 0xE0:
        return ((c & 0x1F) << 6) | (c1 & 0x3F), 2
    if (c2 & 0xC0) != 0x80:
        return 0, 0
    if c < 0xF0:
        code = ((c & 0xF) << 12) | ((c1 & 0x3F) << 6) | (c2 & 0x3F)
        if code < 0x800 or 0xD800 <= code <= 0xDFFF:
            return 0, 0
        return code, 3
    if c > 0xF4 or (c3 & 0xC0) != 0x80:
        return 0, 0
    code = ((c & 7) << 18) | ((c1 & 0x3F) << 12) | ((c2 & 0x3F) << 6) | (c3 & 0x3F)
    if code < 0x10000 or code > 0x10FFFF:
        return 0, 0
    return code, 4


@kernel
def _classify_others(text, length, classes, code_classes, wide_spaces):
    """Give each byte of a character beyond ASCII the character's class.

    Returns how many spaces of more than one byte there are (`wide_spaces` gets place * 8 + length of each), and the
    place of the first byte that is not UTF-8 or whose class is not known, -1 without one.
    """
    i, num_spaces = 0, 0
    while i < length:
        # The next byte with its highest bit set, eight at a time.
        high = load8(text, U64(i + BEFORE)) & U64(0x8080808080808080)
        if high == U64(0):
            i += 8
            continue
        i += I64(trailing_zeros(high) >> U64(3))
        while i < length and text[i + BEFORE] >= 0x80:
            j = i + BEFORE
            code, size = character(I64(text[j]), I64(text[j + 1]), I64(text[j + 2]), I64(text[j + 3]))
            kind = code_classes[code]
            if size == 0 or kind == UNKNOWN:
                return num_spaces, i
            for k in range(size):
                classes[j + k] = kind
            if kind == SPACE:
                wide_spaces[num_spaces] = i * 8 + size
                num_spaces += 1
            i += size
    return num_spaces, -1


@kernel
def _mark_begins(text, length, classes, begins):
    for i in range(length):
        here, before, after = classes[i + BEFORE], classes[i + BEFORE - 1], classes[i + BEFORE + 1]
        # Of several spaces the last is a word of its own, or begins the next word if it is U+0020.
        space = (here == U8(SPACE)) & ((before != U8(SPACE)) | (after != U8(SPACE)))
        run = (here != U8(SPACE)) & (here != before) & (text[i + BEFORE - 1] != U8(32))
        begins[i + BEFORE] = U8(space | run)


@kernel
def _mark_contractions(text, length, begins, twos, threes):
    """Where 's 'd 'm 't and 'll 've 're stand: there a word ends after two or three bytes, whatever follows."""
    for i in range(length):
        apostrophe = (text[i + BEFORE] == U8(39)) & (begins[i + BEFORE] == U8(1))
        c, d = text[i + BEFORE + 1], text[i + BEFORE + 2]
        two = (c == U8(115)) | (c == U8(100)) | (c == U8(109)) | (c == U8(116))
        three = ((c == U8(108)) & (d == U8(108))) | (((c == U8(118)) | (c == U8(114))) & (d == U8(101)))
        twos[i + BEFORE] = U8(apostrophe & two)
        threes[i + BEFORE] = U8(apostrophe & three)
    for i in range(length):
        within = twos[i + BEFORE - 1] | threes[i + BEFORE - 1]
        begins[i + BEFORE] = (begins[i + BEFORE] & (U8(1) ^ within)) | twos[i + BEFORE - 2] | threes[i + BEFORE - 3]


@kernel
def _collect(begins, length, places):
    """The places of the ones, in order.

    64 flags become the bits of one number, whose lowest one is found and removed again and again. How often is hard
    for the processor to foresee; so twelve places are always written, and those too many overwritten by the next.
    """
    n, base, end = U64(0), U64(0), U64(length)
    while base < end:
        bits = U64(0)
        for byte in range(8):
            offset = U64(8) * U64(byte)
            # The multiplication gathers the lowest bits of eight bytes in the highest byte.
            flags = load8(begins, base + offset + U64(BEFORE)) * U64(0x0102040810204080)
            bits |= (flags >> U64(56)) << offset
        count, to = count_ones(bits), n
        for _ in range(12):
            places[to] = base + trailing_zeros(bits)
            to += U64(1)
            bits &= bits - U64(1)
        while bits:
            places[to] = base + trailing_zeros(bits)
            to += U64(1)
            bits &= bits - U64(1)
        n += count
        base += U64(64)
    return I64(n)


@kernel
def scan_block(data, start, stop, code_classes, scratch, places):
    """Find the whole words among the first `BLOCK` bytes from `start`, where a word must begin.

    Args:
        data: UTF-8 bytes; the text ends at `stop`.
        code_classes: of `new_classes`.
        scratch: of `new_scratch`; on return the bytes from `start` stand in its first array from BEFORE on, with at
            least 16 more readable behind.
        places: int64, ROOM; gets the beginnings relative to `start` and the end of the last word.

    Returns:
        The number of words, 0 where the first is longer than a block; and the place relative to `start` of a byte
        that is not UTF-8, or begins a character of unknown class, else -1.
    """
    text, classes, begins, twos, threes = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4]
    length = min(BLOCK, stop - start)
    ahead = min(stop - start, length + 32)
    i, from_, size = U64(0), U64(start), U64(ahead)
    while i + U64(8) <= size:
        store8(text, i + U64(BEFORE), load8(data, from_ + i))
        i += U64(8)
    while i < size:
        text[i + U64(BEFORE)] = data[from_ + i]
        i += U64(1)
    if ahead < length + 32:
        # Spaces behind the end: the last space of the text then counts as followed by one, and stays in its run.
        while i < U64(length + 72):
            text[i + U64(BEFORE)] = U8(32)
            i += U64(1)
    _classify_ascii(text, length + 16, classes)
    num_spaces = 0
    if _has_non_ascii(text, length + 16):
        num_spaces, wrong = _classify_others(text, length + 16, classes, code_classes, places)
        if wrong >= 0:
            return 0, wrong
    _mark_begins(text, length, classes, begins)
    for k in range(num_spaces):  # the marks of wide spaces, which were made as if each byte were a character
        place, size_ = places[k] >> 3, places[k] & 7
        if place < length:
            j = place + BEFORE
            begins[j] = U8((classes[j - 1] != SPACE) | (classes[j + size_] != SPACE))
            for q in range(1, size_):
                begins[j + q] = 0
    begins[BEFORE] = 1
    _mark_contractions(text, length, begins, twos, threes)
    for q in range(8):  # _collect reads 64 flags at a time
        store8(begins, U64(length + BEFORE + 8 * q), U64(0))
    num_words = _collect(begins, length, places)
    if start + length == stop:
        places[num_words] = length
        return num_words, -1
    return num_words - 1, -1


@kernel
def _class_at(data, i, stop, code_classes):
    """Class and length of the character at a place; UNKNOWN and 0 where there is none in UTF-8."""
    c1 = I64(data[i + 1]) if i + 1 < stop else 0
    c2 = I64(data[i + 2]) if i + 2 < stop else 0
    c3 = I64(data[i + 3]) if i + 3 < stop else 0
    code, size = character(I64(data[i]), c1, c2, c3)
    return (I64(code_classes[code]), size) if size else (I64(UNKNOWN), 0)


@kernel
def end_of_long_word(data, start, stop, code_classes):
    """The end of a word that is longer than a block (so no contraction), from character to character.

    Returns:
        The end; or, where a byte is not UTF-8 or the class unknown, -1 minus its place.
    """
    i = start
    kind, size = _class_at(data, i, stop, code_classes)
    if data[i] == 32:
        following, size_following = _class_at(data, i + 1, stop, code_classes)
        if following != SPACE:
            i, kind, size = i + 1, following, size_following
    last = i
    while kind != UNKNOWN:
        last = i
        i += size
        if i == stop:
            return stop
        here, size = _class_at(data, i, stop, code_classes)
        if here == UNKNOWN:
            kind = here
        elif here != kind:
            # White space leaves its last character to what follows.
            return last if kind == SPACE and last > start else i
    return -1 - i


@kernel
def _equal_bytes(eight, byte):
    """The highest bit of each of eight bytes that has a value; above the lowest of them bits may be wrong."""
    difference = eight ^ (U64(byte) * U64(0x0101010101010101))
    return (difference - U64(0x0101010101010101)) & ~difference & U64(0x8080808080808080)


@kernel
def find_special(data, start, stop, specials, special_starts, first_bytes):
    """The next special token: its place and its number, `stop` and -1 without one.

    Args:
        specials, special_starts: the bytes of the special tokens, the longest first, and where each begins.
        first_bytes: each byte that one of them begins with, once.
    """
    if len(first_bytes) == 0:
        return stop, -1
    i = start
    while i < stop:
        # No first byte among the next 32, or else among the next eight.
        if i + 32 <= stop:
            u, hits = U64(i), U64(0)
            for first in first_bytes:
                hits |= _equal_bytes(load8(data, u), first) | _equal_bytes(load8(data, u + U64(8)), first)
                hits |= _equal_bytes(load8(data, u + U64(16)), first) | _equal_bytes(load8(data, u + U64(24)), first)
            if hits == U64(0):
                i += 32
                continue
        if i + 8 <= stop:
            hits = U64(0)
            for first in first_bytes:
                hits |= _equal_bytes(load8(data, U64(i)), first)
            if hits == U64(0):
                i += 8
                continue
            i += I64(trailing_zeros(hits) >> U64(3))
        for number in range(len(special_starts) - 1):
            begin, size = special_starts[number], special_starts[number + 1] - special_starts[number]
            if i + size <= stop:
                k = 0
                while k < size and data[i + k] == specials[begin + k]:
                    k += 1
                if k == size:
                    return i, number
        i += 1
    return stop, -1
