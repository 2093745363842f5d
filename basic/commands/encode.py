"""Encode text of any size into token ids: `basic encode data/TinyStories-valid.txt runs/valid.bin`.

If the output is a folder, it gets several token files and an index (`basic encode "data/*.jsonl.zst" data/train`), and
--train-tokens of `basic train` takes the folder. The same command resumes an interrupted one.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from basic.common.errors import InvalidInputError
from basic.corpus.text_formats import DocumentOptions


@dataclass(frozen=True, kw_only=True)
class Options:
    paths: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="INPUT [INPUT ...] OUTPUT", help_behavior_hint="(required)"),
    ]
    """Inputs: UTF-8 text under any name, JSON lines (.jsonl, .ndjson, .json), either also as .gz, .zst, .xz or .bz2, or
    Parquet tables; files, globs in quotation marks, URLs (s3://bucket/*.jsonl.zst), or - for standard input, encoded in
    this order. Output, at the end: a token file NAME.bin, which gets a sidecar NAME.json, or a folder."""
    chat: bool = False
    """The inputs are conversations, JSON lines with "messages" (role and content). They are written with the
    tokenizer's chat template, or a plain one, and only the assistant's tokens are learned: NAME.mask says which."""
    tokenizer: Path = Path("runs/tokenizer")
    """The tokenizer: a folder that train-bpe wrote, a run, a tokenizer.json or a Hugging Face folder, or a
    rank file of tiktoken."""
    errors: Literal["strict", "replace"] = "strict"
    """Bytes that are not UTF-8: end with an error, or encode U+FFFD instead."""
    overwrite: bool = False
    """Token file: replace the one that exists. (A folder is resumed; see --start-over.)"""
    shard_bytes: int = 1 << 27
    """Output folder: approximate size of the text in one token file, in bytes."""
    start_over: bool = False
    """Delete what an earlier command wrote into the output folder, and encode everything again."""
    scheduler: str | None = None
    """Address of a Dask scheduler, such as tcp://10.0.0.1:8786, whose workers encode; all must see the output."""
    documents: tyro.conf.OmitArgPrefixes[DocumentOptions]


def main(options: Options) -> None:
    from basic.chat import encode_conversations
    from basic.common.files import make_folder
    from basic.corpus.sources import TextSource
    from basic.corpus.work_folder import dask_executor
    from basic.encoding import encode_file, encode_files
    from basic.Tokenizer import Tokenizer

    if len(options.paths) < 2:
        raise InvalidInputError("at least two paths are needed: INPUT [INPUT ...] OUTPUT")
    inputs, output = options.paths[:-1], Path(options.paths[-1])
    tokenizer = Tokenizer.load(options.tokenizer)
    make_folder(output.parent)
    start = time.perf_counter()
    sources = [TextSource(path, **asdict(options.documents)) for path in inputs]
    what, num_learned = (tokenizer, sources, output), None
    with dask_executor(options.scheduler) as executor:
        how: dict[str, Any] = {"executor": executor, "start_over": options.start_over, "progress": True}
        if options.chat:
            how |= {"end_of_text": options.documents.end_of_text, "on_bad_line": options.documents.on_bad_line}
            info, num_learned = encode_conversations(*what, overwrite=options.overwrite, **how)
        elif output.suffix == ".bin" and executor is None:
            info = encode_file(*what, errors=options.errors, overwrite=options.overwrite, progress=True)
        else:
            info = encode_files(*what, shard_bytes=options.shard_bytes, errors=options.errors, **how)
    seconds = time.perf_counter() - start
    print(f"text     {info.source_bytes:,} bytes, {info.source_bytes / seconds / 1e6:.2f} MB/s")
    print(f"tokens   {info.count:,}, {info.source_bytes / max(info.count, 1):.3f} bytes per token, {info.dtype}")
    if num_learned is not None:
        print(f"learned  {num_learned:,} tokens, those of the assistant; the others are context")
    print(
        f"saved as {output}, with its index"
        if output.is_dir()
        else f"saved as {output}{'' if num_learned is None else ', its .mask'} and {output.with_suffix('.json')}"
    )
