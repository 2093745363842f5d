"""Text sources: plain text and JSON lines, both of them also compressed, Parquet tables, and texts of an iterator.

The name of a file says what it holds (`basic.corpus.text_formats`); what is plainly no text is refused. Plain text can
be read from any offset, and is memory-mapped if it is local. Any other source is a stream of text, read from front to
back. Memory holds one block of the stream, or the longest line of JSON lines. A byte order mark is no part of a text.

The separators of documents are not in their texts: what looks like a special token in a document is text. In plain text
the separators are in the text, by convention.

Inputs are files, globs, URLs (s3://, https://, ...), which need the package `fsspec`, "-" for standard input, and
iterators of strings.
"""

from __future__ import annotations

import codecs
import glob
import os
import re
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from basic.bytes_utils import decode_blocks
from basic.common.arguments import check_type, describe
from basic.common.errors import InvalidInputError
from basic.common.files import check_path, open_file
from basic.corpus.documents import BadLines, read_json_lines, read_parquet
from basic.corpus.files import (
    BLOCK_BYTES,
    REMOTE_BLOCK_BYTES,
    ContentReader,
    file_size_bytes,
    glob_url,
    open_url,
    read_blocks,
    read_url,
    standard_input,
    url_size_and_version,
    url_supports_ranges,
)
from basic.corpus.text_formats import (
    COMPRESSIONS,
    HEAD_BYTES,
    JSON_LINES,
    PARQUET,
    DocumentOptions,
    begins_with_json_line,
    check_head,
    check_name,
)
from basic.pretokenization import SpecialTokens, replace_surrogates

STANDARD_INPUT = "-"
_URL = re.compile(r"[a-zA-Z][\w+.:-]*://")  # s3://, simplecache::s3://; a folder's name may end in a colon

Content = Literal["text", "json lines", "parquet", "texts"]


class TextIterator(Iterator[str]):
    """An iterator of texts, each of them a document, of which the first can be looked at before they are read."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts, self._first = texts, deque[str]()

    def __next__(self) -> str:
        return self._first.popleft() if self._first else self._next()

    def exceeds(self, num_characters: int) -> bool:
        """Whether the remaining texts have at least this many characters."""
        length = sum(map(len, self._first))
        while length < num_characters:
            try:
                self._first.append(self._next())
            except StopIteration:
                return False
            length += len(self._first[-1])
        return True

    def _next(self) -> str:
        text = next(self._texts)
        if not isinstance(text, str):
            remedy = "; paths are given in a list" if isinstance(text, os.PathLike) else ""
            raise TypeError(f"an iterator of texts must give strings, got {type(text).__name__}: {text!r:.80}{remedy}")
        return text


@dataclass(frozen=True)
class TextSource(DocumentOptions):
    """A file of text or an iterator of texts, with how to read its documents. It can stand for a path of a corpus."""

    path: str | os.PathLike | Iterator[str]
    """Text in UTF-8: a local file, a URL, or "-" for standard input. A name that ends in .gz, .zst, .xz or .bz2 means
    that the file is compressed. A name that ends in .jsonl, .ndjson or .json (before the ending of a compressed file)
    means that each line is a JSON object with one document; .parquet means a table with a document a row. A name that
    ends in .txt means plain text. Any other name, or none, means JSON lines if the first line begins like an object,
    and else plain text. An iterator gives documents; it can be read once, like standard input."""
    begins_with_separator: bool = False
    """Whether the special token between documents also comes before the first one."""
    content: Content | None = None
    """What the source holds, once it is known (`with_known_content`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.path, str | os.PathLike | Iterator):
            raise TypeError(f"path must be a path or an iterator of texts, got {describe(self.path)}")
        check_type("begins_with_separator", self.begins_with_separator, bool, "give True or False")
        if isinstance(self.path, Iterator) and not isinstance(self.path, TextIterator):
            object.__setattr__(self, "path", TextIterator(self.path))

    def __fspath__(self) -> str:
        return "<texts>" if isinstance(self.path, Iterator) else os.fspath(self.path)

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
    def known_content(self) -> Content | None:
        """What the source holds, as far as its name says it."""
        if isinstance(self.path, Iterator):
            return "texts"
        by_suffix: dict[str, Content] = {".txt": "text", **dict.fromkeys(PARQUET.suffixes, "parquet")}
        by_suffix |= dict.fromkeys(JSON_LINES.suffixes, "json lines")
        return self.content or by_suffix.get(self.content_suffix)

    @property
    def has_documents(self) -> bool:
        """Whether the separators are not in the text."""
        return self.known_content not in ("text", None)

    @property
    def has_marks(self) -> bool:
        """Whether marks stand for the separators of the documents, so that special tokens in them are text."""
        return self.has_documents and not self.specials_in_documents

    @property
    def _name(self) -> str:
        """The name in small letters; of a web address without its query."""
        name = os.fspath(self).lower()
        return urlsplit(name).path if name.startswith(("http://", "https://")) else name

    @property
    def is_plain(self) -> bool:
        """Whether the bytes of the file are the bytes of the text."""
        return not self.has_documents and self.compression is None and not self.reads_once

    @property
    def is_remote(self) -> bool:
        return _URL.match(os.fspath(self)) is not None

    @property
    def reads_once(self) -> bool:
        """Whether the source can be read only once, and only by this process."""
        return isinstance(self.path, Iterator) or self.path == STANDARD_INPUT

    def size_and_version(self) -> tuple[int | None, str]:
        """Return the size in bytes (None if it is not known), and a string that changes with the content.

        Raises:
            OSError: the source is not a readable file.
        """
        if self.reads_once:
            return None, ""
        if not self.is_remote:
            size = file_size_bytes(self)  # raises for a missing file, a folder or a pipe
            return size, str(os.stat(self).st_mtime_ns)
        return url_size_and_version(os.fspath(self))

    def supports_ranges(self) -> bool:
        """Whether a range of bytes can be read; simple web servers only send complete files."""
        return not self.is_remote or url_supports_ranges(os.fspath(self))

    @contextmanager
    def open(self, *, at_any_offset: bool = False) -> Generator[Any]:
        """Open the file for reading from its beginning, or at any offset."""
        if self.path == STANDARD_INPUT:
            yield standard_input()  # which stays open
            return
        name = os.fspath(self)
        with open_url(name, at_any_offset=at_any_offset) if self.is_remote else open_file(name) as file:
            yield file

    @contextmanager
    def open_content(self) -> Generator[ContentReader]:
        """Open the file for reading its content, decompressed, from its beginning."""
        with self.open() as stored:
            yield ContentReader(stored, os.fspath(self), self.compression)

    def read(self, start: int, length: int) -> bytes:
        """Read at most `length` bytes from an offset; fewer at the end of the file."""
        if self.is_remote:
            return read_url(os.fspath(self), start, length)
        with open_file(os.fspath(self)) as file:
            file.seek(start)
            return file.read(length)

    def blocks(self, start: int, stop: int) -> Iterator[bytes]:
        """Read the bytes between two offsets, block by block."""
        if not self.is_remote:
            yield from read_blocks(self, start, stop)
            return
        for offset in range(start, stop, REMOTE_BLOCK_BYTES):
            yield self.read(offset, min(REMOTE_BLOCK_BYTES, stop - offset))


