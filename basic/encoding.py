"""Text of any size into token files, on one machine or many.

    stage             what it reads     what it writes, to be kept                its memory
    encode a shard    128 MB of text    its ids, with their sidecar               some chunks and a cache
    write the index   the sidecars      index.json: files, counts, checksums      a line for each shard

`encode_file` writes one token file in one go. `encode_files` writes a dataset of many, whose folder is a work folder
(`basic.corpus.work_folder`): the same call resumes an interrupted one with the shards that have no file yet. The folder
also holds the tokenizer, from which each worker loads its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

from basic.bpe.arrays import InvalidByteError
from basic.common.progress import default_num_workers, progress_bar
from basic.corpus.counting import default_executor
from basic.corpus.shards import SHARD_BYTES, Shard, ShardChunks, cut, fingerprint_of, known_bytes, text_of, whole
from basic.corpus.sources import Inputs, TextSource, check_separator, sources_of
from basic.corpus.work_folder import Record, WorkFolder
from basic.Tokenizer import Tokenizer
from basic.tokens.flat_file import TokenFileWriter
from basic.tokens.index import INDEX_NAME, write_index
from basic.tokens.info import TokenFileInfo

_TOKENIZER = "tokenizer"

# The tokenizers that this process has loaded, by fingerprint.
_tokenizers: dict[str, Tokenizer] = {}


def encode_file(
    tokenizer: Tokenizer,
    inputs: Inputs,
    output_path: str | os.PathLike,
    *,
    num_threads: int | None = None,
    errors: str = "strict",
    specials_as_text: bool = False,
    progress: bool = False,
) -> TokenFileInfo:
    """Encode text of any size into one token file, in bounded memory.

    Args:
        inputs: text in UTF-8, plain or in one of the forms of `basic.corpus.sources`: a file, a glob, a URL, or several
            of them; their ids come one after the other, as `encode_files` says.
        output_path: of the token file, `*.bin`; it and its sidecar appear when they are complete.
        num_threads: by default one for each processor that this process may use; the result is the same.
        errors: what to do about bytes that are not UTF-8: "strict" raises, "replace" encodes U+FFFD for them.
        specials_as_text: whether special tokens in the text are text like any other.
        progress: whether to show a progress bar.

    Returns:
        What the sidecar says, with `source_bytes`, the size of the text.

    Raises:
        ValueError: the text is not UTF-8 (the byte offset is named), or needs a byte that the vocabulary lacks; or an
            input and the output are the same file.
        OSError: a file cannot be read or written.
    """
    num_threads = default_num_workers() if num_threads is None else num_threads
    if num_threads < 1:
        raise ValueError(f"num_threads={num_threads} must be at least 1")
    sources = sources_of(inputs)
    for source in sources:
        if os.path.exists(output_path) and not source.is_remote and os.path.samefile(source, output_path):
            raise ValueError(f"{os.fspath(output_path)!r} is the text itself; give another output_path")
    shard = _checked_inputs(tokenizer, sources, errors, specials_as_text)
    with progress_bar(progress, desc="encoding", total=known_bytes(shard), unit="B", unit_scale=True) as advance:
        return _encode_shard(tokenizer, shard, output_path, num_threads, errors, specials_as_text, advance)


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
        inputs: text in UTF-8, plain or of those of `basic.corpus.sources`: a file, a glob, a URL, or several of them;
            their ids come one after the other, with nothing between, but JSON lines begin with what separates their
            documents. One that is given twice is encoded twice.
        output: the folder of the dataset, which `basic.tokens.opening.open_tokens` opens as one array.
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
    if output.suffix == ".bin":
        raise ValueError(f"{output} names one token file, but a dataset is a folder: give its name, or use encode_file")
    pieces = _checked_inputs(tokenizer, sources_of(inputs), errors, specials_as_text)
    work = {
        "kind": "tokens",
        **fingerprint_of(pieces),
        "tokenizer": tokenizer.fingerprint,
        "errors": errors,
        "specials_as_text": specials_as_text,
        "shard_bytes": shard_bytes,
    }
    with WorkFolder(output, work, start_over=start_over) as folder:
        tokenizer.save(folder.path / _TOKENIZER)
        _tokenizers[tokenizer.fingerprint] = tokenizer
        shards = cut(pieces, shard_bytes)
        threads = tokenizer.uses_kernels(sum(piece.num_bytes for piece in pieces))
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
        return write_index(folder.path / INDEX_NAME, names)


def _checked_inputs(tokenizer: Tokenizer, sources: list[TextSource], errors: str, specials_as_text: bool) -> Shard:
    """The inputs as one shard, checked like the other arguments."""
    if errors not in ("strict", "replace"):
        raise ValueError(f"errors={errors!r} must be 'strict' or 'replace'")
    for source in sources:
        check_separator(source, () if specials_as_text else tokenizer.special_token_ids)
    return tuple(map(whole, sources))


def _encode_shard(
    tokenizer: Tokenizer,
    shard: Shard,
    output_path: str | os.PathLike,
    num_threads: int,
    errors: str,
    specials_as_text: bool,
    advance: Callable[[int], object],
) -> TokenFileInfo:
    """Encode a shard into a token file; `advance` gets the bytes that are done."""
    num_bytes = sum(piece.num_bytes for piece in shard)
    num_mapped_bytes = sum(piece.num_bytes for piece in shard if piece.is_mapped)
    special = tokenizer.active_special_tokens(specials_as_text)
    with TokenFileWriter(output_path, tokenizer.vocab_size, tokenizer_fingerprint=tokenizer.fingerprint) as writer:

        def done(num_bytes: int) -> None:
            writer.write((), source_bytes=num_bytes)
            advance(num_bytes)

        if tokenizer.uses_kernels(num_bytes, num_mapped_bytes):
            chunks = ShardChunks(shard, special, errors=errors)
            try:
                for ids, chunk_bytes in tokenizer.encode_chunks(
                    chunks, num_threads=num_threads, errors=errors, specials_as_text=specials_as_text
                ):
                    chunks.done()
                    writer.write(ids)
                    done(chunk_bytes)
            except InvalidByteError as error:
                raise chunks.explain(error) from None
        else:
            for piece in shard:
                text = text_of(piece, special, tokenizer.compiled_pattern, errors=errors, read=done)
                for ids in tokenizer.encode_stream(text, specials_as_text=specials_as_text):
                    writer.write(ids)
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
    info = _encode_shard(
        _tokenizers[fingerprint], shard, path, num_threads, errors, specials_as_text, live or (lambda num_bytes: None)
    )
    return {
        "bytes": info.source_bytes,
        "count": info.count,
        "file_bytes": info.count * info.dtype.itemsize,
        "sha256": info.sha256,
    }
