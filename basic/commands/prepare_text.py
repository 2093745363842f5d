"""From texts to a folder with training and validation text, tokenizer and token files, made once for each text."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from basic.common.errors import InvalidInputError
from basic.common.files import atomic_folder, check_path, check_regular_file, make_folder, sha256_of_file
from basic.corpus.sources import STANDARD_INPUT, TextSource, expand_inputs, read_text
from basic.corpus.train_valid import split_text
from basic.encoding import encode_file
from basic.Tokenizer import Tokenizer
from basic.tokens.opening import open_tokens
from basic.train_bpe import train_bpe

END = "<|endoftext|>"
FEWEST_TOKENS = 16
"""For training and for validation: less is no sequence to learn from. A model needs some ten thousand to learn much."""
SMALLEST_VOCABULARY, LARGEST_VOCABULARY = 512, 32_768


@dataclass(frozen=True)
class PreparedText:
    """What a run needs of a text."""

    folder: Path
    tokenizer: Tokenizer
    train_tokens: Any
    valid_tokens: Any
    was_there: bool
    """Whether an earlier call made it."""


def prepare_text(
    inputs: Sequence[str],
    parent: Path,
    *,
    valid_fraction: float = 0.1,
    vocab_size: int | None = None,
    progress: bool = False,
) -> PreparedText:
    """Split texts into training and validation documents, train a tokenizer, and encode both.

    Args:
        inputs: local files, globs and folders, whose files are documents; `<|endoftext|>` ends a document too.
        parent: gets a folder, whose name has a checksum of the contents and the settings: with the same ones, its files
            are used again.
        valid_fraction: of the text, for validation. One file is split after a document in its last part, or after a
            line if no document ends there; of several files, this share of the documents is for validation.
        vocab_size: of the tokenizer; None: the square root of the number of bytes, as a power of 2 (1024 for 1 MB).

    Raises:
        InvalidInputError: an input is no text or has none, or is no local file, or a setting is out of its range.
        FileNotFoundError: there is no such file.
    """
    if not 0 < valid_fraction <= 0.5:
        raise InvalidInputError(f"valid_fraction must be above 0 and at most 0.5, got {valid_fraction}")
    sources = local_sources(inputs)
    contents = [(sha256_of_file(Path(source)), source.content, source.compression) for source in sources]
    identity = json.dumps([2, contents, valid_fraction, vocab_size])
    first = Path(inputs[0])
    name = first.name.partition(".")[0] if first.exists() else "texts"
    folder = parent / f"{name or 'text'}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    was_there, is_new_parent = folder.exists(), not parent.exists()
    if not was_there:
        make_folder(parent)
        try:
            with atomic_folder(folder) as new:
                _make(sources, new, valid_fraction, vocab_size, progress)
        except BaseException:
            if is_new_parent:
                with suppress(OSError):
                    parent.rmdir()
            raise
    tokenizer = Tokenizer.load(folder / "tokenizer")
    made_by = tokenizer.fingerprint
    tokens = (open_tokens(folder / f"{split}.bin", made_by=made_by) for split in ("train", "valid"))
    return PreparedText(folder, tokenizer, *tokens, was_there)


def local_sources(inputs: Sequence[str]) -> list[TextSource]:
    """The texts of files, globs and folders, each once; raises what `prepare_text` does where one is no local file."""
    for given in inputs:
        if given == STANDARD_INPUT or TextSource(given).is_remote:
            raise InvalidInputError(
                f"{given!r} is no local file; `basic train-bpe` and `basic encode` also take URLs and standard input, "
                "and `basic train --config` their token files"
            )
        check_path(given)
    sources = expand_inputs(list(_files(inputs)))
    for source in sources:
        check_regular_file(source)
    # A file that is given twice, or that two globs match, would be for training and for validation.
    return list({os.path.realpath(source): source for source in sources}.values())


def _files(inputs: Sequence[str]) -> Iterator[str]:
    """The inputs, with the files in a folder in its place, without hidden ones."""
    for given in inputs:
        folder = Path(given)
        if not given or not folder.is_dir():  # Path("") is the current folder
            yield given
            continue
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
        if not paths:
            raise InvalidInputError(f"the folder {given!r} has no files; give one with texts")
        yield from map(str, paths)


def _make(
    sources: list[TextSource], folder: Path, valid_fraction: float, vocab_size: int | None, progress: bool
) -> None:
    train, valid, joined = folder / "train.txt", folder / "valid.txt", folder / "joined.txt"
    if len(sources) == 1:
        for _ in read_text(sources[0]) if sources[0].is_plain else ():
            pass  # an error in the text names this file, and not the copies that are then encoded
        split_text(sources[0], folder, valid_fraction=valid_fraction)
    elif not _split_documents(sources, folder, valid_fraction):
        train.rename(joined)
        split_text(joined, folder, valid_fraction=valid_fraction)
        joined.unlink()
    if vocab_size is None:
        vocab_size = 1 << round(math.log2(max(1, train.stat().st_size + valid.stat().st_size)) / 2)
        vocab_size = min(max(vocab_size, SMALLEST_VOCABULARY), LARGEST_VOCABULARY)
    _, counts = tokenize(folder, vocab_size, progress=progress)
    if min(counts) < FEWEST_TOKENS:
        raise InvalidInputError(
            f"the text is too short: {counts[0]:,} tokens for training and {counts[1]:,} for validation, at least "
            f"{FEWEST_TOKENS} each are needed; give a longer text, or a larger share for validation"
        )


def tokenize(
    folder: Path, vocab_size: int, *, kernels: bool | None = None, progress: bool
) -> tuple[Tokenizer, list[int]]:
    """Train a tokenizer on train.txt, and encode it and valid.txt; returns also how many tokens each has."""
    vocab, merges = train_bpe(folder / "train.txt", vocab_size, [END], kernels=kernels, progress=progress)
    tokenizer = Tokenizer(vocab, merges, [END], kernels=kernels)
    tokenizer.save(folder / "tokenizer")
    texts = [folder / "train.txt", folder / "valid.txt"]
    infos = [encode_file(tokenizer, text, text.with_suffix(".bin"), progress=progress) for text in texts]
    return tokenizer, [info.count for info in infos]


def _split_documents(sources: list[TextSource], folder: Path, valid_fraction: float) -> bool:
    """Write a share of the documents to valid.txt, others to train.txt; False if there are too few for one in valid."""
    num_documents = num_valid = 0
    with (folder / "train.txt").open("xb") as train, (folder / "valid.txt").open("xb") as valid:
        for document in _documents(sources):
            num_documents += 1
            is_valid = int(num_documents * valid_fraction) > num_valid
            num_valid += is_valid
            (valid if is_valid else train).write((document + END).encode())
    if num_valid:
        return True
    (folder / "valid.txt").unlink()
    return False


def _documents(sources: list[TextSource]) -> Iterator[str]:
    """The documents of all sources, without empty ones. Memory holds the longest."""
    for source in sources:
        pieces, rest = list[str](), ""  # the document so far; only rest can have the beginning of END
        for text in read_text(source):
            *ends, rest = (rest + text).split(END)
            for end in ends:
                document, pieces = "".join([*pieces, end]), []
                if document.strip():
                    yield document
            pieces.append(rest[: 1 - len(END)])
            rest = rest[1 - len(END) :]
        document = "".join([*pieces, rest])
        if document.strip():
            yield document
