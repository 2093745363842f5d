"""Corpora as they come: plain text, and text out of .gz, .zst and .jsonl files, also .jsonl.gz and .jsonl.zst.

Plain text can be read from anywhere on, and is mapped into memory by those who read it. All else is a stream of text
here, read front to back: in memory there are a block of it or, of JSON lines, the longest line.

Inputs are files, globs, and URLs (s3://, https://, ...), which `fsspec` opens where it is installed.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import mmap
import os
import sys
import zlib
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from basic.bytes_utils import decode_blocks, utf8_error

T = TypeVar("T")

_COMPRESSIONS = (".gz", ".zst")
_REMOTE_BLOCK_BYTES = 1 << 23  # asked of a remote file at a time: a round trip costs as much as a megabyte or more


@dataclass(frozen=True)
class TextSource:
    """A file of text, and how to read it if it holds JSON lines. Stands for its path wherever a corpus is read."""

    path: str | os.PathLike
    """Text in UTF-8, a local file or a URL. A name that ends in .gz or .zst says that it is compressed, .jsonl (before
    that) that each line is a JSON object, which holds a document."""
    field: str = "text"
    """The name under which a JSON object has its text."""
    end_of_text: str = "<|endoftext|>"
    """The special token to put between the documents of JSON lines."""
    follows_text: bool = False
    """Whether the first document of JSON lines, too, needs that token before it."""

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    @property
    def compression(self) -> str | None:
        """ ".gz", ".zst" or None."""
        suffix = Path(self.path).suffix.lower()
        return suffix if suffix in _COMPRESSIONS else None

    @property
    def is_json_lines(self) -> bool:
        return os.fspath(self).lower().removesuffix(self.compression or "").endswith(".jsonl")

    @property
    def is_plain(self) -> bool:
        """Whether the bytes of the file are those of the text."""
        return not self.is_json_lines and self.compression is None

    @property
    def is_remote(self) -> bool:
        return "://" in os.fspath(self)

    def state(self) -> tuple[int | None, str]:
        """The size in bytes, None where the server does not tell, and a mark that changes with the content."""
        if not self.is_remote:
            size = file_size_bytes(self)  # says what is wrong with other things than files
            return size, str(os.stat(self).st_mtime_ns)
        system, path = _file_system(os.fspath(self))
        told = _remote(self, lambda: {"key": system.ukey(path), **system.info(path)})
        # Of a file on a web server the key is its address, so that other marks must do.
        return told["size"], repr([told.get(name) for name in ("key", "size", "ETag", "Last-Modified")])

    def gives_parts(self) -> bool:
        """Whether a part of the file can be asked for: simple web servers answer with all of it, always."""
        if not self.is_remote:
            return True
        system, path = _file_system(os.fspath(self))
        if not _is_web(system):
            return True
        try:
            with _remote(self, lambda: system.open(path, "rb", block_size=1 << 16, cache_type="none")) as file:
                _remote(self, lambda: (file.seek(1), file.read(1)))
        except ValueError:  # what fsspec says of such servers, and of those that do not tell the size
            return False
        return True

    def open(self) -> io.BufferedIOBase:
        """The bytes of the file, from the first on."""
        if not self.is_remote:
            file_size_bytes(self)
            return open(self.path, "rb")
        system, path = _file_system(os.fspath(self))
        # From a web server as one stream, which all of them give.
        options = {"block_size": 0} if _is_web(system) else {}
        return io.BufferedReader(_Remote(self, _remote(self, lambda: system.open(path, "rb", **options))), 1 << 20)

    def read(self, start: int, length: int) -> bytes:
        """As many bytes as there are of this length from an offset on."""
        if self.is_remote:
            system, path = _file_system(os.fspath(self))
            return _remote(self, lambda: system.cat_file(path, start=start, end=start + length))
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(length)

    def blocks(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes between two offsets."""
        if not self.is_remote:
            yield from read_blocks(self, start, stop)
            return
        for position in range(start, stop, _REMOTE_BLOCK_BYTES):
            yield self.read(position, min(_REMOTE_BLOCK_BYTES, stop - position))


Inputs = str | os.PathLike | Sequence[str | os.PathLike]


