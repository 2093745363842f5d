"""Encode text of any size into token files, on one machine or many.

    stage             reads           writes                                    memory
    encode a shard    128 MB of text  a token file with its sidecar             some chunks and a cache
    write the index   the sidecars    index.json: files, counts, checksums      a record for each shard

`encode_file` writes one token file. `encode_files` writes a dataset of several, whose folder is a work folder
(`basic.corpus.work_folder`): the same call resumes after an interruption, with the shards that have no file yet. The
folder also holds the tokenizer, which each worker process loads from there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from basic.bpe.arrays import InvalidByteError
from basic.bpe.compiled import KernelEncoder
from basic.common.arguments import check_errors_option, check_size
from basic.common.errors import DamagedFileError, InvalidInputError, WrongTokenizerError
from basic.common.files import is_unfinished
from basic.common.outputs import Output, check_outputs, reserved_outputs
from basic.common.progress import default_num_workers, progress_bar, resolve_num_threads
from basic.corpus.documents import SkippedLines, warn_of_skipped
from basic.corpus.shards import (
    KERNEL_CHUNK_BYTES,
    SHARD_BYTES,
    SegmentGroup,
    Shard,
    ShardChunks,
    boundaries_fingerprint,
    entire_source,
    group_by_special_tokens,
    inputs_fingerprint,
    kernels_for,
    read_segment,
    split_into_shards,
    total_text_bytes,
)
from basic.corpus.sources import Inputs, TextSource, check_can_be_divided, check_separator, expand_inputs
from basic.corpus.work_folder import MANIFEST_NAME, Record, WorkFolder, is_work_folder, local_executor
from basic.Tokenizer import Tokenizer
from basic.tokens.flat_file import TokenFileWriter
from basic.tokens.index import INDEX_NAME, read_index, write_index
from basic.tokens.info import TokenFileInfo, mask_path, read_sidecar, sidecar_path, token_file_outputs

__all__ = ["encode_file", "encode_files"]

_TOKENIZER = "tokenizer"

# The tokenizers that this process has loaded, by fingerprint.
_tokenizers: dict[str, Tokenizer] = {}


@dataclass(frozen=True, kw_only=True)
class ShardEncoding:
    """How one shard is encoded; sent to the workers.

    Attributes:
        advance: called with the bytes that have been encoded; only for workers that are threads of this process.
    """

    num_threads: int
    errors: str
    specials_as_text: bool
    chunk_bytes: int = KERNEL_CHUNK_BYTES
    advance: Callable[[int], object] | None = None

    def __post_init__(self) -> None:
        check_errors_option(self.errors)


@dataclass(frozen=True, kw_only=True)
class SavedTokenizer:
    """The tokenizer in the folder of a dataset; each worker process loads it once."""

    folder: str
    fingerprint: str
    kernels: bool | None

    def load(self) -> Tokenizer:
        if self.fingerprint not in _tokenizers:
            tokenizer = Tokenizer.load(self.folder)
            tokenizer.kernels = self.kernels
            if tokenizer.fingerprint != self.fingerprint:
                raise WrongTokenizerError(
                    f"the tokenizer in {self.folder!r} is not the one of this dataset: encode with start_over=True"
                )
            _tokenizers[self.fingerprint] = tokenizer
        return _tokenizers[self.fingerprint]


def encode_file(
    tokenizer: Tokenizer,
    inputs: Inputs,
    output_path: str | os.PathLike,
    *,
    num_threads: int | None = None,
    errors: str = "strict",
    specials_as_text: bool = False,
    progress: bool = False,
    chunk_bytes: int = KERNEL_CHUNK_BYTES,
    overwrite: bool = True,
) -> TokenFileInfo:
    """Encode text of any size into one token file, in bounded memory.

    Args:
        inputs: text in UTF-8, in any form of `basic.corpus.sources`: a file, a glob, a URL, "-" for standard input, or
            several of them, or an iterator of documents. Their ids are concatenated as in `encode_files`.
        output_path: path of the token file, `*.bin`. It appears with its sidecar when both are complete.
        num_threads: by default the number of processors; the result is the same.
        errors: for bytes that are not UTF-8, or that have no token: "strict" raises, "replace" encodes U+FFFD.
        specials_as_text: whether special tokens in the text are encoded like any other text.
        chunk_bytes: the approximate amount of text for one call of a kernel; the result is the same.
        overwrite: replace the token file and the sidecar that exist; other files are never replaced.

    Returns:
        The contents of the sidecar; `source_bytes` is the size of the text.

    Raises:
        InvalidInputError: the text is not UTF-8 (the message names the byte offset) or has a byte without a token, or
            an input is also the output or its sidecar.
        FileExistsError: the output or its sidecar exists, and is not a token file or not to be overwritten.
        BlockingIOError: another process writes the output.
        DamagedFileError: a compressed input is damaged.
        OSError: a file cannot be read or written.
    """
    encoding = ShardEncoding(
        num_threads=resolve_num_threads(num_threads),
        errors=errors,
        specials_as_text=specials_as_text,
        chunk_bytes=chunk_bytes,
    )
    sources = expand_inputs(inputs)
    # What a killed process left is replaced without being asked.
    replace_existing = overwrite or is_unfinished(sidecar_path(output_path))
    with reserved_outputs(token_file_outputs(output_path), inputs=sources, overwrite=replace_existing):
        shard = _entire_sources(sources, tokenizer)
        total = total_text_bytes(shard)
        with progress_bar(progress, desc="encoding", total=total, unit="B", unit_scale=True) as advance:
            info, skipped = _write_token_file(tokenizer, encoding, shard, output_path, advance)
    warn_of_skipped([skipped.as_record()])
    return info


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
    task: Callable[..., Record] | None = None,
    work: Mapping[str, Any] | None = None,
) -> TokenFileInfo:
    """Encode text of any size into a token dataset; the same call resumes after an interruption.

    Args:
        inputs: text in UTF-8, in any form of `basic.corpus.sources`: a file, a glob, a URL, or several of them. Their
            ids are concatenated with nothing between them; documents after another input begin with their separator.
            An input that is given twice is encoded twice.
        output: folder of the dataset, which `basic.tokens.opening.open_tokens` opens as one array.
        executor: runs the tasks; by default threads or processes on this machine. All workers must see the output
            folder. The ids are the same for any executor.
        start_over: delete what the folder holds.
        num_workers: threads or processes of the default executor; by default the number of processors.
        shard_bytes: the approximate amount of text for one token file.
        errors, specials_as_text, progress: as for `encode_file`.
        task, work: instead of `encode_shard`, for inputs that cannot be divided, and what else its results depend on;
            see `basic.chat`.

    Returns:
        The contents of the index about all files together.

    Raises:
        InvalidInputError: the text is not UTF-8 or has a byte without a token, the folder holds other work, or an input
            is also an output.
        FileExistsError: the folder holds files with the names of outputs that are not of a dataset.
        DamagedFileError: a compressed input is damaged.
        OSError: a file cannot be read or written, or workers died (ChildProcessError).
    """
    output = Path(output)
    num_workers = check_size("num_workers", default_num_workers() if num_workers is None else num_workers)
    shard_bytes = check_size("shard_bytes", shard_bytes)
    if output.suffix == ".bin":
        raise InvalidInputError(
            f"{output} names one token file, but a dataset is a folder: give its name, or use encode_file"
        )
    check_can_be_divided(inputs)
    sources = expand_inputs(inputs)
    check_outputs(_dataset_outputs(output, 0), inputs=sources, overwrite=True)
    segments = _entire_sources(sources, tokenizer) if task is None else tuple(map(entire_source, sources))
    # Where a file may be divided is known only if its text is not changed.
    whole = task is not None or tokenizer.changes_text(errors)
    shards = [(segment,) for segment in segments] if whole else split_into_shards(segments, shard_bytes)
    check_outputs(_dataset_outputs(output, len(shards), with_masks=task is not None), inputs=sources, overwrite=True)
    work = {
        "kind": "tokens",
        **(work or {}),
        **inputs_fingerprint(segments),
        "tokenizer": tokenizer.fingerprint,
        **boundaries_fingerprint(tokenizer.compiled_pattern),
        "errors": errors,
        "specials_as_text": specials_as_text,
        "shard_bytes": shard_bytes,
    }
    kernels = task is None and _kernel_encoder(tokenizer, segments) is not None
    with (
        WorkFolder(output, work, start_over=start_over) as folder,
        progress_bar(progress, desc="encoding", total=total_text_bytes(segments), unit="B", unit_scale=True) as advance,
    ):
        # Threads of this process report progress chunk by chunk, other workers shard by shard.
        in_threads = executor is None and kernels
        encoding = ShardEncoding(
            num_threads=max(1, num_workers // len(shards)) if executor is None else 1,
            errors=errors,
            specials_as_text=specials_as_text,
            advance=folder.cancellable(advance) if in_threads else None,
        )
        saved = SavedTokenizer(
            folder=str(folder.path / _TOKENIZER), fingerprint=tokenizer.fingerprint, kernels=tokenizer.kernels
        )
        tokenizer.save(saved.folder)
        _tokenizers[saved.fingerprint] = tokenizer
        tasks = [(_shard_name(index), (shard,)) for index, shard in enumerate(shards)]
        names = [name for name, _ in tasks]
        for name in names:
            if not _has_its_sidecar(folder, name):
                folder.discard(name)
        if not all(map(folder.finished_record, names)):
            (folder.path / INDEX_NAME).unlink(missing_ok=True)
        advance(folder.bytes_done(names))
        folder.run(
            partial(task or encode_shard, saved, encoding),
            tasks,
            executor or local_executor(num_workers, len(shards), threads=kernels),
            None if in_threads else lambda record: advance(record["bytes"]),
        )
        folder.remove_temporary_files()
        warn_of_skipped(folder.records(names))
        return write_index(folder.path / INDEX_NAME, names)


def _dataset_outputs(folder: Path, num_shards: int, *, with_masks: bool = False) -> list[Output]:
    def is_ours(existing: Path) -> bool:
        index = folder / INDEX_NAME
        return is_work_folder(folder) or (index.is_file() and bool(read_index(index)))

    shards = [_shard_name(index) for index in range(num_shards)]
    suffixes = (".bin", ".json", ".mask") if with_masks else (".bin", ".json")
    names = [MANIFEST_NAME, INDEX_NAME, *(Path(shard).with_suffix(each).name for shard in shards for each in suffixes)]
    return [
        *(Output(folder / name, "a file of a token dataset", is_ours) for name in names),
        Output(folder / _TOKENIZER, "the tokenizer of a token dataset", is_ours, is_folder=True),
    ]


def _has_its_sidecar(folder: WorkFolder, name: str) -> bool:
    """Whether the sidecar of a finished token file says what the record of its task says; the index is made of both."""
    record = folder.finished_record(name)
    try:
        info = read_sidecar(folder.path / name)
    except (DamagedFileError, FileNotFoundError):
        return False
    has_mask = info.mask_sha256 is None or mask_path(folder.path / name).is_file()
    return record is not None and has_mask and (info.sha256, info.count) == (record["sha256"], record.get("count"))


def _shard_name(index: int) -> str:
    return f"{index:06}.bin"


def _entire_sources(sources: list[TextSource], tokenizer: Tokenizer) -> Shard:
    for source in sources:
        check_separator(source, tokenizer.special_token_ids)
    return tuple(map(entire_source, sources))


def _kernel_encoder(tokenizer: Tokenizer, segments: Shard) -> KernelEncoder | None:
    return None if tokenizer.kernels is False else kernels_for(segments, tokenizer.kernel_encoder)


def encode_shard(tokenizer: SavedTokenizer, encoding: ShardEncoding, shard: Shard, path: str) -> Record:
    """Encode a shard into a token file. A worker can run this anywhere, and more than once."""
    advance = encoding.advance or (lambda num_bytes: None)
    return shard_record(*_write_token_file(tokenizer.load(), encoding, shard, path, advance))


def shard_record(info: TokenFileInfo, skipped: SkippedLines) -> Record:
    """What a work folder records about the token file of a shard."""
    return {
        "bytes": info.source_bytes,
        **skipped.as_record(),
        "count": info.count,
        "file_bytes": info.count * info.dtype.itemsize,
        "sha256": info.sha256,
    }


def _write_token_file(
    tokenizer: Tokenizer,
    encoding: ShardEncoding,
    shard: Shard,
    path: str | os.PathLike,
    advance: Callable[[int], object],
) -> tuple[TokenFileInfo, SkippedLines]:
    """Encode a shard; return the contents of the sidecar, and the lines or rows that were left out."""
    skipped, encoder = SkippedLines(), _kernel_encoder(tokenizer, shard)
    with TokenFileWriter(path, tokenizer.vocab_size, tokenizer_fingerprint=tokenizer.fingerprint) as writer:

        def on_read(num_bytes: int) -> None:
            writer.write((), source_bytes=num_bytes)
            advance(num_bytes)

        encode = _encode_plain if encoder is None else partial(_encode_with_kernels, encoder)
        for group in group_by_special_tokens(shard, tokenizer.active_special_tokens(encoding.specials_as_text)):
            for ids in encode(tokenizer, encoding, group, on_read, skipped):
                writer.write(ids)
    return writer.info, skipped


def _encode_with_kernels(
    encoder: KernelEncoder,
    tokenizer: Tokenizer,
    encoding: ShardEncoding,
    group: SegmentGroup,
    on_read: Callable[[int], object],
    skipped: SkippedLines,
) -> Iterator[np.ndarray]:
    """The ids of segments, chunk by chunk."""
    errors, special_tokens, mark = encoding.errors, group.special_tokens, None
    if group.separator is not None:
        mark = special_tokens.longest_first_bytes[0], tokenizer.special_token_ids[group.separator]
    changes = tokenizer.text_changes(special_tokens, errors)
    chunks = ShardChunks(
        group.segments,
        special_tokens,
        tokenizer.compiled_pattern,
        errors=errors,
        chunk_bytes=encoding.chunk_bytes,
        on_skip=skipped,
        change=changes.apply_to_stream if changes else None,
        on_read=on_read if changes else lambda num_bytes: None,
    )
    try:
        for ids, chunk_bytes in encoder.encode_chunks(
            chunks, encoding.specials_as_text, encoding.num_threads, errors=errors, document_mark=mark
        ):
            chunks.mark_done()
            yield ids
            if not changes:
                on_read(chunk_bytes)
    except InvalidByteError as error:
        raise chunks.describe_error(error) from None


def _encode_plain(
    tokenizer: Tokenizer,
    encoding: ShardEncoding,
    group: SegmentGroup,
    on_read: Callable[[int], object],
    skipped: SkippedLines,
) -> Iterator[list[int]]:
    """The plain version of the kernels."""
    errors, pattern = encoding.errors, tokenizer.compiled_pattern
    for segment in group.segments:
        text = read_segment(segment, group.special_tokens, pattern, errors=errors, on_read=on_read, on_skip=skipped)
        if group.separator is None:
            yield from tokenizer.encode_stream(text, specials_as_text=encoding.specials_as_text, errors=errors)
        else:
            yield from tokenizer.encode_documents(text, group.separator, errors=errors)
