"""Text sources: plain text, JSON lines, and both of them compressed.

The name of a file says what it holds (`basic.corpus.text_formats`); what is plainly no text is refused. Plain text can
be read from any offset, and is memory-mapped if it is local. Any other source is a stream of text, read from front to
back. Memory holds one block of the stream, or the longest line of JSON lines. A byte order mark is no part of a text.

Inputs are files, globs, and URLs (s3://, https://, ...), which need the package `fsspec`.
"""

from __future__ import annotations

import codecs
import glob
import io
import json
import mmap
import os
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np

from basic.bytes_utils import decode_blocks, utf8_error
from basic.common.errors import DamagedFileError, InvalidInputError, how_to_install
from basic.corpus.text_formats import COMPRESSIONS, HEAD_BYTES, JSON_LINES, check_head, check_name
from basic.pretokenization import SpecialTokens, replace_surrogates

T = TypeVar("T")

BLOCK_BYTES = 1 << 16
REMOTE_BLOCK_BYTES = 1 << 23  # a round trip costs as much time as a megabyte or more
MAX_LINE_BYTES = 1 << 28  # of JSON lines; a line needs several times its size in memory


@dataclass(frozen=True)
class TextSource:
    """A file of text, with how to read JSON lines. It can stand for its path wherever a corpus is read."""

    path: str | os.PathLike
    """Text in UTF-8: a local file or a URL. A name that ends in .gz, .zst, .xz or .bz2 means that the file is
    compressed. A name that ends in .jsonl, .ndjson or .json (before the ending of a compressed file) means that each
    line is a JSON object with one document. Any other name means plain text."""
    field: str = "text"
    """The key of the document in a JSON object."""
    end_of_text: str = "<|endoftext|>"
    """The special token between the documents of JSON lines."""
    begins_with_separator: bool = False
    """Whether that token also comes before the first document of JSON lines."""
    block_bytes: int | None = None
    """The number of bytes to read at a time; by default `BLOCK_BYTES`, or `REMOTE_BLOCK_BYTES` for a URL."""

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    @property
    def compression(self) -> str | None:
        """A key of `COMPRESSIONS`, or None."""
        suffix = Path(self._name).suffix
        return suffix if suffix in COMPRESSIONS else None

    @property
    def content_suffix(self) -> str:
        """The end of the name that says what the file holds when it is decompressed, in small letters: ".jsonl"."""
        return Path(self._name.removesuffix(self.compression or "")).suffix

    @property
    def is_json_lines(self) -> bool:
        return self.content_suffix in JSON_LINES.suffixes

    @property
    def _name(self) -> str:
        """The name in small letters; of a web address without its query."""
        name = os.fspath(self).lower()
        return urlsplit(name).path if name.startswith(("http://", "https://")) else name

    @property
    def is_plain(self) -> bool:
        """Whether the bytes of the file are the bytes of the text."""
        return not self.is_json_lines and self.compression is None

    @property
    def is_remote(self) -> bool:
        return "://" in os.fspath(self)

    def size_and_version(self) -> tuple[int | None, str]:
        """Return the size in bytes (None if a server does not report it), and a string that changes with the content.

        Raises:
            OSError: the source is not a readable file.
        """
        if not self.is_remote:
            size = file_size_bytes(self)  # raises for a missing file, a folder or a pipe
            return size, str(os.stat(self).st_mtime_ns)
        system, path = _file_system(os.fspath(self))
        info = _request(self, lambda: {"key": system.ukey(path), **system.info(path)})
        # For a web server the key is only the URL, so the headers are needed too.
        return info["size"], repr([info.get(name) for name in ("key", "size", "ETag", "Last-Modified")])

    def supports_ranges(self) -> bool:
        """Whether a range of bytes can be read; simple web servers only send complete files."""
        if not self.is_remote:
            return True
        system, path = _file_system(os.fspath(self))
        if not _is_http(system):
            return True
        try:
            with _request(self, lambda: system.open(path, "rb", block_size=1 << 16, cache_type="none")) as file:
                _request(self, lambda: (file.seek(1), file.read(1)))
        except ValueError:  # raised by fsspec for such servers, and for those that do not report the size
            return False
        return True

    def open(self) -> io.BufferedIOBase:
        """Open the file for reading from its beginning."""
        if not self.is_remote:
            file_size_bytes(self)
            return open(self.path, "rb")
        system, path = _file_system(os.fspath(self))
        options = {"block_size": 0} if _is_http(system) else {}  # 0: one stream, which all web servers support
        return io.BufferedReader(_RemoteFile(self, _request(self, lambda: system.open(path, "rb", **options))), 1 << 20)

    def read(self, start: int, length: int) -> bytes:
        """Read at most `length` bytes from an offset; fewer at the end of the file."""
        if self.is_remote:
            system, path = _file_system(os.fspath(self))
            return _request(self, lambda: system.cat_file(path, start=start, end=start + length))
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(length)

    def blocks(self, start: int, stop: int) -> Iterator[bytes]:
        """Read the bytes between two offsets, block by block."""
        if not self.is_remote:
            yield from read_blocks(self, start, stop, block_bytes=self.block_bytes or BLOCK_BYTES)
            return
        block_bytes = self.block_bytes or REMOTE_BLOCK_BYTES
        for offset in range(start, stop, block_bytes):
            yield self.read(offset, min(block_bytes, stop - offset))