def sources_of(inputs: Inputs) -> list[TextSource]:
    """The sources that one input or several stand for, in their order; what a glob finds, sorted by name.

    JSON lines that come after something else are to begin with what separates their documents.

    Raises:
        FileNotFoundError: there is no such file, or nothing fits a glob.
    """
    sources = []
    for given in [inputs] if isinstance(inputs, str | os.PathLike) else inputs:
        source = text_source(given)
        name = os.fspath(source)
        signs = "*[" if source.is_remote else "*?["  # a ? in a URL begins a query
        if not any(sign in name for sign in signs) or os.path.exists(name):
            sources.append(source)
            continue
        if source.is_remote:
            system, path = _file_system(name)
            found = _remote(source, lambda: [system.unstrip_protocol(path) for path in system.glob(path)])  # noqa: B023
        else:
            found = [path for path in glob.glob(name, recursive=True) if os.path.isfile(path)]
        if not found:
            raise FileNotFoundError(f"no file fits {name!r}: check the glob, and the folder it starts from")
        sources += [replace(source, path=path) for path in sorted(found)]
    if not sources:
        raise ValueError("there is no input; give at least one file, glob or URL")
    return sources[:1] + [replace(source, follows_text=source.is_json_lines) for source in sources[1:]]


def text_source(path: str | os.PathLike) -> TextSource:
    """The source that a path stands for, or is."""
    return path if isinstance(path, TextSource) else TextSource(path)


def check_separator(source: TextSource, special_tokens: Collection[str]) -> None:
    """Raise ValueError if what separates the documents is not one of these."""
    if source.is_json_lines and source.end_of_text not in special_tokens:
        raise ValueError(
            f"the documents of {os.fspath(source)!r} are to be joined by {source.end_of_text!r}, which is none of the "
            f"special tokens {list(special_tokens)}; choose one of these as end_of_text"
        )


def read_text(path: str | os.PathLike, *, errors: str = "strict") -> Iterator[str]:
    """The text of a source, piece by piece; newlines are not translated.

    Args:
        errors: "strict", or "replace" for U+FFFD in the place of bytes that are not UTF-8.

    Raises:
        ValueError: the text is not UTF-8 (its byte offset is named), a line is not a JSON object with a string of that
            name (the line is named), or the compressed file is cut off or damaged. Offsets count bytes of what the
            file holds when it is decompressed.
        OSError: the file cannot be read.
    """
    source = text_source(path)
    with source.open() as stored, _decompressed(stored, source) as file:
        if source.is_json_lines:
            yield from _documents(_lines(file, source), source, errors)
        else:
            yield from decode_blocks(_blocks(file, source), source, errors=errors)


def _decompressed(file: io.BufferedIOBase, source: TextSource) -> Any:
    if source.compression is None:
        return file
    return gzip.open(file) if source.compression == ".gz" else _zstd().open(file)


def _file_system(url: str) -> tuple[Any, str]:
    """What opens a URL, and the path that it has there."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ValueError(f"{url!r} is a URL: to open it, install fsspec (the extra 'dist' has it)") from None
    options = {}
    try:
        if url.startswith(("http://", "https://")):
            from aiohttp import ClientTimeout

            # By default a file must have come after five minutes, however long it is, and whatever is done with it
            # meanwhile; here, something of it after one.
            options["client_kwargs"] = {"timeout": ClientTimeout(total=None, sock_connect=60, sock_read=60)}
        return url_to_fs(url, **options)
    except (ImportError, ValueError) as error:  # the protocol is unknown, or needs another package
        raise ValueError(f"{url!r} is a URL that cannot be opened here: {error}") from None


def _remote(source: TextSource, ask: Callable[[], T]) -> T:
    """What a server answers; its errors get the name of the file."""
    try:
        return ask()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {os.fspath(source)!r}: check the URL") from None
    except ImportError as error:  # what a protocol needs besides fsspec
        raise ValueError(f"{os.fspath(source)!r} cannot be opened here: {error}") from None
    except ValueError:
        raise
    except Exception as error:  # what its libraries say when a connection is lost
        raise OSError(f"{os.fspath(source)!r} cannot be read: {type(error).__name__}: {error}") from error


class _Remote(io.RawIOBase):
    """A file of fsspec, read from front to back, as one of Python's: fsspec's lack lines of limited length."""

    def __init__(self, source: TextSource, file: Any):
        self._source, self._file, self._ended = source, file, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b"" if self._ended else _remote(self._source, lambda: self._file.read(len(buffer)))
        self._ended = not data  # whoever reads a web server's stream again and again behind its end is warned
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _is_web(system: Any) -> bool:
    return "http" in system.protocol


@contextmanager
def as_plain_file(path: str | os.PathLike, folder: str | os.PathLike) -> Generator[Path]:
    """The path of a file with the plain text of a source: itself, or a temporary one in this folder."""
    source = text_source(path)
    if source.is_plain and not source.is_remote:
        yield Path(source)
        return
    plain = Path(folder) / f".{Path(source).name}.txt"
    try:
        with open(plain, "xb") as file:
            file.writelines(piece.encode() for piece in read_text(source))
        yield plain
    finally:
        plain.unlink(missing_ok=True)


def _zstd() -> Any:
    """Python's module for .zst files, before 3.14 a package; imported for the few texts that need it."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def _damage(source: TextSource) -> tuple[type[Exception], ...]:
    """What is raised for a compressed file that is damaged."""
    return (_zstd().ZstdError,) if source.compression == ".zst" else (gzip.BadGzipFile, zlib.error)


