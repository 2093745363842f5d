"""Encode text of any size into token ids: `uv run local/encode.py data/TinyStories-valid.txt runs/valid.bin`.

A folder as the output gets many token files and an index (`uv run local/encode.py "data/*.jsonl.zst" data/train`). It
is good for --train-tokens too, and the same command goes on where an interrupted one was.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from basic.common import command_line


@dataclass(frozen=True, kw_only=True)
class Options:
    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT [INPUT ...] OUTPUT")]
    """Text in UTF-8, of any size: .txt (or any name), .gz, .zst, .jsonl, .jsonl.gz or .jsonl.zst; files, globs in
    quotation marks, and URLs (s3://bucket/*.jsonl.zst). Their tokens come one after the other. Last, the token file to
    write, *.bin, with a .json of the same name beside it that says what is in it; or a folder."""
    tokenizer: Path = Path("runs/tokenizer")
    """Folder of the tokenizer, as local/train_bpe.py saves it."""
    field: str = "text"
    """Name of the string in each object of JSON lines that is the document."""
    end_of_text: str = "<|endoftext|>"
    """Special token to put between the documents of JSON lines."""
    shard_bytes: int = 1 << 27
    """About how much text goes into one token file of a folder."""
    start_over: bool = False
    """Forget what the folder holds."""
    scheduler: str | None = None
    """Address of a Dask scheduler, such as tcp://10.0.0.1:8786, whose workers encode; all must see the output."""


def main(options: Options) -> None:
    from basic.corpus.sources import TextSource
    from basic.corpus.work_folder import cluster
    from basic.encoding import encode_file, encode_files
    from basic.Tokenizer import Tokenizer

    if len(options.paths) < 2:
        raise ValueError("give the text and, last, where its tokens shall go: INPUT [INPUT ...] OUTPUT")
    inputs, output = options.paths[:-1], Path(options.paths[-1])
    tokenizer = Tokenizer.load(options.tokenizer)
    output.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    sources = [TextSource(path, options.field, options.end_of_text) for path in inputs]
    if output.suffix == ".bin" and options.scheduler is None:
        info = encode_file(tokenizer, sources, output, progress=True)
    else:
        with cluster(options.scheduler) as executor:
            info = encode_files(
                tokenizer,
                sources,
                output,
                executor=executor,
                start_over=options.start_over,
                shard_bytes=options.shard_bytes,
                progress=True,
            )
    seconds = time.perf_counter() - start
    print(f"text     {info.source_bytes:,} bytes, {info.source_bytes / seconds / 1e6:.2f} MB/s")
    print(f"tokens   {info.count:,}, {info.source_bytes / max(info.count, 1):.3f} bytes a token, {info.dtype}")
    print(
        f"saved as {output}, with its index"
        if output.is_dir()
        else f"saved as {output} and {output.with_suffix('.json')}"
    )


if __name__ == "__main__":
    command_line.run(lambda: main(tyro.cli(Options, description=__doc__)))
