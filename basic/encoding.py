"""Encoding a corpus of any size into token files, on any number of machines.

    stage             what it reads     what it writes, to be kept                its memory
    encode a shard    128 MB of text    its ids, with their sidecar               a few chunks and the cache of words
    write the index   the sidecars      index.json: files, counts, checksums      a line for each shard

The folder of the dataset is a folder of work (`basic.work_folder`): a run that was interrupted encodes what has no file
yet. It also holds the tokenizer, from which each worker loads its own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

from basic.bytes_utils import progress_bar
from basic.counting import default_executor
from basic.shards import SHARD_BYTES, Shard, cut, default_num_workers, fingerprint_of, known_bytes
from basic.text_sources import Inputs, sources_of
from basic.token_files import TokenFileInfo, TokenFileWriter, open_tokens
from basic.token_index import INDEX_NAME, write_index
from basic.Tokenizer import Tokenizer
from basic.work_folder import Record, WorkFolder

_TOKENIZER = "tokenizer"

# The tokenizers that this process has loaded, by fingerprint.
_tokenizers: dict[str, Tokenizer] = {}


def encode_files(
    tokenizer: Tokenizer,
    inputs: Inputs,
    output: str | os.PathLike,
    *,
    executor: Executor | None = None,
    start_over: bool = False,
    num_workers: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    errors: str = "strict",
    specials_as_text: bool = False,
    progress: bool = False,
) -> TokenFileInfo:
    """Encode text of any size, in parts that are kept: the same call goes on where an interrupted one was.

    Args:
        inputs: text in UTF-8, plain or of those of `basic.text_sources`: a file, a glob, a URL, or several of them;
            their ids come one after the other, with nothing between, but JSON lines begin with what separates their
            documents. One that is given twice is encoded twice.
        output: the folder of the dataset, which `basic.token_files.open_tokens` opens as one array. Where the name ends
            in .bin, one token file, to which the parts are joined in the end.
        executor: what encodes; by default this machine's cores. All workers must see the output's folder. The ids are
            the same for any.
        start_over: forget what is there.
        num_workers: threads or processes of the default executor, by default one for each processor.
        shard_bytes: about how much text goes into one token file.
        errors: what to do about bytes that are not UTF-8: "strict" raises, "replace" encodes U+FFFD for them.
        specials_as_text: whether special tokens in the text are text like any other.
        progress: whether to show a progress bar.

    Returns:
        What the index, or the sidecar, says of all ids.

    Raises:
        ValueError: the text is not UTF-8 or needs a byte that the vocabulary lacks, or the folder holds other work.
        OSError: a file cannot be read or written; or workers died (ChildProcessError).
    """
    output = Path(output)
    num_workers = default_num_workers() if num_workers is None else num_workers
    for name, value in [("num_workers", num_workers), ("shard_bytes", shard_bytes)]:
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    sources = sources_of(inputs)
    pieces = tokenizer.pieces_of(sources, errors, specials_as_text)
    work = {
        "kind": "tokens",
        **fingerprint_of(pieces),
        "tokenizer": tokenizer.fingerprint,
        "errors": errors,
        "specials_as_text": specials_as_text,
        "shard_bytes": shard_bytes,
    }
    is_one_file = output.suffix == ".bin"
    with WorkFolder(output.with_suffix(".parts") if is_one_file else output, work, start_over=start_over) as folder:
        tokenizer.save(folder.path / _TOKENIZER)
        _tokenizers[tokenizer.fingerprint] = tokenizer
        shards = cut(pieces, shard_bytes)
        threads = tokenizer.runs_in_threads(sum(piece.num_bytes for piece in pieces))
        num_threads = 1 if executor is not None else max(1, num_workers // len(shards))
        with progress_bar(progress, desc="encoding", total=known_bytes(pieces), unit="B", unit_scale=True) as advance:
            live = folder.until_stopped(advance) if executor is None and threads else None
            encode = partial(
                encode_shard,
                str(folder.path / _TOKENIZER),
                tokenizer.fingerprint,
                tokenizer.kernels,
                num_threads,
                errors,
                specials_as_text,
                live,
            )
            names = [f"{number:06}.bin" for number in range(len(shards))]
            if not all(map(folder.record, names)):
                (folder.path / INDEX_NAME).unlink(missing_ok=True)
            run_on = executor or default_executor(num_workers, len(shards), threads=threads)
            done = None if live else lambda record: advance(record["bytes"])
            advance(folder.bytes_done(names))
            folder.run(encode, [(name, (shard,)) for name, shard in zip(names, shards, strict=True)], run_on, done)
        folder.tidy()
        if not is_one_file:
            return write_index(folder.path / INDEX_NAME, names)
        with TokenFileWriter(output, tokenizer.vocab_size, tokenizer_fingerprint=tokenizer.fingerprint) as writer:
            for name in names:
                record = folder.record(name) or {}
                writer.write(open_tokens(folder.path / name), source_bytes=record["bytes"])
        shutil.rmtree(folder.path)
        return writer.info


def encode_shard(
    tokenizer_folder: str,
    fingerprint: str,
    kernels: bool | None,
    num_threads: int,
    errors: str,
    specials_as_text: bool,
    live: Callable[[int], object] | None,
    shard: Shard,
    path: str,
) -> Record:
    """Encode a shard into a token file; may run anywhere, any number of times."""
    if fingerprint not in _tokenizers:
        tokenizer = Tokenizer.load(tokenizer_folder)
        tokenizer.kernels = kernels
        if tokenizer.fingerprint != fingerprint:
            raise ValueError(f"the tokenizer in {tokenizer_folder!r} is not the one of this work; start it over")
        _tokenizers[fingerprint] = tokenizer
    info = _tokenizers[fingerprint].encode_shard(
        shard, path, num_threads, errors, specials_as_text, live or (lambda num_bytes: None)
    )
    return {
        "bytes": info.source_bytes,
        "count": info.count,
        "file_bytes": info.count * info.dtype.itemsize,
        "sha256": info.sha256,
    }