def _blocks(file: io.BufferedIOBase, source: TextSource) -> Iterator[bytes]:
    """What the file holds, decompressed."""
    offset = 0
    while block := _read(file.read, BLOCK_BYTES, source, offset):
        offset += len(block)
        yield block


def _lines(file: io.BufferedIOBase, source: TextSource) -> Iterator[tuple[int, bytes]]:
    """The lines of what the file holds, each with its byte offset."""
    offset = 0
    while line := _read(file.readline, -1, source, offset):
        yield offset, line
        offset += len(line)


def _read(read: Any, size: int, source: TextSource, offset: int) -> bytes:
    try:
        return read(size)
    except EOFError:
        raise ValueError(
            f"{os.fspath(source)!r} is cut off: it ends soon after byte offset {offset} of its decompressed content; "
            "copy it again"
        ) from None
    except _damage(source) as error:
        raise ValueError(
            f"{os.fspath(source)!r} is damaged, or not compressed as its name says, soon after byte offset {offset} of "
            f"its decompressed content ({error})"
        ) from None


def _documents(lines: Iterator[tuple[int, bytes]], source: TextSource, errors: str) -> Iterator[str]:
    """The documents, and what separates them."""
    is_first = not source.follows_text
    for number, (offset, line) in enumerate(lines, start=1):
        if not line.strip():
            continue
        document = _document(line, source, f"{os.fspath(source)}, line {number}", offset, errors)
        yield document if is_first else source.end_of_text + document
        is_first = False


def _document(line: bytes, source: TextSource, name: str, offset: int, errors: str) -> str:
    try:
        record = json.loads(line.decode(errors=errors))
    except UnicodeDecodeError as error:
        raise utf8_error(name, offset + error.start, line[error.start], error.reason) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name!r} (from byte offset {offset} on) is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{name!r} (from byte offset {offset} on) is no JSON object, but {record!r:.40}")
    text = record.get(source.field)
    if not isinstance(text, str):
        has = f"has {text!r:.40} as {source.field!r}" if source.field in record else f"has no field {source.field!r}"
        strings = [key for key, value in record.items() if isinstance(value, str)]
        raise ValueError(
            f"{name!r} (from byte offset {offset} on) {has}; the field must be one of its strings, {strings}"
        )
    # "\ud800" is JSON, but no character.
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


BLOCK_BYTES = 1 << 16


def file_size_bytes(path: str | os.PathLike) -> int:
    """The size of a file that can be read in ranges.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        IsADirectoryError: there is a folder at `path`.
        OSError: there is something else, such as a pipe, which can be read only once.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}: check the path of the text file")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{os.fspath(path)!r} is a folder: give the path of one text file")
    if not os.path.isfile(path):
        raise OSError(f"{os.fspath(path)!r} is no regular file (a pipe?): save its text to a file first")
    return os.path.getsize(path)


def read_blocks(path: str | os.PathLike, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The bytes `start` to `stop` (default: the end) of a file, in blocks of at most `BLOCK_BYTES`."""
    with open(path, "rb") as file:
        position = file.seek(start)
        while block := file.read(BLOCK_BYTES if stop is None else min(BLOCK_BYTES, stop - position)):
            position += len(block)
            yield block


def map_bytes(path: str | os.PathLike) -> np.ndarray:
    """A file as a read-only uint8 array, of which nothing is read before it is looked at."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # nothing can be mapped
            return np.frombuffer(b"", np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
