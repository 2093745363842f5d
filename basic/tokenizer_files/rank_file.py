"""Read and write tokenizers as rank files of tiktoken: one token a line, in base64, with its rank, which is its id.

A file does not say which pattern and special tokens belong to it. Of published files they are known.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import marshal
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest

from basic.bpe.plain import rules_of_ranks
from basic.common.errors import DamagedFileError, InvalidInputError
from basic.common.files import read_file
from basic.common.native.cache_files import read_checked, write_checked
from basic.common.native.object_files import cache_folder
from basic.common.outputs import Output, write_output
from basic.pretokenization import PATTERNS, Pattern, resolve_pattern
from basic.tokenizer_files.content import TokenizerContent
from basic.tokenizer_files.equivalent_merges import UsedMerges, check_all_bytes, used_merges

_LETTER = rb"[A-Za-z0-9+/]"
_LINES = re.compile(rb"(?:(?! )(?:%(x)b{4})*+(?:%(x)b{2}==|%(x)b{3}=)? [0-9]++\r?\n)*+\Z" % {b"x": _LETTER})

# What is read from a file of this size is kept for later processes.
_MIN_KEPT_BYTES = 1 << 18

_END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class PublishedRanks:
    """What belongs to a published rank file."""

    sha256: str
    pattern: str
    special_tokens: dict[str, int]


def _llama3() -> dict[str, int]:
    named = {
        0: "begin_of_text",
        1: "end_of_text",
        4: "finetune_right_pad_id",
        5: "step_id",
        6: "start_header_id",
        7: "end_header_id",
        8: "eom_id",
        9: "eot_id",
        10: "python_tag",
        11: "image",
    }
    reserved = iter(range(256))
    names = [named.get(i) or f"reserved_special_token_{next(reserved)}" for i in range(256)]
    return {f"<|{name}|>": 128_000 + i for i, name in enumerate(names)}


# Sources: tiktoken's openai_public.py; llama_models/llama3/tokenizer.py of Llama 3.1 and later; Qwen2's tokenizer.
PUBLISHED_RANKS = {
    "r50k_base": PublishedRanks(
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930", "gpt2", {_END_OF_TEXT: 50_256}
    ),
    "p50k_base": PublishedRanks(
        "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069", "gpt2", {_END_OF_TEXT: 50_256}
    ),
    "cl100k_base": PublishedRanks(
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        "cl100k",
        {
            _END_OF_TEXT: 100_257,
            "<|fim_prefix|>": 100_258,
            "<|fim_middle|>": 100_259,
            "<|fim_suffix|>": 100_260,
            "<|endofprompt|>": 100_276,
        },
    ),
    "o200k_base": PublishedRanks(
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        "o200k",
        {_END_OF_TEXT: 199_999, "<|endofprompt|>": 200_018},
    ),
    "Llama 3": PublishedRanks("82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55", "llama3", _llama3()),
    "Qwen 2": PublishedRanks(
        "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
        "qwen2",
        {_END_OF_TEXT: 151_643, "<|im_start|>": 151_644, "<|im_end|>": 151_645},
    ),
}


def find_published(sha256: str, vocab: dict[int, bytes]) -> tuple[str, dict[str, int]] | None:
    """The pattern and the special tokens that belong to a rank file; None if it is not known.

    A file is known if it is a published one, or if it has special tokens of only one of them, at their published ids.
    """
    for published in PUBLISHED_RANKS.values():
        if published.sha256 == sha256:
            return published.pattern, published.special_tokens
    found: dict[str, dict[str, int]] = {}
    for published in PUBLISHED_RANKS.values():
        for token, token_id in published.special_tokens.items():
            if vocab.get(token_id) == token.encode():
                found.setdefault(published.pattern, {})[token] = token_id
    return next(iter(found.items())) if len(found) == 1 else None


def read_rank_file(
    path: str | os.PathLike,
    content: bytes | None = None,
    *,
    pattern: str | Pattern | None = None,
    special_tokens: Mapping[str, int] | Iterable[str] | None = None,
) -> TokenizerContent:
    """Read a rank file of tiktoken. As for tiktoken, a pre-token that is a token is not split.

    Args:
        content: the file's content, if it has been read already.
        pattern: None: that of the published file that this is, or whose special tokens it has.
        special_tokens: None: those of the published file that this is.

    Raises:
        DamagedFileError: a line is not a token with its rank (the message has the line), or two lines have the same
            token or rank.
        InvalidInputError: a byte has no token, the pattern is not given and not known, or it is invalid.
        OSError: the file cannot be read.
    """
    name = os.fspath(path)
    if content is None:
        content = read_file(path)
    digest = hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest()
    vocab = _kept_vocab(name, content, digest)
    published = find_published(digest, vocab)
    if special_tokens is None:
        special_tokens = {} if published is None else published[1]
        for token_id in special_tokens.values():  # no merge makes them, also where the file has them
            vocab.pop(token_id, None)
    if pattern is None:
        if published is None:
            raise InvalidInputError(
                f"{name!r} is a rank file, which does not say how a text is split, and it is none of the published "
                f"files that are known; give its pattern: {', '.join(PATTERNS)}, or one of your own as "
                "basic.pretokenization.Pattern"
            )
        pattern = published[0]
    return TokenizerContent(vocab=vocab, merges=None, special_tokens=special_tokens, pattern=pattern)


def _kept_vocab(name: str, content: bytes, digest: str) -> dict[int, bytes]:
    """Rank to token; once a large file has been checked, from a file that takes a fifth of the time."""
    folder = cache_folder() if len(content) >= _MIN_KEPT_BYTES else None
    path = folder and folder / f"ranks.{digest[:32]}.{marshal.version}"
    if path is not None and (data := read_checked(path)) is not None:
        return marshal.loads(data)
    ranks = _parse(name, content)
    vocab = {rank: token for token, rank in ranks.items()}
    if len(vocab) < len(ranks):
        token = next(token for token, rank in ranks.items() if vocab[rank] != token)
        raise DamagedFileError(f"{name!r}: the tokens {token!r} and {vocab[ranks[token]]!r} have the same rank")
    try:
        check_all_bytes(ranks, "the file")
    except InvalidInputError as error:
        raise InvalidInputError(f"{name!r}: {error}") from error
    if path is not None:
        write_checked(path, marshal.dumps(vocab))
    return vocab


def _parse(name: str, content: bytes) -> dict[bytes, int]:
    """Token to rank."""
    if _LINES.match(content):  # the fast way
        fields = content.split()
        ranks = dict(zip(map(binascii.a2b_base64, fields[::2]), map(int, fields[1::2]), strict=True))
        if len(ranks) == len(fields) // 2:
            return ranks
    if b"<unk>" in content[:100]:
        raise InvalidInputError(f"{name!r} is a SentencePiece model, which is not supported; only byte-level BPE is")
    ranks = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            encoded, rank = line.split(b" ")
            token = base64.b64decode(encoded, validate=True)
            if not token or not rank.isdigit():
                raise ValueError
        except (ValueError, binascii.Error):
            raise DamagedFileError(
                f"{name!r}, line {number}: {line[:80]!r} must be a token in base64, a space and a rank"
            ) from None
        if token in ranks:
            raise DamagedFileError(f"{name!r}, line {number}: the token {token!r} is given twice")
        ranks[token] = int(rank)
    return ranks


def write_rank_file(
    content: TokenizerContent, used: UsedMerges, path: str | os.PathLike, *, overwrite: bool = True
) -> None:
    """Write the tokens as a rank file.

    Raises:
        InvalidInputError: tiktoken would give other ids (the message has the token), or leave text out: it drops what
            the pattern does not match.
        OSError: the file cannot be written.
    """
    _check_text(content)
    settings, special = content.settings, dict(content.special_tokens)  # ty: ignore[no-matching-overload]
    merged = {left + right for left, right in used.merges}
    ranks: dict[bytes, int] = {}
    for token_id, token in sorted(content.vocab.items()):
        if token_id in special.values() and len(token) > 1 and token not in merged:
            continue
        if token in ranks:
            raise InvalidInputError(
                f"the ids {ranks[token]} and {token_id} are both {token!r}, but a token can have only one rank"
            )
        ranks[token] = token_id
    check_all_bytes(ranks, "the vocabulary")
    theirs = used_merges(rules_of_ranks(ranks, content.vocab), {rank: token for token, rank in ranks.items()})
    if not settings.one_merge_at_a_time:
        used.check_order()
    if theirs.unmade and not settings.ignore_merges:
        raise InvalidInputError(
            f"the token {theirs.unmade[0]!r} of rank {ranks[theirs.unmade[0]]} does not result from two tokens: "
            "tiktoken would use it for a pre-token with these bytes, and this tokenizer would not"
        )
    for number, (ours, other) in enumerate(zip_longest(used.merges, theirs.merges)):
        if ours != other:
            raise InvalidInputError(
                f"merge {number} is {ours!r}, but would be {other!r} for tiktoken: its ranks are the ids, so the ids "
                "must be in the order of the merges, with one merge a token"
            )
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    output = Output(path, "a rank file", lambda path: bool(_parse(str(path), read_file(path))))
    with write_output(output, overwrite=overwrite) as file:
        file.write(b"".join(lines))


def _check_text(content: TokenizerContent) -> None:
    """Check that tiktoken would split every text like this tokenizer, and leave nothing out."""
    pattern, settings = resolve_pattern(content.pattern), content.settings
    if settings.normalizer is not None:
        raise InvalidInputError(
            f"the tokenizer brings text to {settings.normalizer} first, which a rank file cannot say; save it as "
            "tokenizer.json"
        )
    for token in settings.flags:
        for flag in ("lstrip", "rstrip"):
            if settings.flag(token, flag):
                raise InvalidInputError(f"the special token {token!r} has {flag}, which tiktoken does not know")
    if len(pattern.splits) > 1:
        raise InvalidInputError(
            f"the tokenizer's pattern has {len(pattern.splits)} regular expressions, {pattern.splits!r}, but tiktoken "
            "takes only one"
        )
    if not pattern.covers_all_text:
        raise InvalidInputError(
            f"the tokenizer's pattern {pattern.splits[0]!r} may leave out characters, which tiktoken would drop "
            "and this tokenizer encodes; only patterns that certainly match every character can be saved: the known "
            r"ones, and simple ones, for example with \s|\S as the last alternatives"
        )