Inputs = str | os.PathLike | Sequence[str | os.PathLike] | Iterator[str]


def expand_inputs(inputs: Inputs) -> list[TextSource]:
    """Return the sources of one or more inputs, in their order; the matches of a glob are sorted by name.

    A source of documents after another source begins with the separator of its documents.

    Args:
        inputs: paths, globs, URLs, "-" or `TextSource`s; or one iterator, whose strings are documents.

    Raises:
        TypeError: an input is no path.
        InvalidInputError: no input is given, or one cannot be a path or holds no text, as its name or its first bytes
            say.
        DamagedFileError: a compressed file is incomplete or damaged.
        FileNotFoundError: no file matches a glob.
        OSError: a file whose name does not say what it holds cannot be read.
    """
    sources = []
    for source in _as_sources(inputs):
        name = os.fspath(source)
        if not source.reads_once and not source.is_remote:
            check_path(name)
        wildcards = "*[" if source.is_remote else "*?["  # a ? in a URL begins its query
        if source.reads_once or not any(wildcard in name for wildcard in wildcards) or os.path.exists(name):
            sources.append(source)
            continue
        if source.is_remote:
            matches = glob_url(name)
        else:
            matches = [match for match in glob.glob(name, recursive=True) if os.path.isfile(match)]
        if not matches:
            raise FileNotFoundError(f"no file matches {name!r}: check the glob, and the folder where it starts")
        sources += [replace(source, path=match) for match in sorted(matches)]
    if not sources:
        raise InvalidInputError("there is no input; give at least one file, glob or URL")
    if sum(source.path == STANDARD_INPUT for source in sources) > 1:
        raise InvalidInputError("standard input, '-', is given twice, but can be read only once")
    for source in sources:
        check_name(source, source.content_suffix)
    sources = [with_known_content(source) for source in sources]
    return sources[:1] + [replace(source, begins_with_separator=source.has_documents) for source in sources[1:]]


def _as_sources(inputs: Inputs) -> list[TextSource]:
    if not isinstance(inputs, str | os.PathLike | Iterable) or isinstance(inputs, bytes):
        raise TypeError(f"inputs must be a path, or a list of paths, got {describe(inputs)}")
    return list(map(as_source, [inputs] if isinstance(inputs, str | os.PathLike | Iterator) else inputs))


def as_source(path: str | os.PathLike | Iterator[str]) -> TextSource:
    """Return a path or an iterator as a source; a source is returned as it is."""
    if isinstance(path, TextSource):
        return path
    if not isinstance(path, str | os.PathLike | Iterator):
        raise TypeError(f"an input must be a path, a URL or a TextSource, got {describe(path)}")
    return TextSource(path)


