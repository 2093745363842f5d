"""Train a tokenizer on text of any size: `basic train-bpe data/TinyStories-train.txt`."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from basic.common.errors import InvalidInputError
from basic.common.progress import peak_memory
from basic.corpus.text_formats import DocumentOptions


@dataclass(frozen=True, kw_only=True)
class Options:
    inputs: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="INPUT [INPUT ...]", help_behavior_hint="(required)"),
    ]
    """UTF-8 text under any name, JSON lines (.jsonl, .ndjson, .json), either also as .gz, .zst, .xz or .bz2, or Parquet
    tables; files, globs in quotation marks, URLs (s3://bucket/*.jsonl.zst), or - for standard input."""
    vocab_size: int = 10_000
    """Size of the vocabulary: the special tokens, the 256 bytes and the merges."""
    special_tokens: tuple[str, ...] = ("<|endoftext|>",)
    """Strings that are never split; each is one token. No merge crosses them."""
    pattern: str | None = None
    """Finds the pre-tokens: a name (cl100k, llama3, ...) or a regular expression. None: GPT-2's, or --extend's."""
    max_token_bytes: int | None = None
    """Learn no token with more bytes. None: no limit."""
    extend: Path | None = None
    """Folder of a tokenizer to continue: it gets the special tokens that it lacks, and merges that are learned from the
    text, until it has --vocab-size tokens; its ids stay. None: train a new one."""
    errors: Literal["strict", "replace"] = "strict"
    """Bytes that are not UTF-8: end with an error, or read U+FFFD instead."""
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
    documents: tyro.conf.OmitArgPrefixes[DocumentOptions]


def main(options: Options) -> None:
    from basic.common.outputs import reserved_outputs
    from basic.corpus.sources import TextSource, expand_inputs
    from basic.corpus.work_folder import dask_executor
    from basic.pretokenization import resolve_pattern
    from basic.Tokenizer import Tokenizer
    from basic.tokenizer_files.our_folder import tokenizer_outputs
    from basic.train_bpe import learn_more_merges, train_bpe

    pattern = resolve_pattern(options.pattern)
    if options.extend and options.pattern:
        raise InvalidInputError("--extend keeps the pattern of its tokenizer: leave --pattern out")
    sources = expand_inputs([TextSource(path, **asdict(options.documents)) for path in options.inputs])
    start, vocab_size = time.perf_counter(), options.vocab_size
    work = options.work or (options.output.with_name(options.output.name + ".work") if options.scheduler else None)
    names = ("max_token_bytes", "start_over", "min_count", "errors", "num_workers")
    settings: dict[str, Any] = {name: getattr(options, name) for name in names}
    settings |= {"work_folder": work, "progress": True, "pattern": pattern}
    with (
        reserved_outputs(tokenizer_outputs(options.output), inputs=sources, overwrite=options.overwrite),
        dask_executor(options.scheduler) as executor,
    ):
        if options.extend is None:
            vocab, merges = train_bpe(sources, vocab_size, options.special_tokens, executor=executor, **settings)
            tokenizer = Tokenizer(vocab, merges, options.special_tokens, pattern=pattern)
        else:
            base = Tokenizer.load(options.extend).with_special_tokens(options.special_tokens)
            if vocab_size < len(base):
                raise InvalidInputError(f"--vocab-size {vocab_size} is less than the {len(base)} tokens of --extend")
            special, settings["pattern"] = list(base.special_token_ids), base.pattern
            merges = learn_more_merges(
                sources, vocab_size - len(base), base.used_merges.merges, special, executor=executor, **settings
            )
            tokenizer = base.with_merges(merges)
        tokenizer.save(options.output)

    special = {token.encode() for token in tokenizer.special_token_ids}
    longest = max((token for token in tokenizer.vocab.values() if token not in special), key=len)
    print(f"trained in    {time.perf_counter() - start:.1f} s, {peak_memory()}")
    print(f"tokens        {len(tokenizer):,} ({len(merges):,} {'' if options.extend is None else 'new '}merges)")
    print(f"longest token {longest.decode(errors='replace')!r}, {len(longest)} bytes")
    print(f"saved in      {options.output}/ (its files and their checksums)")
    if len(tokenizer) < vocab_size:
        print(f"note: the text has no more pairs to merge, so the vocabulary is smaller than {vocab_size:,}")
