"""Text to learn from, as two files: `train.txt` and, of what is never learned from, `valid.txt`."""

from __future__ import annotations

import mmap
import os
import shutil
from pathlib import Path

from basic.corpus.sources import as_plain_file
from basic.corpus.stories.grammar import Story, stories


def write_stories(
    folder: str | os.PathLike,
    train_count: int,
    valid_count: int,
    *,
    seed: int = 0,
    separator: str = "<|endoftext|>",
    progress: bool = False,
) -> list[Story]:
    """Write the embedded stories, each followed by the separator.

    Args:
        folder: where train.txt and valid.txt shall stand.
        train_count, valid_count: stories in each.
        seed: other seeds give other stories.

    Returns:
        The stories of valid.txt, none of which stands in train.txt.
    """
    from tqdm import tqdm

    drawn = stories(2 * seed, train_count)
    learned = list(tqdm(drawn, "drawing stories", train_count, unit=" stories", disable=not progress))
    known = {story.text for story in learned}
    unseen = (story for story in stories(2 * seed + 1) if story.text not in known)
    valid = [next(unseen) for _ in range(valid_count)]
    for name, part in (("train.txt", learned), ("valid.txt", valid)):
        (Path(folder) / name).write_bytes("".join(story.text + separator for story in part).encode())
    return valid


def split_text(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    valid_fraction: float = 0.1,
    separator: str = "<|endoftext|>",
) -> None:
    """Copy the beginning of a text to train.txt and its end to valid.txt, a file of any size.

    It is cut behind the first separator in its last part, or else behind the first line or word there; but never
    so late that less than half of that part is left.

    Args:
        source: UTF-8 text, plain or of those of `basic.corpus.sources`.
        folder: where train.txt and valid.txt shall stand.
        valid_fraction: share of the bytes in the last part, between 0 and 1.

    Raises:
        FileNotFoundError: no such text.
        ValueError: the text is empty or not what its name says, or `valid_fraction` out of its range.
    """
    if not 0 < valid_fraction < 1:
        raise ValueError(f"valid_fraction must be between 0 and 1, got {valid_fraction}")
    with as_plain_file(source, folder) as plain:
        if os.path.getsize(plain) == 0:
            raise ValueError(f"{os.fspath(source)} is empty; give a text of at least some ten thousand characters")
        with open(plain, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            start = int(len(text) * (1 - valid_fraction))
            cut = _cut(text, start, (start + len(text)) // 2, separator.encode())
            with open(Path(folder) / "train.txt", "wb") as train:
                _copy(file, train, cut)
            with open(Path(folder) / "valid.txt", "wb") as valid:
                shutil.copyfileobj(file, valid)


def _cut(text: mmap.mmap, start: int, end: int, separator: bytes) -> int:
    """The first good place to cut from `start` to `end`, or else the first between two characters."""
    for edge in (separator, b"\n", b" "):
        found = text.find(edge, start, end)
        if found >= 0:
            return found + len(edge)
    while start < len(text) and text[start] & 0xC0 == 0x80:  # inside a character of several bytes
        start += 1
    return start


def _copy(source, target, num_bytes: int) -> None:
    while num_bytes > 0:
        piece = source.read(min(num_bytes, 1 << 20))
        target.write(piece)
        num_bytes -= len(piece)
