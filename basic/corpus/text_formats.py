"""The formats of files with text: how their names end, and how their content begins.

Text is plain, or JSON lines, and either of them can be compressed. The end of the name decides how a file is read. A
file whose name or first bytes say that it holds something else is refused, with what to do; otherwise its bytes would
become tokens.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from basic.common.errors import InvalidInputError

HEAD_BYTES = 1 << 12
"""The number of bytes at the beginning of a file by which its format is recognised."""


@dataclass(frozen=True)
class Compression:
    """A way of compressing that is read.

    Attributes:
        open: opens a compressed binary file for reading.
        errors: the types of its errors for damaged data.
        messages: of those of its errors that are plain OSErrors.
    """

    open: Callable[[Any], Any]
    errors: Callable[[], tuple[type[Exception], ...]]
    messages: tuple[str, ...] = ()


def _zstd() -> Any:
    """The module for .zst files, imported only if needed; before Python 3.14 it is a package of its own."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


COMPRESSIONS = {
    ".gz": Compression(gzip.open, lambda: (gzip.BadGzipFile, zlib.error)),
    ".zst": Compression(lambda file: _zstd().open(file), lambda: (_zstd().ZstdError,)),
    ".xz": Compression(lzma.open, lambda: (lzma.LZMAError,)),
    ".bz2": Compression(bz2.open, lambda: (OSError,), ("Invalid data stream",)),
}
"""By the end of the name."""


@dataclass(frozen=True)
class Format:
    """What a file can hold other than plain text.

    Attributes:
        name: for messages.
        suffixes: the ends of the names of such files, in small letters.
        head: matches the beginning of their content; None if it cannot be told from text.
        remedy: what to do with such a file where plain text is expected.
    """

    name: str
    suffixes: tuple[str, ...]
    head: re.Pattern[bytes] | None
    remedy: str


_RENAME = "end its name in {suffix}"
_TABLE = (
    "write its column of texts as JSON lines (with pandas: table[['text']].to_json('texts.jsonl', orient='records', "
    "lines=True)), or name a text file .txt"
)
_UNPACK = "unpack it, and give the files in it"
_SAVE = "save its text as UTF-8 in a .txt file"

JSON_LINES = Format(
    "JSON",
    (".jsonl", ".ndjson", ".json"),
    re.compile(rb'\s*\[?\s*\{\s*"(?:[^"\\]|\\.)*"\s*:'),
    "end its name in .jsonl if each line is an object with a text, or in .txt to read it as plain text",
)

_FORMATS = (
    JSON_LINES,
    Format("compressed by gzip", (), re.compile(rb"\x1f\x8b"), _RENAME.format(suffix=".gz")),
    Format("compressed by Zstandard", (), re.compile(rb"\x28\xb5\x2f\xfd"), _RENAME.format(suffix=".zst")),
    Format("compressed by xz", (), re.compile(rb"\xfd7zXZ\x00"), _RENAME.format(suffix=".xz")),
    Format("compressed by bzip2", (), re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"), _RENAME.format(suffix=".bz2")),
    Format("compressed by LZ4", (".lz4",), re.compile(rb"\x04\x22\x4d\x18"), "decompress it first"),
    Format("a Parquet table", (".parquet",), re.compile(rb"PAR1"), _TABLE),
    Format("an Arrow table", (".arrow", ".feather"), re.compile(rb"ARROW1|FEA1"), _TABLE),
    Format("a table in text form", (".csv", ".tsv"), None, _TABLE),
    Format("a tar archive", (".tar", ".tgz"), re.compile(rb"(?s).{257}ustar"), _UNPACK),
    Format("a zip archive", (".zip", ".docx", ".epub", ".xlsx"), re.compile(rb"PK\x03\x04"), _UNPACK),
    Format("a 7z archive", (".7z",), re.compile(rb"7z\xbc\xaf\x27\x1c"), _UNPACK),
    Format("a PDF document", (".pdf",), re.compile(rb"%PDF-"), _SAVE),
    Format("an array of numpy", (".npy",), re.compile(rb"\x93NUMPY"), "give the text that its numbers are made from"),
    Format("text in UTF-16", (), re.compile(rb"\xff\xfe|\xfe\xff"), "convert it to UTF-8"),
)


def check_name(path: str | os.PathLike, suffix: str) -> None:
    """Check that the name of a file does not say that it holds something other than text.

    Args:
        suffix: the end of the name without that of a compression, in small letters.

    Raises:
        InvalidInputError: it does.
    """
    for kind in _FORMATS:
        if kind is not JSON_LINES and suffix in kind.suffixes:
            raise InvalidInputError(f"{os.fspath(path)!r} is {kind.name}, as its name says, not text: {kind.remedy}")


def check_head(path: str | os.PathLike, head: bytes, suffix: str) -> None:
    """Check that the content of a file, after decompression, begins like what its name says.

    Args:
        head: the first `HEAD_BYTES`, or more.
        suffix: as for `check_name`. A name that ends in .txt says that JSON is plain text, too.

    Raises:
        InvalidInputError: it does not.
    """
    head = head[:HEAD_BYTES].removeprefix(codecs.BOM_UTF8)
    for kind in _FORMATS:
        if kind is JSON_LINES and suffix in (*kind.suffixes, ".txt"):
            continue
        if kind.head is not None and kind.head.match(head):
            raise InvalidInputError(f"{os.fspath(path)!r} is {kind.name}, as its first bytes show: {kind.remedy}")
    if len(head) >= 64 and head.count(0) > len(head) // 4:
        raise InvalidInputError(
            f"{os.fspath(path)!r} is not text in UTF-8: many of its first bytes are zero, as in UTF-16 or in numbers; "
            "convert it to UTF-8"
        )
