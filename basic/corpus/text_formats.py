"""The formats of files with text: how their names end, and how their content begins.

Text is plain, or JSON lines, and either of them can be compressed; or it is in a Parquet table. The end of the name
decides how a file is read; if it does not say it, JSON lines are recognized by their beginning. A file whose name or
first bytes say that it holds something else is refused, with what to do; otherwise its bytes would become tokens.
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
from typing import Any, Literal

from basic.common.arguments import check_type
from basic.common.errors import InvalidInputError

HEAD_BYTES = 1 << 12
"""The number of bytes at the beginning of a file by which its format is recognized."""


@dataclass(frozen=True, kw_only=True)
class DocumentOptions:
    """How the documents of JSON lines and of Parquet tables are read.

    Raises:
        TypeError: an option has another type.
        InvalidInputError: an option has another value.
    """

    field: str = "text"
    """JSON lines and Parquet: the key or the column of the text. A dot leads into an object or a struct (data.text),
    unless there is a key with this dot."""
    end_of_text: str = "<|endoftext|>"
    """The special token between documents."""
    on_bad_line: Literal["error", "skip"] = "error"
    """What to do with a line that is not a JSON object with a text, and with a row without a text: end with an error,
    or skip them and print how many there were."""
    specials_in_documents: bool = False
    """Special tokens that stand in the text of a document are special. Otherwise they are text there, so that no
    document can contain the end of a document. (In plain text they are always special.)"""

    def __post_init__(self) -> None:
        check_type("field", self.field, str, "give the key of the text")
        check_type("end_of_text", self.end_of_text, str, "give the special token between documents")
        check_type("specials_in_documents", self.specials_in_documents, bool, "give True or False")
        if self.on_bad_line not in ("error", "skip"):
            raise InvalidInputError(f"on_bad_line={self.on_bad_line!r} must be 'error' or 'skip'")


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

PARQUET = Format("a Parquet table", (".parquet",), re.compile(rb"PAR1"), _RENAME.format(suffix=".parquet"))

_JSON_LINE = re.compile(rb'\s*\{[ \t]*"(?:[^"\\\n]|\\.)*"[ \t]*:')

_FORMATS = (
    JSON_LINES,
    PARQUET,
    Format("compressed by gzip", (), re.compile(rb"\x1f\x8b"), _RENAME.format(suffix=".gz")),
    Format("compressed by Zstandard", (), re.compile(rb"\x28\xb5\x2f\xfd"), _RENAME.format(suffix=".zst")),
    Format("compressed by xz", (), re.compile(rb"\xfd7zXZ\x00"), _RENAME.format(suffix=".xz")),
    Format("compressed by bzip2", (), re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"), _RENAME.format(suffix=".bz2")),
    Format("compressed by LZ4", (".lz4",), re.compile(rb"\x04\x22\x4d\x18"), "decompress it first"),
    Format("an Arrow table", (".arrow", ".feather"), re.compile(rb"ARROW1|FEA1"), _TABLE),
    Format("a table in text form", (".csv", ".tsv"), None, _TABLE),
    Format("a tar archive", (".tar", ".tgz"), re.compile(rb"(?s).{257}ustar"), _UNPACK),
    Format("a zip archive", (".zip", ".docx", ".epub", ".xlsx"), re.compile(rb"PK\x03\x04"), _UNPACK),
    Format("a 7z archive", (".7z",), re.compile(rb"7z\xbc\xaf\x27\x1c"), _UNPACK),
    Format("a PDF document", (".pdf",), re.compile(rb"%PDF-"), _SAVE),
    Format("an array of numpy", (".npy",), re.compile(rb"\x93NUMPY"), "give the text that its numbers are made from"),
    Format("text in UTF-16", (), re.compile(rb"\xff\xfe|\xfe\xff"), "convert it to UTF-8"),
)


def begins_with_json_line(head: bytes) -> bool:
    """Whether the first line of a content begins like a JSON object."""
    return _JSON_LINE.match(head.removeprefix(codecs.BOM_UTF8)) is not None


def check_name(path: str | os.PathLike, suffix: str) -> None:
    """Check that the name of a file does not say that it holds something other than text.

    Args:
        suffix: the end of the name without that of a compression, in small letters.

    Raises:
        InvalidInputError: it does.
    """
    for kind in _FORMATS:
        if kind not in (JSON_LINES, PARQUET) and suffix in kind.suffixes:
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
