"""Train a tokenizer on text of any size: `uv run local/train_bpe.py data/TinyStories-train.txt`."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from basic.common import command_line


@dataclass(frozen=True, kw_only=True)
class Options:
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT [INPUT ...]")]
    """UTF-8 text under any name, or JSON lines (.jsonl, .ndjson, .json), also as .gz, .zst, .xz or .bz2; files, globs
    in quotation marks, or URLs (s3://bucket/*.jsonl.zst)."""
    vocab_size: int = 10_000
    """Size of the vocabulary: the special tokens, the 256 bytes and the merges."""
    special_tokens: tuple[str, ...] = ("<|endoftext|>",)
    """Strings that are never split; each is one token. No merge crosses them."""
    field: str = "text"
    """JSON lines: the field that holds the text of the document."""
    end_of_text: str = "<|endoftext|>"
    """JSON lines: the special token inserted between documents."""
    output: Path = Path("runs/tokenizer")
    """Folder for vocab.json, merges.txt and special_tokens.json."""
    overwrite: bool = False
    """Replace the tokenizer that --output holds. Token files made with it need it; encode them again."""
    num_workers: int | None = None
    """Threads that count; None: one for each processor. Does not change the result."""
    min_count: int = 1
    """Ignore pre-tokens that occur less often than this in the complete text; saves memory on very large texts."""
    work: Path | None = None
    """Work folder with the counts of finished shards: the same command resumes an interrupted one, and a command with
    another --vocab-size uses the counts again. None: no work folder, or OUTPUT.work with --scheduler."""
    start_over: bool = False
    """Delete the counts in --work and count again."""
    scheduler: str | None = None
    """Address of a Dask scheduler, such as tcp://10.0.0.1:8786, whose workers count; all must see --work."""


def main(options: Options) -> None:
    from basic.common.outputs import check_outputs
    from basic.corpus.sources import TextSource, expand_inputs
    from basic.corpus.work_folder import dask_executor
    from basic.Tokenizer import Tokenizer, tokenizer_outputs
    from basic.train_bpe import train_bpe

    sources = expand_inputs([TextSource(path, options.field, options.end_of_text) for path in options.inputs])
    check_outputs(tokenizer_outputs(options.output), inputs=sources, overwrite=options.overwrite)
    start = time.perf_counter()
    work = options.work or (options.output.with_name(options.output.name + ".work") if options.scheduler else None)
    with dask_executor(options.scheduler) as executor:
        vocab, merges = train_bpe(
            sources,
            options.vocab_size,
            options.special_tokens,
            executor=executor,
            work_folder=work,
            start_over=options.start_over,
            min_count=options.min_count,
            num_workers=options.num_workers,
            progress=True,
        )
    seconds = time.perf_counter() - start
    tokenizer = Tokenizer(vocab, merges, options.special_tokens)
    check_outputs(tokenizer_outputs(options.output), overwrite=options.overwrite)  # another process may have written it
    tokenizer.save(options.output)

    special = {token.encode() for token in options.special_tokens}
    longest = max((token for token in vocab.values() if token not in special), key=len)
    print(f"trained in    {seconds:.1f} s, {peak_memory()}")
    print(f"tokens        {tokenizer.vocab_size:,} ({len(merges):,} merges)")
    print(f"longest token {longest.decode(errors='replace')!r}, {len(longest)} bytes")
    print(f"saved in      {options.output}/ (vocab.json, merges.txt, special_tokens.json)")
    if tokenizer.vocab_size < options.vocab_size:
        print(f"note: the text has no more pairs to merge, so the vocabulary is smaller than {options.vocab_size:,}")


def peak_memory() -> str:
    """Describe the peak memory of this process and of its workers."""
    try:
        import resource
    except ImportError:  # on Windows
        return "peak memory unknown"
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    this, worker = (
        resource.getrusage(who).ru_maxrss * unit_bytes / 1e6 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return f"peak memory {this:.0f} MB" + (f" and {worker:.0f} MB a worker" if worker else "")


if __name__ == "__main__":
    command_line.run(lambda: main(command_line.parse(Options, __doc__)))