def with_known_content(source: TextSource) -> TextSource:
    """Return the same source with its `content`; if its name does not say it, its first bytes do.

    Raises:
        OSError, DamagedFileError: the file must be read, but cannot.
    """
    content = source.known_content
    if content is None:
        with source.open_content() as file:
            head = file.peek(HEAD_BYTES)  # standard input cannot be opened again
        content = "json lines" if begins_with_json_line(head[:HEAD_BYTES]) else "text"
    return source if source.content == content else replace(source, content=content)


def check_can_be_divided(inputs: Inputs) -> None:
    """Check that other processes can read the inputs, and that interrupted work on them can resume.

    Raises:
        InvalidInputError: an input can be read only once.
    """
    for source in _as_sources(inputs):
        if source.reads_once:
            name = "standard input" if source.path == STANDARD_INPUT else "an iterator of texts"
            raise InvalidInputError(
                f"{name} can be read only once: work on it can neither resume nor be given to other processes (a work "
                "folder, an executor, a dataset of several files); save the text to a file first"
            )


def check_separator(source: TextSource, special_tokens: Collection[str]) -> None:
    """Check that the separator of documents is one of the special tokens.

    Raises:
        InvalidInputError: it is not.
    """
    if source.has_documents and source.end_of_text not in special_tokens:
        raise InvalidInputError(
            f"the documents of {os.fspath(source)!r} are to be joined by {source.end_of_text!r}, which is none of the "
            f"special tokens {list(special_tokens)}; choose one of these as end_of_text"
        )


def read_text_with_marks(
    path: str | os.PathLike | Iterator[str],
    *,
    errors: str = "strict",
    on_skip: Callable[[InvalidInputError], object] = lambda error: None,
) -> Iterator[str]:
    """Stream the text of a source, in strings that may end anywhere; newlines are not translated.

    Each string of documents is a document; before it comes the mark of its separator (`SpecialTokens.document_mark`),
    or the separator itself if special tokens are special in documents, except before the first document of the source.

    Args:
        path: a path, a URL, an iterator or a `TextSource`.
        errors: for bytes that are not UTF-8: "strict" raises, "replace" reads U+FFFD.
        on_skip: called with the error of each line or row that is left out.

    Raises:
        InvalidInputError: the file holds no text, the text is not UTF-8 (the message names the byte offset), or a line
            is too long or not a JSON object with a string under the key (the message names the line). Offsets are
            those of the decompressed content.
        DamagedFileError: the compressed file is incomplete or damaged.
        OSError: the file cannot be read.
    """
    source = as_source(path)
    check_name(source, source.content_suffix)
    source = with_known_content(source)
    if not source.has_documents:
        yield from _read_plain(source, errors)
        return
    separator, needs_separator = source.end_of_text, source.begins_with_separator
    if source.has_marks:
        separator = SpecialTokens.document_mark(separator).tokens[0]
    for document in _read_documents(source, errors, BadLines(on_skip if source.on_bad_line == "skip" else None)):
        yield separator + document if needs_separator else document
        needs_separator = True


def _read_plain(source: TextSource, errors: str) -> Iterator[str]:
    with source.open_content() as file:
        first = file.read(BLOCK_BYTES)
        check_head(source, first, source.content_suffix)
        start = len(codecs.BOM_UTF8) if first.startswith(codecs.BOM_UTF8) else 0
        blocks = chain([first[start:]], iter(lambda: file.read(BLOCK_BYTES), b""))
        yield from decode_blocks(blocks, source, start, errors=errors)


def _read_documents(source: TextSource, errors: str, bad_lines: BadLines) -> Iterator[str]:
    """The documents of a source, without separators."""
    if isinstance(source.path, TextIterator):
        yield from map(replace_surrogates, source.path)
    elif source.known_content == "json lines":
        with source.open_content() as file:
            yield from read_json_lines(file, source.field, source.content_suffix, errors=errors, bad_lines=bad_lines)
    elif source.compression is None:
        with source.open(at_any_offset=True) as file:
            yield from read_parquet(file, os.fspath(source), source.field, errors=errors, bad_lines=bad_lines)
    else:
        raise InvalidInputError(f"{os.fspath(source)!r} is a compressed Parquet table; decompress it first")


def read_text(path: str | os.PathLike, *, errors: str = "strict") -> Iterator[str]:
    """The same with the separators themselves instead of their marks."""
    source = as_source(path)
    mark = SpecialTokens.document_mark(source.end_of_text).tokens[0]
    for text in read_text_with_marks(source, errors=errors):
        yield text.replace(mark, source.end_of_text)


def size_of_bom(source: TextSource) -> int:
    """Return the size of the byte order mark of a plain file, 0 or 3 bytes.

    Raises:
        InvalidInputError: the file holds no text, as its first bytes show.
    """
    head = source.read(0, HEAD_BYTES)
    check_head(source, head, source.content_suffix)
    return len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
