"""Make `train.txt` and `valid.txt`, the training and validation text, from the embedded stories or from a text."""

from __future__ import annotations

import filecmp
import mmap
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from basic.common.errors import InvalidInputError
from basic.common.files import atomic_paths, open_file, temporary_folder
from basic.corpus.files import file_size_bytes
from basic.corpus.sources import TextSource, as_source, read_text_with_marks, size_of_bom, with_known_content
from basic.corpus.stories.grammar import Story, stories
from basic.corpus.text_formats import check_name
from basic.pretokenization import SpecialTokens

_SEPARATOR = "<|endoftext|>"


def write_stories(
    folder: str | os.PathLike,
    train_count: int,
    valid_count: int,
    *,
    seed: int = 0,
    separator: str = _SEPARATOR,
    progress: bool = False,
    sample: Callable[[int, int | None], Iterator[Story]] = stories,
) -> list[Story]:
    """Write embedded stories, each followed by the separator.

    Args:
        folder: folder of train.txt and valid.txt; it must exist.
        sample: samples stories for a seed and a count, None for an endless stream.

    Returns:
        The stories of valid.txt, none of which is in train.txt.

    Raises:
        FileExistsError: train.txt or valid.txt holds another text.
    """
    from tqdm import tqdm

    sampled = sample(2 * seed, train_count)
    train = list(tqdm(sampled, "drawing stories", train_count, unit=" stories", disable=not progress))
    train_texts = {story.text for story in train}
    unseen = (story for story in sample(2 * seed + 1, None) if story.text not in train_texts)
    valid = [next(unseen) for _ in range(valid_count)]
    for name, split in (("train.txt", train), ("valid.txt", valid)):
        with _new_or_equal(Path(folder) / name) as file:
            file.write("".join(story.text + separator for story in split).encode())
    return valid


def split_text(source: str | os.PathLike, folder: str | os.PathLike, *, valid_fraction: float = 0.1) -> None:
    """Copy the beginning of a text of any size to train.txt and its end to valid.txt.

    The text is split after the first <|endoftext|> in its last `valid_fraction`, else after the first line, else after
    the first word there. Only the first half of that range is searched, so that valid.txt does not become too short.

    Args:
        source: UTF-8 text, in any form of `basic.corpus.sources`.
        folder: folder of train.txt and valid.txt; it must exist.
        valid_fraction: fraction of the bytes for valid.txt, between 0 and 1.

    Raises:
        FileExistsError: train.txt or valid.txt holds another text.
        FileNotFoundError: there is no such text.
        InvalidInputError: the text is empty or not valid, or `valid_fraction` is out of range.
        DamagedFileError: the compressed file is incomplete or damaged.
    """
    if not 0 < valid_fraction < 1:
        raise InvalidInputError(f"valid_fraction must be between 0 and 1, got {valid_fraction}")
    with as_plain_file(source, folder) as plain:
        if os.path.getsize(plain) == 0:
            raise InvalidInputError(
                f"{os.fspath(source)} is empty; give a text of at least some ten thousand characters"
            )
        with open_file(plain) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            start = int(len(text) * (1 - valid_fraction))
            offset = _split_offset(text, start, (start + len(text)) // 2)
            with _new_or_equal(Path(folder) / "train.txt") as train:
                _copy(file, train, offset)
            with _new_or_equal(Path(folder) / "valid.txt") as valid:
                shutil.copyfileobj(file, valid)


@contextmanager
def _new_or_equal(path: Path) -> Generator[BinaryIO]:
    """Open a file for writing that appears when it is complete, and does not replace another text."""
    with atomic_paths(path) as (temporary,):
        with open(temporary, "xb") as file:
            yield file
        if path.exists() and not filecmp.cmp(temporary, path, shallow=False):
            raise FileExistsError(f"{path} exists and holds another text, which would be replaced; move it away")


@contextmanager
def as_plain_file(path: str | os.PathLike, folder: str | os.PathLike) -> Generator[Path]:
    """Yield the path of a local file with the plain text of a source: its own, or a temporary one in this folder.

    Raises:
        InvalidInputError: a document of JSON lines has the separator in its text, or see `read_text_with_marks`.
    """
    source = with_known_content(as_source(path))
    if source.is_plain and not source.is_remote:
        check_name(source, source.content_suffix)
        file_size_bytes(source)  # raises for a file that cannot be read
        size_of_bom(source)
        yield Path(source)
        return
    with temporary_folder(Path(folder) / "text.txt") as temporary:
        plain = temporary / "text.txt"
        with open(plain, "xb") as file:
            file.writelines(_separated_in_text(source))
        yield plain


def _separated_in_text(source: TextSource) -> Iterator[bytes]:
    """The bytes of a text, where a separator can only be a separator."""
    mark = SpecialTokens.document_mark(source.end_of_text).tokens[0]
    for text in read_text_with_marks(source):
        if source.has_marks and source.end_of_text in text:
            raise InvalidInputError(
                f"a document of {os.fspath(source)!r} contains {source.end_of_text!r}, which also separates the "
                f"documents in plain text: {text.removeprefix(mark)!r:.60}; choose another separator, or use the "
                "file as it is, where the two are not mixed up"
            )
        yield text.replace(mark, source.end_of_text).encode()


def _split_offset(text: mmap.mmap, start: int, stop: int) -> int:
    """The offset after the first separator, newline or space from `start` to `stop`; else after a whole character."""
    for delimiter in (_SEPARATOR.encode(), b"\n", b" "):
        offset = text.find(delimiter, start, stop)
        if offset >= 0:
            return offset + len(delimiter)
    while start < len(text) and text[start] & 0xC0 == 0x80:  # inside a character of several bytes
        start += 1
    return start


def _copy(source: BinaryIO, target: BinaryIO, num_bytes: int) -> None:
    while num_bytes > 0:
        block = source.read(min(num_bytes, 1 << 20))
        target.write(block)
        num_bytes -= len(block)
