"""Which merges are applied at all, and which merges are equivalent to the ranks of tiktoken.

In any text, a token is produced by the same merge: the last one that is applied to the token's own bytes. Nothing is
merged across the ends of a token, so the text around it does not matter. So it is enough to apply the merges to single
tokens.

tiktoken has no merges. It joins the two neighbours whose joined bytes have the lowest rank, and a pre-token that is a
token is not split. The first rule is equivalent to one merge for each token, in the order of the ranks. The second rule
makes no difference if merges produce every token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from basic.bpe.plain import apply_merges
from basic.common.errors import InvalidInputError

# The bytes that occur in UTF-8; the others need no token.
_UTF8_BYTES = [*range(0xC0), *range(0xC2, 0xF5)]


class _Merger:
    """Applies the merges so far to one token at a time."""

    def __init__(self) -> None:
        self._tokens = [bytes([byte]) for byte in range(256)]
        self._ids = {token: i for i, token in enumerate(self._tokens)}
        self._ranks: dict[tuple[int, int], int] = {}
        self._results: list[int] = []

    def split(self, token: bytes) -> list[bytes]:
        """The tokens that result from the bytes of a token."""
        return [self._tokens[i] for i in apply_merges(list(token), self._ranks, self._results)]

    def add(self, left: bytes, right: bytes) -> None:
        self._ranks[self._ids[left], self._ids[right]] = len(self._results)
        self._results.append(len(self._tokens))
        self._ids[left + right] = len(self._tokens)
        self._tokens.append(left + right)


def used_merges(merges: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The merges that can be applied in a text: one for each token that merges produce.

    Raises:
        InvalidInputError: a merge comes before those that produce its two tokens. Programs treat it differently.
    """
    merger, used, early = _Merger(), [], []
    for merge in merges:
        tokens = merger.split(merge[0] + merge[1])
        if tokens == list(merge):
            merger.add(*merge)
            used.append(merge)
        elif len(tokens) > 1:
            early.append(merge)
    for merge in early:
        if merger.split(merge[0] + merge[1]) == list(merge):
            raise InvalidInputError(
                f"the merge {merge!r} comes before the merges that produce its two tokens, which programs treat "
                "differently; put it after them"
            )
    return used


def merges_of_ranks(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges that give the same ids as tiktoken with these ranks.

    Raises:
        InvalidInputError: there are no such merges.
    """
    merger, merges = _Merger(), []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) == 1:
            continue
        tokens = merger.split(token)
        if len(tokens) != 2:
            raise InvalidInputError(
                f"the token {token!r} of rank {ranks[token]} does not result from two tokens of lower ranks, but from "
                f"{len(tokens)}, {tokens!r}: no merges give tiktoken's ids for it"
            )
        merges.append((tokens[0], tokens[1]))
        merger.add(*merges[-1])
    return merges


def check_all_bytes(tokens: Iterable[bytes], name: str) -> None:
    """Check that each byte of UTF-8 is a token.

    Args:
        name: of the tokens, for the message.

    Raises:
        InvalidInputError: a byte is missing.
    """
    missing = {bytes([byte]) for byte in _UTF8_BYTES}.difference(tokens)
    if missing:
        raise InvalidInputError(
            f"{name} lacks a token for the byte 0x{min(missing).hex()} ({len(missing)} bytes in all), which other "
            "programs drop, replace or cannot encode; all bytes of UTF-8 are needed"
        )
