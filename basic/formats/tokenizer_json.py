"""Tokenizers as `tokenizer.json`, the file of the `tokenizers` package; see `basic.tokenizer_files.tokenizer_json`."""

from __future__ import annotations

import os

from basic.common.errors import InvalidInputError
from basic.Tokenizer import Tokenizer
from basic.tokenizer_files.tokenizer_json import read_tokenizer_json, write_tokenizer_json


def save_tokenizer_json(tokenizer: Tokenizer, path: str | os.PathLike) -> None:
    """Write a tokenizer as `tokenizer.json`, which `tokenizers.Tokenizer.from_file` reads.

    The `tokenizers` package then gives the same ids, also for special tokens. (Its decoder takes a special token of
    Latin-1 letters, such as "<é>", for the printable form of bytes; this does not change ids.)

    Raises:
        InvalidInputError: the file format cannot express the tokenizer; the message has the token, merge or pattern.
        OSError: the file cannot be written.
    """
    write_tokenizer_json(tokenizer.content(), tokenizer.used_merges, path)


def load_tokenizer_json(path: str | os.PathLike) -> Tokenizer:
    """Read a `tokenizer.json` with byte-level BPE, as `Tokenizer.load` does.

    Raises:
        DamagedFileError: the file is not JSON, or a field is missing or has the wrong type.
        InvalidInputError: `Tokenizer` does not support a value; the message has the field.
        OSError: the file cannot be read.
    """
    content = read_tokenizer_json(path)
    try:
        return Tokenizer.from_content(content)
    except InvalidInputError as error:
        raise InvalidInputError(f"{os.fspath(path)!r}: {error}") from error
