"""Tokenizers as rank files of tiktoken: a line a token, in base64, and its rank, which is its id."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterable, Mapping
from itertools import zip_longest

from basic.common.files import atomic_write
from basic.formats.equivalent_merges import check_bytes, merges_of_ranks, used_merges
from basic.Tokenizer import Tokenizer


def save_tiktoken(tokenizer: Tokenizer, path: str | os.PathLike) -> None:
    """Write the tokens as a rank file, which `tiktoken.load.load_tiktoken_bpe` reads.

    The file has neither the pattern nor the special tokens (unless merges make them, too); tiktoken gets both by hand.

    Raises:
        ValueError: tiktoken would give other ids; the message names the token.

    Example:
        >>> save_tiktoken(tokenizer, "ours.tiktoken")
        >>> tiktoken.Encoding(
        ...     "ours",
        ...     pat_str=tokenizer.pattern or PATTERNS["gpt2"],
        ...     mergeable_ranks=tiktoken.load.load_tiktoken_bpe("ours.tiktoken"),
        ...     special_tokens=tokenizer.special_token_ids,
        ... )
    """
    merges = used_merges(tokenizer.merges)
    made = {left + right for left, right in merges}
    special = set(tokenizer.special_token_ids.values())
    ranks: dict[bytes, int] = {}
    for token_id, token in sorted(tokenizer.vocab.items()):
        if token_id in special and len(token) > 1 and token not in made:
            continue
        if token in ranks:
            raise ValueError(f"the ids {ranks[token]} and {token_id} are both {token!r}, which can have one rank only")
        ranks[token] = token_id
    check_bytes(ranks, "the vocabulary")
    for number, (ours, theirs) in enumerate(zip_longest(merges, merges_of_ranks(ranks))):
        if ours != theirs:
            raise ValueError(
                f"merge {number} is {ours!r}, but would be {theirs!r} for tiktoken: ids are ranks there, so they "
                "must be in the order of the merges, one a token"
            )
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    with atomic_write(path) as file:
        file.write(b"".join(lines))


def load_tiktoken(
    path: str | os.PathLike, *, pattern: str, special_tokens: Mapping[str, int] | Iterable[str] = ()
) -> Tokenizer:
    """Read a rank file of tiktoken.

    Args:
        pattern: a name ("gpt2", "cl100k", "o200k") or the pattern itself: the file does not say it.
        special_tokens: with their ids, or without, to have them count on from the largest rank.

    Raises:
        ValueError: a line is no token with its rank (the line is named), two have the same token or rank, or no merges
            give tiktoken's ids (the token is named).
        OSError: the file cannot be read.
    """
    ranks: dict[bytes, int] = {}
    with open(path, "rb") as file:
        lines = file.read().splitlines()
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            encoded, rank = line.split(b" ")
            token = base64.b64decode(encoded, validate=True)
            if not token or not rank.isdigit():
                raise ValueError
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{os.fspath(path)!r}, line {number}: {line[:80]!r} must be a token in base64, a space and a rank"
            ) from None
        if token in ranks:
            raise ValueError(f"{os.fspath(path)!r}, line {number}: the token {token!r} is there twice")
        ranks[token] = int(rank)
    vocab = {rank: token for token, rank in ranks.items()}
    if len(vocab) < len(ranks):
        twice = next(token for token, rank in ranks.items() if vocab[rank] != token)
        raise ValueError(f"{os.fspath(path)!r}: the tokens {twice!r} and {vocab[ranks[twice]]!r} have the same rank")
    try:
        check_bytes(ranks, "the file")
        merges = merges_of_ranks(ranks)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r}: {error}") from error
    if isinstance(special_tokens, Mapping):
        for special, token_id in special_tokens.items():
            token = special.encode()
            if ranks.get(token, token_id) != token_id or vocab.setdefault(token_id, token) != token:
                raise ValueError(
                    f"special token {special!r} cannot have the id {token_id}: in {os.fspath(path)!r} the token or the "
                    "rank is another's"
                )
    return Tokenizer(vocab, merges, special_tokens, pattern=pattern)
