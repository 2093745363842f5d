"""Bytes and text: files read block by block, and GPT-2's printable form of vocabularies and merges.

`vocab.json` and `merges.txt` are text files, but tokens are arbitrary bytes. GPT-2 writes each byte as one
printable character, its own where it has one ("a" for 97), otherwise one from 256 upwards ("Ġ" for the space).
"""

from __future__ import annotations

import codecs
import functools
import json
import os
from collections.abc import Iterable, Iterator

import numpy as np

from basic.common.files import atomic_write, load_json


def invalid_byte_error(
    name: str | os.PathLike, data: np.ndarray, index: int, offset: int, *, lacks_token: bool = False
) -> ValueError:
    """What to raise for a byte of an array that is not UTF-8, or that the vocabulary lacks.

    Args:
        name: of the text.
        data, index: the byte is data[index].
        offset: of the byte in the text.
    """
    if lacks_token:
        return ValueError(
            f"the vocabulary has no token for the byte 0x{data[index]:02x}, at byte offset {offset} of "
            f"{os.fspath(name)!r}; train the tokenizer with all 256 bytes"
        )
    try:
        data[index : index + 4].tobytes().decode()
    except UnicodeDecodeError as error:
        return utf8_error(name, offset, int(data[index]), error.reason)
    raise AssertionError(f"the bytes at {index} are UTF-8")


_MERGES_HEADER = "#version: 0.2"


def utf8_error(name: str | os.PathLike, offset: int, wrong: int, reason: str) -> ValueError:
    """What to raise for a byte that is not UTF-8."""
    return ValueError(
        f"{os.fspath(name)!r} is not valid UTF-8 at byte offset {offset} (byte 0x{wrong:02x}: {reason}); "
        "convert the file to UTF-8"
    )


def decode_blocks(
    blocks: Iterable[bytes], name: str | os.PathLike, start: int = 0, *, errors: str = "strict"
) -> Iterator[str]:
    """Decode consecutive blocks of UTF-8, wherever they are cut; nothing is translated, newlines included.

    Args:
        blocks: the bytes, in order.
        name: what they are read from, for the error message.
        start: the byte offset of the first block in `name`.
        errors: "strict", or "replace" for U+FFFD in the place of what is wrong.

    Raises:
        ValueError: the bytes are not UTF-8 and errors is "strict"; the message names the offset of the first byte
            that is wrong.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    offset = start
    for block in _then_nothing(blocks):
        undecoded = len(decoder.getstate()[0])  # the beginning of a character that the last block cut
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            wrong = offset - undecoded + error.start
            raise utf8_error(name, wrong, error.object[error.start], error.reason) from None
        offset += len(block)
        if text:
            yield text


def _then_nothing(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The blocks that are not empty, then an empty one as the mark of the end."""
    yield from filter(None, blocks)
    yield b""


@functools.cache
def bytes_to_unicode() -> dict[int, str]:
    """The printable character that stands for each byte in GPT-2's files.

    Returns:
        A map from all 256 bytes to 256 different characters, none of them white space.

    Source: GPT-2's files (Radford et al. 2019), whose visible Latin-1 characters stand for themselves, and the
        68 other bytes, in order, for the characters from 256 on.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    invisible = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(invisible)}


@functools.cache
def _unicode_to_bytes() -> dict[str, int]:
    return {character: byte for byte, character in bytes_to_unicode().items()}


def to_printable(token: bytes) -> str:
    """A token in GPT-2's printable form; `b" the"` is `"Ġthe"`."""
    characters = bytes_to_unicode()
    return "".join([characters[byte] for byte in token])


def from_printable(printable: str) -> bytes:
    """The token that a printable form stands for.

    Raises:
        KeyError: a character stands for no byte.
    """
    values = _unicode_to_bytes()
    return bytes([values[character] for character in printable])


def save_vocab(vocab: dict[int, bytes], path: str | os.PathLike) -> None:
    """Write a vocabulary as GPT-2's `vocab.json`: one object, printable token to id, in the order of the ids.

    Special tokens are written like any other token, so that one with spaces or letters beyond ASCII comes back
    byte for byte ("<|endoftext|>" is its own printable form). Where two ids have the same bytes, the object has
    the same key twice: `load_vocab` reads both, other programs see the larger id.
    """
    entries = (f"{json.dumps(to_printable(vocab[i]))}: {i}" for i in sorted(vocab))
    with atomic_write(path) as file:
        file.write(("{" + ", ".join(entries) + "}").encode())


def load_vocab(path: str | os.PathLike) -> dict[int, bytes]:
    """Read GPT-2's `vocab.json`, the inverse of `save_vocab`.

    A token with a character that stands for no byte (a space, say) is a special token that another program
    wrote as plain text, and is taken as that text.

    Raises:
        ValueError: the file is not such a vocabulary; the message says what is wrong.
    """
    entries = load_json(path, object_pairs_hook=tuple)
    if not isinstance(entries, tuple):
        raise ValueError(f"{os.fspath(path)!r} must hold one JSON object of tokens and ids")
    vocab: dict[int, bytes] = {}
    for printable, token_id in entries:
        if type(token_id) is not int or token_id < 0:
            raise ValueError(f"{os.fspath(path)!r}: the id of {printable!r} is {token_id!r}, not an int >= 0")
        if token_id in vocab:
            raise ValueError(f"{os.fspath(path)!r}: the id {token_id} is given twice, again to {printable!r}")
        try:
            vocab[token_id] = from_printable(printable)
        except KeyError:
            vocab[token_id] = printable.encode(errors="surrogatepass")
    return vocab


def save_merges(merges: Iterable[tuple[bytes, bytes]], path: str | os.PathLike) -> None:
    """Write merges as GPT-2's `merges.txt`: a version line, then a line a merge, in order.

    The version line is always there: without it a first merge that begins with "#version" would be lost.
    """
    lines = [f"{to_printable(left)} {to_printable(right)}" for left, right in merges]
    with atomic_write(path) as file:
        file.write("\n".join([_MERGES_HEADER, *lines, ""]).encode())


def load_merges(path: str | os.PathLike) -> list[tuple[bytes, bytes]]:
    """Read GPT-2's `merges.txt`, the inverse of `save_merges`.

    Only a first line that begins with "#version" is no merge; "# #" is a merge like any other.

    Raises:
        ValueError: a line is not two printable tokens and a space; the message names the line.
    """
    with open(path, "rb") as file:
        try:
            lines = file.read().decode().rstrip("\r\n").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{os.fspath(path)!r} is not valid UTF-8 at byte offset {error.start}") from None
    merges = []
    for number, line in enumerate(lines, start=1):
        if number == 1 and (line.startswith("#version") or lines == [""]):
            continue
        try:
            left, right = map(from_printable, line.removesuffix("\r").split(" "))
            if not (left and right):
                raise ValueError
        except (ValueError, KeyError):
            raise ValueError(
                f"{os.fspath(path)!r}, line {number}: {line!r} must be two tokens in printable form "
                "with one space between them"
            ) from None
        merges.append((left, right))
    return merges