Inputs = str | os.PathLike | Sequence[str | os.PathLike]


def expand_inputs(inputs: Inputs) -> list[TextSource]:
    """Return the sources of one or more inputs, in their order; the matches of a glob are sorted by name.

    A source of JSON lines after another source begins with the separator of its documents.

    Raises:
        InvalidInputError: no input is given, or the name of one says that it holds no text.
        FileNotFoundError: no file matches a glob.
    """
    sources = []
    for path in [inputs] if isinstance(inputs, str | os.PathLike) else inputs:
        source = as_source(path)
        name = os.fspath(source)
        wildcards = "*[" if source.is_remote else "*?["  # a ? in a URL begins its query
        if not any(wildcard in name for wildcard in wildcards) or os.path.exists(name):
            sources.append(source)
            continue
        if source.is_remote:
            matches = _glob_url(source)
        else:
            matches = [match for match in glob.glob(name, recursive=True) if os.path.isfile(match)]
        if not matches:
            raise FileNotFoundError(f"no file matches {name!r}: check the glob, and the folder where it starts")
        sources += [replace(source, path=match) for match in sorted(matches)]
    if not sources:
        raise InvalidInputError("there is no input; give at least one file, glob or URL")
    for source in sources:
        check_name(source, source.content_suffix)
    return sources[:1] + [replace(source, begins_with_separator=source.is_json_lines) for source in sources[1:]]


def as_source(path: str | os.PathLike) -> TextSource:
    """Return a path as a source; a source is returned as it is."""
    return path if isinstance(path, TextSource) else TextSource(path)


def check_separator(source: TextSource, special_tokens: Collection[str]) -> None:
    """Check that the separator of JSON lines is one of the special tokens.

    Raises:
        InvalidInputError: it is not.
    """
    if source.is_json_lines and source.end_of_text not in special_tokens:
        raise InvalidInputError(
            f"the documents of {os.fspath(source)!r} are to be joined by {source.end_of_text!r}, which is none of the "
            f"special tokens {list(special_tokens)}; choose one of these as end_of_text"
        )


def read_text_with_marks(path: str | os.PathLike, *, errors: str = "strict") -> Iterator[str]:
    """Stream the text of a source, in strings that may end anywhere; newlines are not translated.

    JSON lines: each string is a document; before it comes the mark of its separator (`SpecialTokens.document_mark`),
    except before the first document of the source.

    Args:
        path: a path, a URL or a `TextSource`.
        errors: for bytes that are not UTF-8: "strict" raises, "replace" reads U+FFFD.

    Raises:
        InvalidInputError: the file holds no text, the text is not UTF-8 (the message names the byte offset), or a line
            is too long or not a JSON object with a string under the key (the message names the line). Offsets are
            those of the decompressed content.
        DamagedFileError: the compressed file is incomplete or damaged.
        OSError: the file cannot be read.
    """
    source = as_source(path)
    check_name(source, source.content_suffix)
    with source.open() as stored, _decompress(stored, source) as file:
        if source.is_json_lines:
            yield from _read_documents(_read_lines(file, source), source, errors)
            return
        first = _read_checked(file.read, max(source.block_bytes or BLOCK_BYTES, HEAD_BYTES), source, 0)
        check_head(source, first, source.content_suffix)
        start = len(codecs.BOM_UTF8) if first.startswith(codecs.BOM_UTF8) else 0
        blocks = chain([first[start:]], _read_file_blocks(file, source, len(first)))
        yield from decode_blocks(blocks, source, start, errors=errors)


def read_text(path: str | os.PathLike, *, errors: str = "strict") -> Iterator[str]:
    """The same with the separators themselves instead of their marks."""
    source = as_source(path)
    mark = SpecialTokens.document_mark(source.end_of_text).tokens[0]
    for text in read_text_with_marks(source, errors=errors):
        yield text.replace(mark, source.end_of_text)


