"""Text in blocks of bytes, and GPT-2's files `vocab.json` and `merges.txt`.

Both files are text, but tokens are arbitrary bytes. So GPT-2 writes each byte as one printable character: "a" for 97,
and a character from 256 on for a byte that has none ("Ġ" for the space).
"""

from __future__ import annotations

import codecs
import functools
import json
import os
from collections.abc import Iterable, Iterator

from basic.common.errors import DamagedFileError, utf8_error
from basic.common.files import atomic_write, load_json, read_text_file

__all__ = [
    "bytes_to_unicode",
    "from_printable",
    "load_merges",
    "load_vocab",
    "save_merges",
    "save_vocab",
    "to_printable",
]

_MERGES_HEADER = "#version: 0.2"


def decode_blocks(
    blocks: Iterable[bytes], name: str | os.PathLike, start: int = 0, *, errors: str = "strict"
) -> Iterator[str]:
    """Decode consecutive blocks of UTF-8, which may end inside a character; newlines are not translated.

    Args:
        start: the byte offset of the first block in the text.
        errors: "strict" raises; "replace" decodes invalid bytes as U+FFFD.

    Raises:
        InvalidInputError: a byte is not UTF-8 and errors is "strict"; the message has the offset of the first one.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    offset = start
    for block in _with_end_mark(blocks):
        undecoded = len(decoder.getstate()[0])  # bytes of a character that the last block ended in
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            wrong = offset - undecoded + error.start
            raise utf8_error(name, wrong, error.object[error.start], error.reason) from None
        offset += len(block)
        if text:
            yield text


def _with_end_mark(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The blocks that are not empty, then an empty one."""
    yield from filter(None, blocks)
    yield b""


@functools.cache
def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable character for each of the 256 bytes; all are different, none is white space.

    Source: the files of GPT-2 (Radford et al. 2019). Visible characters of Latin-1 stand for themselves; the 68 other
        bytes, in order, for the characters from 256 on.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    invisible = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(invisible)}


@functools.cache
def _printable_to_latin1() -> dict[int, int]:
    """For `str.translate`: each printable character becomes the one of Latin-1 with its byte, all others none of it."""
    return dict.fromkeys(range(256), 0xFFFF) | {ord(character): byte for byte, character in bytes_to_unicode().items()}


def to_printable(token: bytes) -> str:
    """Convert a token to GPT-2's printable form; `b" the"` becomes `"Ġthe"`."""
    characters = bytes_to_unicode()
    return "".join([characters[byte] for byte in token])


def from_printable(printable: str) -> bytes:
    """Convert a printable form to its token.

    Raises:
        KeyError: a character stands for no byte.
    """
    try:
        return printable.translate(_printable_to_latin1()).encode("latin-1")
    except UnicodeEncodeError as error:
        raise KeyError(printable[error.start]) from None


def save_vocab(vocab: dict[int, bytes], path: str | os.PathLike) -> None:
    """Write a vocabulary as GPT-2's `vocab.json`: one object, printable token to id, in the order of the ids.

    Special tokens are written in printable form too, so `load_vocab` returns the same bytes ("<|endoftext|>" is its own
    printable form). Two ids with the same bytes give two equal keys: `load_vocab` reads both, other programs only the
    larger id.
    """
    entries = (f"{json.dumps(to_printable(vocab[i]))}: {i}" for i in sorted(vocab))
    with atomic_write(path) as file:
        file.write(("{" + ", ".join(entries) + "}").encode())


def load_vocab(path: str | os.PathLike, content: bytes | None = None) -> dict[int, bytes]:
    """Read GPT-2's `vocab.json`, the inverse of `save_vocab`.

    A token with a character that stands for no byte (a space, for example) is a special token that another program
    wrote as plain text; it is read as that text.

    Args:
        content: the file's content, if it has been read already.

    Raises:
        DamagedFileError: the file is not such a vocabulary.
        OSError: the file cannot be read.
    """
    name = os.fspath(path)
    entries = load_json(path, content, object_pairs_hook=tuple)
    if not isinstance(entries, tuple):
        raise DamagedFileError(f"{name!r} must hold one JSON object of tokens and ids")
    vocab: dict[int, bytes] = {}
    for printable, token_id in entries:
        if type(token_id) is not int or token_id < 0:
            raise DamagedFileError(f"{name!r}: the id of {printable!r} is {token_id!r}, not an int >= 0")
        if token_id in vocab:
            raise DamagedFileError(f"{name!r}: the id {token_id} is given twice, again to {printable!r}")
        try:
            vocab[token_id] = from_printable(printable)
        except KeyError:
            vocab[token_id] = printable.encode(errors="surrogatepass")
    return vocab


def save_merges(merges: Iterable[tuple[bytes, bytes]], path: str | os.PathLike) -> None:
    """Write merges as GPT-2's `merges.txt`: a version line, then one merge a line, in order.

    The version line is always written. Without it, `load_merges` would skip a first merge that starts with "#version".
    """
    lines = [f"{to_printable(left)} {to_printable(right)}" for left, right in merges]
    with atomic_write(path) as file:
        file.write("\n".join([_MERGES_HEADER, *lines, ""]).encode())


def load_merges(path: str | os.PathLike, content: bytes | None = None) -> list[tuple[bytes, bytes]]:
    """Read GPT-2's `merges.txt`, the inverse of `save_merges`.

    Only a first line that starts with "#version" is skipped; "# #" is a merge like any other.

    Args:
        content: the file's content, if it has been read already.

    Raises:
        DamagedFileError: a line is not two printable tokens with one space between them; the message has its number.
        OSError: the file cannot be read.
    """
    name = os.fspath(path)
    lines = read_text_file(path, content).rstrip("\r\n").split("\n")
    merges = []
    for number, line in enumerate(lines, start=1):
        if number == 1 and (line.startswith("#version") or lines == [""]):
            continue
        try:
            left, right = map(from_printable, line.removesuffix("\r").split(" "))
            if not (left and right):
                raise ValueError
        except (ValueError, KeyError):
            raise DamagedFileError(
                f"{name!r}, line {number}: {line!r} must be two tokens in printable form with one space between them"
            ) from None
        merges.append((left, right))
    return merges
