"""From text to a talking model in a few minutes: tokenizer, token files, a small Transformer, stories.

Without --input it learns from little stories drawn from a grammar, whose exact information is known: the least nats
that any model can need for them. Everything is left in one folder, in place of an earlier quickstart's.
"""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

END = "<|endoftext|>"
TRAIN_STORIES, VALID_STORIES = 40_000, 1_000


@dataclass(frozen=True, kw_only=True)
class Options:
    input: Path | None = None
    """UTF-8 text to learn from, with <|endoftext|> between documents if it has them; None for the embedded stories."""
    output: Path = Path("runs/quickstart")
    """Folder for everything that is made."""
    vocab_size: int = 2048
    """Tokens of the tokenizer: 256 bytes, the end of text, and merges."""
    steps: int = 1500
    """Training steps of 16 sequences of 128 tokens each."""
    seed: int = 0
    """Of the stories, the initial weights, the batches and the samples."""
    device: str = "auto"
    """cpu, cuda, mps ...; auto takes the best there is."""


def main(options: Options) -> None:
    from basic.corpus import split_text, write_stories
    from basic.generation import complete
    from basic.plotting import plot_losses
    from basic.runs import read_metrics
    from basic.token_files import open_tokens, read_info
    from basic.Tokenizer import Tokenizer
    from basic.train_bpe import train_bpe
    from basic.training import train

    if options.output.exists() and not (options.output / "config.toml").is_file():
        raise FileExistsError(f"{options.output} is there and is not a run; choose another --output")
    # Made beside the earlier result, which is replaced when the new one is whole.
    folder = options.output.with_name(options.output.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if options.input is None:
        stories = write_stories(folder, TRAIN_STORIES, VALID_STORIES, seed=options.seed, separator=END, progress=True)
    else:
        split_text(options.input, folder, separator=END)
    tokenizer = Tokenizer(*train_bpe(folder / "train.txt", options.vocab_size, [END], progress=True), [END])
    for part in ("train", "valid"):
        tokenizer.encode_file(folder / f"{part}.txt", folder / f"{part}.bin", progress=True)
    tokens = open_tokens(folder / "train.bin"), open_tokens(folder / "valid.bin")
    run = train(configure(options, tokenizer.vocab_size), *tokens, folder, tokenizer=tokenizer, progress=True)

    records, info = read_metrics(folder / "metrics.jsonl"), read_info(folder / "valid.bin")
    loss, floor = records[-1]["valid_loss"], None
    bits_per_byte = loss / math.log(2) * info.count / info.source_bytes
    print(f"\nvalidation loss {loss:.3f} nats a token, {bits_per_byte:.3f} bits per byte")
    if options.input is None:
        floor = sum(story.nats for story in stories) / info.count
        compare_with_source(stories, run.model, tokenizer, tokens[0])
    plot_losses({options.output.name: records}, folder / "loss.png", floor_nats=floor)
    start = END if tokenizer.special_token_ids[END] in tokens[0] else "\n"
    samples = complete(run.model, tokenizer, [start] * 8, 256, temperature=0.9, top_p=0.95, seed=options.seed)
    (folder / "samples.txt").write_text("\n\n".join(map(str.strip, samples)) + "\n", encoding="utf-8")
    shutil.rmtree(options.output, ignore_errors=True)
    folder.rename(options.output)
    for number, sample in enumerate(samples[:2], 1):
        print(f"\nsample {number}: {sample.strip()}")
    names = sorted(path.name for path in options.output.iterdir())
    print(f"\neverything is in {options.output}: {', '.join(names)}")


def compare_with_source(stories, model, tokenizer, train_tokens) -> None:
    """Print what unseen stories hold, and what this model and a bigram model need for them."""
    from basic.evaluation import bigram_document_nats, document_nats

    end_id, context = tokenizer.special_token_ids[END], model.config.context_length
    encoded = [(story.nats, tokenizer.encode(story.text)) for story in stories]
    fitting = [(nats, ids) for nats, ids in encoded if len(ids) < context]
    if not fitting:
        print(f"no story fits into {context} tokens, so none can be scored; a larger --vocab-size makes them shorter")
        return
    documents = [ids for _, ids in fitting]
    exact = sum(nats for nats, _ in fitting) / len(fitting)
    ours = document_nats(model, documents, end_id).mean()
    bigram = bigram_document_nats(train_tokens, documents, end_id, tokenizer.vocab_size).mean()
    of_all = "" if len(fitting) == len(stories) else f" (of {len(stories):,}; the others do not fit into the context)"
    print(f"{len(fitting):,} unseen stories{of_all}, each from its start to its end, in nats a story:")
    print(f"  exact information {exact:7.2f}")
    print(f"  this model        {ours:7.2f}  ({ours / exact - 1:+.1%})")
    print(f"  a bigram model    {bigram:7.2f}  ({bigram / exact - 1:+.1%})")


def configure(options: Options, vocab_size: int):
    """The small run: on the stories, rows begin at a story's start, because windows cut inside miss the names."""
    from basic.model import ModelConfig
    from basic.runs import DataConfig, RunConfig, TrainConfig

    return RunConfig(
        model=ModelConfig(vocab_size=vocab_size, context_length=128, d_model=128, num_layers=2, num_heads=4),
        train=TrainConfig(
            steps=options.steps,
            batch_size=16,
            max_learning_rate=6e-3,
            min_learning_rate=1e-4,
            warmup_steps=100,
            rows="documents" if options.input is None else "windows",
            eval_interval=250,
            seed=options.seed,
            device=options.device,
        ),
        data=DataConfig(
            train_tokens=str(options.output / "train.bin"),
            valid_tokens=str(options.output / "valid.bin"),
            tokenizer=str(options.output / "tokenizer"),
        ),
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
