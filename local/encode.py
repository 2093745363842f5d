"""Encode a text file into a file of token ids: `uv run local/encode.py data/TinyStories-valid.txt runs/valid.bin`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from basic import command_line


@dataclass(frozen=True, kw_only=True)
class Options:
    input: tyro.conf.Positional[Path]
    """Text file in UTF-8, of any size: .txt (or any name), .gz, .zst, .jsonl, .jsonl.gz or .jsonl.zst."""
    output: tyro.conf.Positional[Path]
    """Token file to write, *.bin; a .json of the same name beside it says what is in it."""
    tokenizer: Path = Path("runs/tokenizer")
    """Folder of the tokenizer, as local/train_bpe.py saves it."""
    field: str = "text"
    """Name of the string in each object of JSON lines that is the document."""
    end_of_text: str = "<|endoftext|>"
    """Special token to put between the documents of JSON lines."""


def main(options: Options) -> None:
    from basic.text_sources import TextSource
    from basic.token_files import sidecar_path
    from basic.Tokenizer import Tokenizer

    tokenizer = Tokenizer.load(options.tokenizer)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    source = TextSource(options.input, options.field, options.end_of_text)
    info = tokenizer.encode_file(source, options.output, progress=True)
    seconds = time.perf_counter() - start
    print(f"text     {info.source_bytes:,} bytes, {info.source_bytes / seconds / 1e6:.2f} MB/s")
    print(f"tokens   {info.count:,}, {info.source_bytes / max(info.count, 1):.3f} bytes a token, {info.dtype}")
    print(f"saved as {options.output} and {sidecar_path(options.output)}")


if __name__ == "__main__":
    command_line.run(lambda: main(tyro.cli(Options, description=__doc__)))
