"""Tokenizers in the files of other programs, whose formats are in `basic.tokenizer_files`.

All of them are opened by `Tokenizer.load`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from basic.pretokenization import Pattern
from basic.Tokenizer import Tokenizer
from basic.tokenizer_files.rank_file import read_rank_file, write_rank_file
from basic.tokenizer_files.tokenizer_json import write_tokenizer_json


def save_tokenizer_json(tokenizer: Tokenizer, path: str | os.PathLike) -> None:
    """Write a tokenizer as `tokenizer.json`, which `tokenizers.Tokenizer.from_file` reads.

    The `tokenizers` package then gives the same ids, also for special tokens. (Its decoder takes a special token of
    Latin-1 letters, such as "<é>", for the printable form of bytes; this does not change ids.)

    Raises:
        InvalidInputError: the file format cannot express the tokenizer; the message has the token, merge or pattern.
    """
    write_tokenizer_json(tokenizer.content(), tokenizer.used_merges, path)


def save_tiktoken(tokenizer: Tokenizer, path: str | os.PathLike, *, overwrite: bool = True) -> None:
    """Write the tokens as a rank file, which `tiktoken.load.load_tiktoken_bpe` reads.

    The file has no pattern and no special tokens (except those that merges produce too). Both are arguments of
    `tiktoken.Encoding`. Nor has it a template for the beginning and the end of a text.

    Args:
        overwrite: replace a rank file that exists; other files are never replaced.

    Raises:
        FileExistsError: the file exists, and `overwrite` is False.
        InvalidInputError: tiktoken would give other ids (the message has the token), or leave text out: it drops what
            the pattern does not match.

    Examples:
        >>> save_tiktoken(tokenizer, "ours.tiktoken")
        >>> tiktoken.Encoding(
        ...     "ours",
        ...     pat_str=tokenizer.compiled_pattern.splits[0],
        ...     mergeable_ranks=tiktoken.load.load_tiktoken_bpe("ours.tiktoken"),
        ...     special_tokens=tokenizer.special_token_ids,
        ... )
        <Encoding 'ours'>
    """
    write_rank_file(tokenizer.content(), tokenizer.used_merges, path, overwrite=overwrite)


def load_tiktoken(
    path: str | os.PathLike, *, pattern: str | Pattern, special_tokens: Mapping[str, int] | Iterable[str] = ()
) -> Tokenizer:
    """Read a rank file of tiktoken with special tokens of one's own; `Tokenizer.load` adds the published ones.

    Args:
        pattern: a name ("gpt2", "cl100k", "o200k"), a regular expression or a `Pattern`; the file does not have it.
        special_tokens: with their ids; or without ids, to number them from the largest rank on.

    Raises:
        DamagedFileError: a line is not a token with its rank (the message has the line), or two lines have the same
            token or rank.
        InvalidInputError: a byte has no token, or the pattern or a special token is invalid.
    """
    return Tokenizer.from_content(read_rank_file(path, pattern=pattern, special_tokens=special_tokens))
