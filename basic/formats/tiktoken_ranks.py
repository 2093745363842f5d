"""Read and write tokenizers as rank files of tiktoken: one token a line, in base64, with its rank, which is its id."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterable, Mapping
from itertools import zip_longest

from basic.common.errors import DamagedFileError, InvalidInputError
from basic.common.files import atomic_write
from basic.formats.equivalent_merges import check_all_bytes, merges_of_ranks, used_merges
from basic.pretokenization import covers_all_text
from basic.Tokenizer import Tokenizer


def save_tiktoken(tokenizer: Tokenizer, path: str | os.PathLike) -> None:
    """Write the tokens as a rank file, which `tiktoken.load.load_tiktoken_bpe` reads.

    The file has no pattern and no special tokens (except those that merges produce too). Both are arguments of
    `tiktoken.Encoding`.

    Raises:
        InvalidInputError: tiktoken would give other ids (the message has the token), or leave text out: it drops what
            the pattern does not match.
        OSError: the file cannot be written.

    Example:
        >>> save_tiktoken(tokenizer, "ours.tiktoken")
        >>> tiktoken.Encoding(
        ...     "ours",
        ...     pat_str=tokenizer.compiled_pattern.splits[0],
        ...     mergeable_ranks=tiktoken.load.load_tiktoken_bpe("ours.tiktoken"),
        ...     special_tokens=tokenizer.special_token_ids,
        ... )
    """
    pattern = tokenizer.compiled_pattern
    if len(pattern.splits) > 1:
        raise InvalidInputError(
            f"the tokenizer's pattern has {len(pattern.splits)} regular expressions, {pattern.splits!r}, but tiktoken "
            "takes only one"
        )
    if not covers_all_text(pattern):
        raise InvalidInputError(
            f"the tokenizer's pattern {pattern.splits[0]!r} may leave out characters, which tiktoken would drop "
            "and this tokenizer encodes; only patterns that certainly match every character can be saved: the known "
            r"ones, and simple ones, for example with \s|\S as the last alternatives"
        )
    merges = used_merges(tokenizer.merges)
    merged = {left + right for left, right in merges}
    special = set(tokenizer.special_token_ids.values())
    ranks: dict[bytes, int] = {}
    for token_id, token in sorted(tokenizer.vocab.items()):
        if token_id in special and len(token) > 1 and token not in merged:
            continue
        if token in ranks:
            raise InvalidInputError(
                f"the ids {ranks[token]} and {token_id} are both {token!r}, but a token can have only one rank"
            )
        ranks[token] = token_id
    check_all_bytes(ranks, "the vocabulary")
    for number, (ours, theirs) in enumerate(zip_longest(merges, merges_of_ranks(ranks))):
        if ours != theirs:
            raise InvalidInputError(
                f"merge {number} is {ours!r}, but would be {theirs!r} for tiktoken: its ranks are the ids, so the ids "
                "must be in the order of the merges, with one merge a token"
            )
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    with atomic_write(path) as file:
        file.write(b"".join(lines))


def load_tiktoken(
    path: str | os.PathLike, *, pattern: str, special_tokens: Mapping[str, int] | Iterable[str] = ()
) -> Tokenizer:
    """Read a rank file of tiktoken.

    Args:
        pattern: a name ("gpt2", "cl100k", "o200k") or a regular expression; the file does not have it.
        special_tokens: with their ids; or without ids, to number them from the largest rank on.

    Raises:
        DamagedFileError: a line is not a token with its rank (the message has the line), or two lines have the same
            token or rank.
        InvalidInputError: no merges give tiktoken's ids (the message has the token), or the pattern or a special token
            is invalid.
        OSError: the file cannot be read.
    """
    name, ranks = os.fspath(path), _read_ranks(path)
    vocab = {rank: token for token, rank in ranks.items()}
    if len(vocab) < len(ranks):
        token = next(token for token, rank in ranks.items() if vocab[rank] != token)
        raise DamagedFileError(f"{name!r}: the tokens {token!r} and {vocab[ranks[token]]!r} have the same rank")
    try:
        check_all_bytes(ranks, "the file")
        merges = merges_of_ranks(ranks)
    except InvalidInputError as error:
        raise InvalidInputError(f"{name!r}: {error}") from error
    if isinstance(special_tokens, Mapping):
        for special, token_id in special_tokens.items():
            token = special.encode()
            if ranks.get(token, token_id) != token_id or vocab.setdefault(token_id, token) != token:
                raise InvalidInputError(
                    f"special token {special!r} cannot have the id {token_id}: in {name!r} the token has another rank, "
                    "or the rank another token"
                )
    return Tokenizer(vocab, merges, special_tokens, pattern=pattern)


def _read_ranks(path: str | os.PathLike) -> dict[bytes, int]:
    """Token to rank."""
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
            raise DamagedFileError(
                f"{os.fspath(path)!r}, line {number}: {line[:80]!r} must be a token in base64, a space and a rank"
            ) from None
        if token in ranks:
            raise DamagedFileError(f"{os.fspath(path)!r}, line {number}: the token {token!r} is given twice")
        ranks[token] = int(rank)
    return ranks
