"""Read the bytes of files: local ones, those behind URLs, and the content of compressed ones.

URLs (s3://, https://, ...) need the package `fsspec`.
"""

from __future__ import annotations

import io
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar

import numpy as np

from basic.common.errors import DamagedFileError, InvalidInputError, how_to_install
from basic.common.files import check_regular_file, open_file
from basic.corpus.text_formats import COMPRESSIONS

T = TypeVar("T")

BLOCK_BYTES = 1 << 16
REMOTE_BLOCK_BYTES = 1 << 23  # a round trip costs as much time as a megabyte or more


# --- Local files


def file_size_bytes(path: str | os.PathLike) -> int:
    """Return the size of a regular file.

    Raises:
        FileNotFoundError: `path` does not exist.
        IsADirectoryError: `path` is a folder.
        OSError: `path` is something else, such as a pipe, which can be read only once.
    """
    check_regular_file(path)
    return os.path.getsize(path)


def read_blocks(path: str | os.PathLike, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Read the bytes from `start` to `stop` (default: the end) of a file, block by block."""
    with open_file(path) as file:
        offset = file.seek(start)
        while block := file.read(BLOCK_BYTES if stop is None else min(BLOCK_BYTES, stop - offset)):
            offset += len(block)
            yield block


def map_bytes(path: str | os.PathLike) -> np.ndarray:
    """Map a file into memory as a read-only uint8 array."""
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size == 0:  # an empty file cannot be mapped
            return np.frombuffer(b"", np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def release_pages(data: np.ndarray, start: int, stop: int) -> None:
    """Let the system forget data[start:stop] of `map_bytes`; when it is used again, it is read again."""
    memory = data.base.obj if isinstance(data.base, memoryview) else data.base
    start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    if isinstance(memory, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") and start < stop:
        memory.madvise(mmap.MADV_DONTNEED, start, stop - start)


# --- Standard input


class _StandardInput(io.RawIOBase):
    """Standard input, of which the beginning can be looked at before it is read."""

    def __init__(self, stream: Any):
        self._stream, self._first = stream, b""

    def exceeds(self, num_bytes: int) -> bool:
        """Whether it has at least this many bytes; waits for them, or for its end."""
        self._first += self._stream.read(max(num_bytes - len(self._first), 0))
        return len(self._first) >= num_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._first[: len(buffer)] or self._stream.read1(len(buffer))
        self._first = self._first[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


@cache
def _buffered(stream: Any) -> io.BufferedReader:
    return io.BufferedReader(_StandardInput(stream), BLOCK_BYTES)


def standard_input() -> io.BufferedReader:
    """Standard input as a file of bytes, the same each time.

    Raises:
        InvalidInputError: there is none.
    """
    if sys.stdin is None:
        raise InvalidInputError("there is no standard input; give a file")
    return _buffered(sys.stdin.buffer)


def standard_input_exceeds(num_bytes: int) -> bool:
    """Whether the rest of standard input has at least this many bytes; it waits for them, or for its end."""
    file = standard_input()
    raw: Any = file.raw
    return raw.exceeds(num_bytes - len(file.peek(1)))


# --- Files behind URLs


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


def _request(url: str, call: Callable[[], T]) -> T:
    """Call a function of fsspec; its errors get the name of the file."""
    try:
        return call()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {url!r}: check the URL") from None
    except ImportError as error:  # a package that the protocol needs besides fsspec
        raise InvalidInputError(f"{url!r} cannot be opened here: {error}") from None
    except ValueError:
        raise
    except Exception as error:  # the libraries' own errors for a lost connection
        raise OSError(f"{url!r} cannot be read: {type(error).__name__}: {error}") from error


def glob_url(url: str) -> list[str]:
    """Return the URLs that match a glob, in any order."""
    system, path = _file_system(url)
    return _request(url, lambda: [system.unstrip_protocol(match) for match in system.glob(path)])


def url_size_and_version(url: str) -> tuple[int | None, str]:
    """Return the size in bytes (None if the server does not report it), and a string that changes with the content."""
    system, path = _file_system(url)
    info = _request(url, lambda: {"key": system.ukey(path), **system.info(path)})
    # For a web server the key is only the URL, so the headers are needed too.
    return info["size"], repr([info.get(name) for name in ("key", "size", "ETag", "Last-Modified")])


def url_supports_ranges(url: str) -> bool:
    """Whether a range of bytes can be read; simple web servers only send complete files."""
    system, path = _file_system(url)
    if not _is_http(system):
        return True
    try:
        with _request(url, lambda: system.open(path, "rb", block_size=1 << 16, cache_type="none")) as file:
            _request(url, lambda: (file.seek(1), file.read(1)))
    except ValueError:  # raised by fsspec for such servers, and for those that do not report the size
        return False
    return True


def open_url(url: str, *, at_any_offset: bool = False) -> Any:
    """Open a URL for reading from its beginning, or at any offset."""
    system, path = _file_system(url)
    if at_any_offset:
        return _request(url, lambda: system.open(path, "rb"))
    options = {"block_size": 0} if _is_http(system) else {}  # 0: one stream, which all web servers support
    return io.BufferedReader(_RemoteFile(url, _request(url, lambda: system.open(path, "rb", **options))), 1 << 20)


def read_url(url: str, start: int, length: int) -> bytes:
    """Read at most `length` bytes from an offset; fewer at the end of the file."""
    system, path = _file_system(url)
    return _request(url, lambda: system.cat_file(path, start=start, end=start + length))


def _is_http(system: Any) -> bool:
    return "http" in system.protocol


class _RemoteFile(io.RawIOBase):
    """A file of fsspec as one of Python's, read from front to back: fsspec's `readline` has no limit of length."""

    def __init__(self, url: str, file: Any):
        self._url, self._file, self._ended = url, file, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b"" if self._ended else _request(self._url, lambda: self._file.read(len(buffer)))
        self._ended = not data  # fsspec warns of reads after the end of a stream
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


# --- Compressed files


class ContentReader:
    """Reads the content of an open file from front to back, decompressed; errors name the file and the offset.

    Args:
        stored: the file as it is stored, at its beginning. It stays open.
        compression: a key of `COMPRESSIONS`, or None.

    Attributes:
        offset: the number of bytes of the content that have been read.

    Raises:
        DamagedFileError: (also later) the compressed file is incomplete or damaged.
    """

    def __init__(self, stored: Any, name: str, compression: str | None) -> None:
        self.name, self.offset, self._file = name, 0, stored
        self._compression = None if compression is None else COMPRESSIONS[compression]
        if self._compression is not None:
            if not stored.peek(1):
                raise self._incomplete()  # for most decompressors this is an empty text
            self._file = self._compression.open(stored)

    def peek(self, size: int) -> bytes:
        """Return some of the next bytes, about `size`, without reading them."""
        return self._checked(self._file.peek, size)

    def read(self, size: int) -> bytes:
        """Read at most `size` bytes; no bytes at the end."""
        return self._advance(self._checked(self._file.read, size))

    def readline(self, size: int) -> bytes:
        """Read at most `size` bytes, up to the end of a line."""
        return self._advance(self._checked(self._file.readline, size))

    def _advance(self, data: bytes) -> bytes:
        self.offset += len(data)
        return data

    def _checked(self, read: Callable[[int], bytes], size: int) -> bytes:
        if self._compression is None:
            return read(size)
        try:
            return read(size)
        except EOFError:
            raise self._incomplete() from None
        except self._compression.errors() as error:
            if type(error) is OSError and str(error) not in self._compression.messages:
                raise  # of the disk or the network
            raise DamagedFileError(
                f"{self.name!r} is damaged, or not compressed as its name says, soon after byte offset {self.offset} "
                f"of its decompressed content ({error})"
            ) from None

    def _incomplete(self) -> DamagedFileError:
        return DamagedFileError(
            f"{self.name!r} is incomplete: it ends soon after byte offset {self.offset} of its decompressed content; "
            "copy it again"
        )