@contextmanager
def as_plain_file(path: str | os.PathLike, folder: str | os.PathLike) -> Generator[Path]:
    """Yield the path of a local file with the plain text of a source: its own, or a temporary one in this folder.

    Raises:
        InvalidInputError: a document of JSON lines has the separator in its text, or see `read_text_with_marks`.
    """
    source = as_source(path)
    if source.is_plain and not source.is_remote:
        check_name(source, source.content_suffix)
        file_size_bytes(source)  # raises for a file that cannot be read
        size_of_bom(source)
        yield Path(source)
        return
    with TemporaryDirectory(dir=folder, prefix=".", suffix=".tmp") as temporary:
        plain = Path(temporary) / "text.txt"
        with open(plain, "xb") as file:
            file.writelines(_separated_in_text(source))
        yield plain


def _separated_in_text(source: TextSource) -> Iterator[bytes]:
    """The bytes of a text, where a separator can only be a separator."""
    mark = SpecialTokens.document_mark(source.end_of_text).tokens[0]
    for text in read_text_with_marks(source):
        if source.is_json_lines and source.end_of_text in text:
            raise InvalidInputError(
                f"a document of {os.fspath(source)!r} contains {source.end_of_text!r}, which also separates the "
                f"documents in plain text: {text.removeprefix(mark)!r:.60}; choose another separator, or use the "
                "file as it is, since in JSON lines the two are not mixed up"
            )
        yield text.replace(mark, source.end_of_text).encode()


def size_of_bom(source: TextSource) -> int:
    """Return the size of the byte order mark of a plain file, 0 or 3 bytes.

    Raises:
        InvalidInputError: the file holds no text, as its first bytes show.
    """
    head = source.read(0, HEAD_BYTES)
    check_head(source, head, source.content_suffix)
    return len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0


# --- Local files


