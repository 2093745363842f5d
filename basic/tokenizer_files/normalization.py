"""Changes of a text before it is split: Unicode's NFC, white space beside special tokens, characters without tokens.

None of them reaches across a special token. NFC is that of Python's `unicodedata`, whose version of Unicode is
`UNICODE_VERSION`. Unicode never changes the normal form of a character that it has, so programs with other versions
differ only in characters that are newer than one of the two.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import chain, pairwise

from basic.common.errors import InvalidInputError
from basic.pretokenization import SpecialTokens
from basic.tokenizer_files.content import TokenizerSettings

UNICODE_VERSION = unicodedata.unidata_version
"""The version of Unicode by which texts are normalized."""

# White_Space of Unicode, which str.isspace has, with four more.
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_HANGUL_SYLLABLES = range(0xAC00, 0xD7A4)


class TextChanges:
    """The changes that a tokenizer needs before it splits a text.

    Args:
        settings: the normalizer, and which special tokens take white space.
        missing_bytes: characters with one of these bytes are replaced by U+FFFD.

    Raises:
        InvalidInputError: special tokens for which the changed text could have other special tokens than the text.
    """

    def __init__(self, special_tokens: SpecialTokens, settings: TokenizerSettings, missing_bytes: bytes = b"") -> None:
        self._nfc = settings.normalizer == "NFC"
        tokens = special_tokens.tokens
        # Where the text is not yet normalized, a normalized token can be missing, or be joined with what is beside it.
        unnormalized = [token for token in tokens if not settings.flag(token, "normalized")]
        self._after: TextChanges | None = None
        if self._nfc and len(unnormalized) < len(tokens):
            self._after = TextChanges(special_tokens, replace(settings, normalizer=None), missing_bytes)
            special_tokens, missing_bytes = SpecialTokens(unnormalized), b""
        self._special, self._missing_bytes = special_tokens, missing_bytes
        self._lstrip = frozenset(token for token in special_tokens.tokens if settings.flag(token, "lstrip"))
        self._rstrip = frozenset(token for token in special_tokens.tokens if settings.flag(token, "rstrip"))
        if self._nfc:
            for token in tokens:
                _check_normal(token, settings.flag(token, "normalized"))
        if self._lstrip or self._rstrip:
            _check_overlaps(tokens, self._lstrip | self._rstrip)

    def __bool__(self) -> bool:
        """Whether any text is changed."""
        return bool(self._nfc or self._lstrip or self._rstrip or self._missing_bytes)

    def apply(self, text: str) -> str:
        """The changed text."""
        if not self._lstrip and not self._rstrip and self._segment(text) is text:
            return text if self._after is None else self._after.apply(text)
        return "".join(self.apply_to_stream([text]))

    def origins(self, text: str) -> list[tuple[int, int, bool]] | None:
        """For each character of the changed text, the span of what it was made of, and whether it is still the same.

        Characters that NFC may join or reorder have one span together. None if text is left out or replaced, so that
        not all of it is in a span.
        """
        if self._lstrip or self._rstrip or self._missing_bytes or self._after:
            return None
        origins: list[tuple[int, int, bool]] = []
        position = 0
        for stop, after in [*(match.span() for match in self._special.pattern.finditer(text)), (len(text),) * 2]:
            segment = text[position:stop]
            starts = range(position, stop)
            if not unicodedata.is_normalized("NFC", segment):
                starts = [i for i in starts if i == position or begins_alone(text[i])]
            for start, end in pairwise([*starts, stop]):
                piece = unicodedata.normalize("NFC", text[start:end])
                if piece == text[start:end]:
                    origins += [(i, i + 1, True) for i in range(start, end)]
                else:
                    origins += [(start, end, False)] * len(piece)
            origins += [(i, i + 1, True) for i in range(stop, after)]
            position = after
        return origins

    def apply_to_stream(self, texts: Iterable[str]) -> Iterator[str]:
        """The same for a text that arrives as a stream of strings.

        The end of what has arrived is held back as long as it can change: a special token may start there, a character
        may combine with the next one, and white space may belong to a special token.
        """
        changed = self._apply_to_stream(texts)
        return changed if self._after is None else self._after.apply_to_stream(changed)

    def _apply_to_stream(self, texts: Iterable[str]) -> Iterator[str]:
        special, held, new, new_length, strip_start = self._special, "", [], 0, False
        for text in chain(texts, [None]):
            if text is not None:
                new.append(text)
                new_length += len(text)
                if new_length <= len(held):  # so that the total time is linear
                    continue
            available = held + "".join(new)
            certain = len(available) if text is None else len(available) - special.max_length + 1
            changed, position = [], 0
            for match in special.pattern.finditer(available):
                if match.start() >= certain:
                    break
                token, segment = match.group(), available[position : match.start()]
                segment = self._segment(segment.lstrip(_WHITE_SPACE) if strip_start else segment)
                changed += [segment.rstrip(_WHITE_SPACE) if token in self._lstrip else segment, token]
                position, strip_start = match.end(), token in self._rstrip
            stop = max(position, certain if text is None else self._last_boundary(available, position, certain))
            segment = available[position:stop]
            if strip_start:
                segment = segment.lstrip(_WHITE_SPACE)
                strip_start = not segment
            changed.append(self._segment(segment))
            yield "".join(changed)
            held, new, new_length = available[stop:], [], 0

    def _segment(self, text: str) -> str:
        """Change a text without special tokens; returns the same object if nothing changes."""
        if self._nfc and not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
        if self._missing_bytes:
            data = text.encode(errors="surrogateescape")
            if len(data.translate(None, self._missing_bytes)) < len(data):
                missing = frozenset(self._missing_bytes)
                text = "".join(
                    "\ufffd" if missing & {*char.encode(errors="surrogateescape")} else char for char in text
                )
        return text

    def _last_boundary(self, text: str, start: int, stop: int) -> int:
        """The last position from `start` to `stop` where the text may be divided and each half changed alone."""
        for position in range(min(stop, len(text) - 1), start, -1):
            before, after = text[position - 1], text[position]
            if self._nfc and not begins_alone(after):
                continue
            if self._lstrip and before in _WHITE_SPACE:
                continue
            return position
        return start


def begins_alone(character: str) -> bool:
    """Whether NFC never joins or reorders a character and what stands before it, so that a text may be divided there.

    This is so if the first character of its decomposition is no mark and ends no composition.

    Source: Unicode Standard Annex #15, "Stable Code Points" and "Detecting Normalization Forms".
    """
    if character.isascii():
        return True
    first = unicodedata.normalize("NFD", character)[0]
    return not unicodedata.combining(first) and first not in _compositions()[1]


@cache
def _compositions() -> tuple[frozenset[str], frozenset[str]]:
    """The characters that NFC makes of others, and those that it can join to the one before them."""
    made, joined = set(), {chr(code) for code in chain(range(0x1161, 0x1176), range(0x11A8, 0x11C3))}
    for code in range(sys.maxunicode + 1):
        if decomposition := _canonical_decomposition(chr(code)):
            made.add(unicodedata.normalize("NFC", chr(code)))
            joined.update(decomposition[1:])
    return frozenset("".join(made)), frozenset(joined)


def _canonical_decomposition(character: str) -> str:
    decomposition = unicodedata.decomposition(character)
    if not decomposition or decomposition.startswith("<"):
        return ""
    return "".join(chr(int(code, 16)) for code in decomposition.split())


def _check_normal(token: str, normalized: bool) -> None:
    """Check that NFC makes no special token of other characters, or one that is searched for in normalized text."""
    if normalized and not unicodedata.is_normalized("NFC", token):
        raise InvalidInputError(f"the special token {token!r} is to be normalized, but is not in NFC; write it in NFC")
    if not normalized:
        for character in token:
            # U+212A, U+037E and U+1FEF become these three.
            is_safe = character not in "K;`" if character.isascii() else _comes_only_from_itself(character)
            if not is_safe:
                raise InvalidInputError(
                    f"the special token {token!r} has {character!r}, which NFC also makes of other characters, so the "
                    "normalized text could have it where the text does not; this is not supported: set its 'normalized'"
                )


def _comes_only_from_itself(character: str) -> bool:
    is_made = ord(character) in _HANGUL_SYLLABLES or character in _compositions()[0]
    return begins_alone(character) and not is_made and _canonical_decomposition(character) == ""


def _check_overlaps(tokens: Iterable[str], stripping: Iterable[str]) -> None:
    for token in stripping:
        for other in tokens:
            if overlap(token, other) if token != other else has_border(token):
                raise InvalidInputError(
                    f"the special tokens {token!r} and {other!r} share characters, which is not supported together "
                    "with 'lstrip' or 'rstrip'"
                )


def overlap(one: str, other: str) -> bool:
    """Whether occurrences of both in a text can share a character."""
    if one in other or other in one:
        return True
    lengths = range(1, min(len(one), len(other)))
    return any(one.endswith(other[:n]) or other.endswith(one[:n]) for n in lengths)


def has_border(token: str) -> bool:
    """Whether two different occurrences of a token in a text can share a character."""
    return any(token.endswith(token[:n]) for n in range(1, len(token)))
