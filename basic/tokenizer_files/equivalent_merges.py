"""Which merges are applied at all, and which tokens no merges produce.

In any text, a token is produced by the same merge: the last one that is applied to the token's own bytes. Nothing is
merged across the ends of a token, so the text around it does not matter. So it is enough to apply the merges to single
tokens. The result is the same for lists with other merges that are never applied, and for the ranks of tiktoken, which
has no list: it joins the two neighbors whose joined bytes have the lowest rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

from basic.bpe.plain import MergeRules, merge_short
from basic.common.errors import InvalidInputError

# The bytes that occur in UTF-8; the others need no token.
_UTF8_BYTES = [*range(0xC0), *range(0xC2, 0xF5)]


class UsedMerges(NamedTuple):
    """The merges that can be applied in a text, and what they leave over.

    Attributes:
        merges: one for each token that merges produce, the lowest rank first.
        early: a merge that comes before one that produces one of its two tokens, or None. For such merges it matters
            whether a merge is applied at all its positions at once (`MergeRules.one_at_a_time`).
        unmade: the tokens of several bytes that no merges produce.
    """

    merges: list[tuple[bytes, bytes]]
    early: tuple[bytes, bytes] | None
    unmade: list[bytes]

    def check_order(self) -> None:
        """Raise InvalidInputError if there is an early merge."""
        if self.early is not None:
            raise InvalidInputError(
                f"the merge {self.early!r} comes before the merges that produce its two tokens, which programs treat "
                "differently; put it after them"
            )


def used_merges(
    rules: MergeRules,
    tokens: Mapping[int, bytes],
    find_pairs: Callable[[list[bytes]], Iterable[tuple[int, int] | None]] | None = None,
) -> UsedMerges:
    """Find the merges that are used, if one merge is applied at a time.

    Args:
        tokens: id to bytes, of all tokens that merges may produce.
        find_pairs: a fast way to find what `last_merge` finds for each token of a list.
    """
    distinct = [token for token in dict.fromkeys(tokens.values()) if len(token) > 1]
    ranked: list[tuple[int, tuple[bytes, bytes]]] = []
    rank_of: dict[bytes, int] = {}
    unmade = []
    pairs = map(partial(last_merge, rules), distinct) if find_pairs is None else find_pairs(distinct)
    for token, pair in zip(distinct, pairs, strict=True):
        rank = None if pair is None else rules.ranks.get(pair)
        if pair is None or rank is None:
            unmade.append(token)
            continue
        rank_of[token] = rank
        ranked.append((rank, (tokens[pair[0]], tokens[pair[1]])))
    ranked.sort()
    early = [merge for rank, merge in ranked if any(rank_of[token] > rank for token in merge if len(token) > 1)]
    return UsedMerges([merge for _, merge in ranked], early[0] if early else None, unmade)


def last_merge(rules: MergeRules, token: bytes) -> tuple[int, int] | None:
    """The two ids that the last merge of the bytes of a token joins to one; None if several are left."""
    try:
        ids = [rules.byte_ids[byte] for byte in token]
    except KeyError:
        return None
    left, *others = merge_short(ids, rules.ranks, rules.results, True, fewest=2)
    return (left, others[0]) if len(others) == 1 and rules.ranks.get((left, others[0])) is not None else None


def missing_bytes(tokens: Iterable[bytes]) -> bytes:
    """The bytes of UTF-8 that are not among the tokens, in order."""
    tokens = tokens if isinstance(tokens, Mapping) else {token for token in tokens if len(token) == 1}
    return bytes(byte for byte in _UTF8_BYTES if bytes([byte]) not in tokens)


def check_all_bytes(tokens: Iterable[bytes], name: str) -> None:
    """Check that each byte of UTF-8 is a token.

    Raises:
        InvalidInputError: a byte is missing.
    """
    if missing := missing_bytes(tokens):
        raise InvalidInputError(
            f"{name} lacks a token for the byte 0x{missing[0]:02x} ({len(missing)} bytes in all), which other "
            "programs drop, replace or cannot encode; all bytes of UTF-8 are needed"
        )
