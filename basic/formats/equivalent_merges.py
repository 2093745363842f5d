"""Which merges are ever applied, and which merges the ranks of tiktoken stand for.

Inside a text, a token is always made by the same merge, the one that makes it of its own bytes: no token crosses its
ends, so nothing around it matters. So it is enough to apply the merges to single tokens.

tiktoken knows no merges: it joins the two neighbours whose bytes together have the lowest rank, and takes a pre-token
that is itself a token as it is. The first is the same as applying the one merge that makes each token, in the order of
the ranks; the second is the same wherever merges make every token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from basic.bpe.plain import apply_merges

# Bytes that UTF-8 has; the others need no token.
_TEXT_BYTES = [*range(0xC0), *range(0xC2, 0xF5)]


class _Merging:
    """The merges so far, applied to one token at a time."""

    def __init__(self) -> None:
        self._tokens = [bytes([byte]) for byte in range(256)]
        self._numbers = {token: number for number, token in enumerate(self._tokens)}
        self._ranks: dict[tuple[int, int], int] = {}
        self._results: list[int] = []

    def parts(self, token: bytes) -> list[bytes]:
        """What the merges so far make of the bytes of a token."""
        return [self._tokens[number] for number in apply_merges(list(token), self._ranks, self._results)]

    def add(self, left: bytes, right: bytes) -> None:
        self._ranks[self._numbers[left], self._numbers[right]] = len(self._results)
        self._results.append(len(self._tokens))
        self._numbers[left + right] = len(self._tokens)
        self._tokens.append(left + right)


def used_merges(merges: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The merges that are applied in any text: one for each token that can be made.

    Raises:
        ValueError: a merge comes before one that makes its parts, so that programs differ in what they do.
    """
    merging, used, early = _Merging(), [], []
    for merge in merges:
        parts = merging.parts(merge[0] + merge[1])
        if parts == list(merge):
            merging.add(*merge)
            used.append(merge)
        elif len(parts) > 1:
            early.append(merge)
    for merge in early:
        if merging.parts(merge[0] + merge[1]) == list(merge):
            raise ValueError(
                f"the merge {merge!r} comes before those that make its parts, where programs differ in what they do; "
                "put it behind them"
            )
    return used


def merges_of_ranks(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges that give the ids that tiktoken gives with these ranks.

    Raises:
        ValueError: there are none.
    """
    merging, merges = _Merging(), []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) == 1:
            continue
        parts = merging.parts(token)
        if len(parts) != 2:
            raise ValueError(
                f"the token {token!r} of rank {ranks[token]} is not made of two tokens of lower ranks, but of "
                f"{len(parts)}, {parts!r}: no merges give tiktoken's ids for it"
            )
        merges.append((parts[0], parts[1]))
        merging.add(*merges[-1])
    return merges


def check_bytes(tokens: Iterable[bytes], what: str) -> None:
    missing = {bytes([byte]) for byte in _TEXT_BYTES}.difference(tokens)
    if missing:
        raise ValueError(
            f"{what} lacks a token for the byte 0x{min(missing).hex()} ({len(missing)} bytes in all), which other "
            "programs drop, replace or fail at; all bytes of UTF-8 are needed"
        )