def file_size_bytes(path: str | os.PathLike) -> int:
    """Return the size of a regular file.

    Raises:
        FileNotFoundError: `path` does not exist.
        IsADirectoryError: `path` is a folder.
        OSError: `path` is something else, such as a pipe, which can be read only once.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}: check the path of the text file")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{os.fspath(path)!r} is a folder: give the path of one text file")
    if not os.path.isfile(path):
        raise OSError(f"{os.fspath(path)!r} is no regular file (a pipe?): save its text to a file first")
    return os.path.getsize(path)


def read_blocks(
    path: str | os.PathLike, start: int = 0, stop: int | None = None, *, block_bytes: int = BLOCK_BYTES
) -> Iterator[bytes]:
    """Read the bytes from `start` to `stop` (default: the end) of a file, in blocks of at most `block_bytes`."""
    with open(path, "rb") as file:
        offset = file.seek(start)
        while block := file.read(block_bytes if stop is None else min(block_bytes, stop - offset)):
            offset += len(block)
            yield block


def map_bytes(path: str | os.PathLike) -> np.ndarray:
    """Map a file into memory as a read-only uint8 array."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # an empty file cannot be mapped
            return np.frombuffer(b"", np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def release_pages(data: np.ndarray, start: int, stop: int) -> None:
    """Let the system forget data[start:stop] of `map_bytes`; when it is used again, it is read again."""
    memory = data.base.obj if isinstance(data.base, memoryview) else data.base
    start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    if isinstance(memory, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") and start < stop:
        memory.madvise(mmap.MADV_DONTNEED, start, stop - start)


# --- Remote files


def _file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system that opens a URL, and the path of the URL in it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        install = how_to_install("dist", "fsspec aiohttp")
        raise InvalidInputError(f"{url!r} is a URL, which needs fsspec, which is not installed; {install}") from None
    options = {}
    try:
        if url.startswith(("http://", "https://")):
            from aiohttp import ClientTimeout

            # The default limits a whole download to five minutes. Limit the time without data to one minute instead.
            options["client_kwargs"] = {"timeout": ClientTimeout(total=None, sock_connect=60, sock_read=60)}
        return url_to_fs(url, **options)
    except (ImportError, ValueError) as error:  # the protocol is unknown, or needs another package
        raise InvalidInputError(f"{url!r} is a URL that cannot be opened here: {error}") from None


def _request(source: TextSource, request: Callable[[], T]) -> T:
    """Call a function of fsspec; its errors get the name of the file."""
    try:
        return request()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {os.fspath(source)!r}: check the URL") from None
    except ImportError as error:  # a package that the protocol needs besides fsspec
        raise InvalidInputError(f"{os.fspath(source)!r} cannot be opened here: {error}") from None
    except ValueError:
        raise
    except Exception as error:  # the libraries' own errors for a lost connection
        raise OSError(f"{os.fspath(source)!r} cannot be read: {type(error).__name__}: {error}") from error


def _glob_url(source: TextSource) -> list[str]:
    system, path = _file_system(os.fspath(source))
    return _request(source, lambda: [system.unstrip_protocol(match) for match in system.glob(path)])


def _is_http(system: Any) -> bool:
    return "http" in system.protocol


class _RemoteFile(io.RawIOBase):
    """A file of fsspec as one of Python's, read from front to back: fsspec's `readline` has no limit of length."""

    def __init__(self, source: TextSource, file: Any):
        self._source, self._file, self._ended = source, file, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b"" if self._ended else _request(self._source, lambda: self._file.read(len(buffer)))
        self._ended = not data  # fsspec warns of reads after the end of a stream
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


# --- Compressed files and JSON lines


def _decompress(file: io.BufferedIOBase, source: TextSource) -> Any:
    if source.compression is None:
        return file
    if not file.peek(1):  # ty: ignore[missing-attribute]
        raise _incomplete(source, 0)  # for most decompressors this is an empty text
    return COMPRESSIONS[source.compression].open(file)


def _read_file_blocks(file: io.BufferedIOBase, source: TextSource, offset: int) -> Iterator[bytes]:
    """The blocks of an open file, from an offset on."""
    while block := _read_checked(file.read, source.block_bytes or BLOCK_BYTES, source, offset):
        offset += len(block)
        yield block


def _read_lines(file: io.BufferedIOBase, source: TextSource) -> Iterator[tuple[int, int, bytes]]:
    """The lines of an open file, each with its number and its byte offset; without a byte order mark."""
    offset = number = 0
    while line := _read_checked(file.readline, MAX_LINE_BYTES + 1, source, offset):
        size, number = len(line), number + 1
        if size > MAX_LINE_BYTES:
            raise InvalidInputError(
                f"{os.fspath(source)!r}, line {number} (from byte offset {offset} on) is longer than "
                f"{MAX_LINE_BYTES} bytes, the limit for one document; divide the document into several"
            )
        start = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
        if number == 1:
            check_head(source, line, source.content_suffix)
        yield number, offset + start, line[start:] if start else line
        offset += size


def _read_checked(read: Callable[[int], bytes], size: int, source: TextSource, offset: int) -> bytes:
    """Read from a file; the errors of the decompressors name the file and the offset."""
    if source.compression is None:
        return read(size)
    compression = COMPRESSIONS[source.compression]
    try:
        return read(size)
    except EOFError:
        raise _incomplete(source, offset) from None
    except compression.errors() as error:
        if type(error) is OSError and str(error) not in compression.messages:
            raise  # of the disk or the network
        raise DamagedFileError(
            f"{os.fspath(source)!r} is damaged, or not compressed as its name says, soon after byte offset {offset} of "
            f"its decompressed content ({error})"
        ) from None


def _incomplete(source: TextSource, offset: int) -> DamagedFileError:
    return DamagedFileError(
        f"{os.fspath(source)!r} is incomplete: it ends soon after byte offset {offset} of its decompressed content; "
        "copy it again"
    )


def _read_documents(lines: Iterator[tuple[int, int, bytes]], source: TextSource, errors: str) -> Iterator[str]:
    """The documents of JSON lines, each after the first with the mark of the separator before it."""
    mark = SpecialTokens.document_mark(source.end_of_text).tokens[0]
    needs_separator = source.begins_with_separator
    for number, offset, line in lines:
        if not line.strip():
            continue
        document = _parse_document(line, source, f"{os.fspath(source)}, line {number}", offset, errors)
        yield mark + document if needs_separator else document
        needs_separator = True


def _parse_document(line: bytes, source: TextSource, name: str, offset: int, errors: str) -> str:
    position, remedy = f"{name!r} (from byte offset {offset} on)", ""
    if source.content_suffix == ".json":
        remedy = "; a .json file must have one object a line (`jq -c` writes such lines); plain text is named .txt"
    try:
        record = json.loads(line.decode(errors=errors))
    except UnicodeDecodeError as error:
        raise utf8_error(name, offset + error.start, line[error.start], error.reason) from None
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{position} is not JSON: {error}{remedy}") from None
    if not isinstance(record, dict):
        raise InvalidInputError(f"{position} is no JSON object, but {record!r:.40}{remedy}")
    text = record.get(source.field)
    if not isinstance(text, str):
        has = f"has {text!r:.40} as {source.field!r}" if source.field in record else f"has no field {source.field!r}"
        strings = [key for key, value in record.items() if isinstance(value, str)]
        raise InvalidInputError(f"{position} {has}; the field must be one of its strings, {strings}")
    return replace_surrogates(text)  # "\ud800" is valid JSON, but not a character
