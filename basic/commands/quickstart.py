"""Train a tokenizer and a small Transformer in a few minutes, and write samples: `basic quickstart`.

The text is short stories from a probabilistic grammar. Their exact information content is known: no model can reach a
lower loss. All files are in one folder; that of an earlier quickstart is set aside. For a text of your own, see `basic
train --text`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from basic.common import command_line

TRAIN_STORIES, VALID_STORIES = 40_000, 1_000


@dataclass(frozen=True, kw_only=True)
class Options:
    output: Path = Path("runs/quickstart")
    """Folder for all files."""
    vocab_size: int = 2048
    """Size of the vocabulary: 256 bytes, the end-of-text token, and the merges."""
    steps: int = 2240
    """Training steps of 16 sequences of 128 tokens each."""
    seed: int = 0
    """Seed of the stories, the initial weights, the batches and the samples."""
    device: str = "auto"
    """cpu, cuda, mps ...; auto: the fastest one available."""


def main(options: Options) -> None:
    from basic.commands.show.report import leave_report
    from basic.common.files import make_folder, temporary_folder
    from basic.common.folder_lock import FolderLock
    from basic.training.run_folder import load_run_config, set_aside

    output = Path(os.path.realpath(options.output))
    is_there = output.exists() and any(output.iterdir())
    is_run = (output / "config.toml").is_file()
    if is_there and not (
        is_run and os.path.realpath(load_run_config(output).data.train_tokens) == str(output / "train.bin")
    ):
        raise FileExistsError(f"{options.output} holds other files than a quickstart's; give another folder")
    make_folder(output.parent)
    with temporary_folder(output) as folder:
        make(options, folder)
        if is_there:
            FolderLock(output).close()  # a process that writes the folder is an error
            print(f"\nthe quickstart before is now in {os.path.relpath(set_aside(output))}")
        os.rename(folder, output)
    leave_report(options.output)
    output = options.output
    print(f"\nwrote {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    print(f"its curves, samples and settings as a page: {output / 'report.html'}; open it in any browser")


def make(options: Options, folder: Path) -> None:
    """Make all files in a new folder, and print the results."""
    from basic.analysis.evaluation import compare_with_entropy
    from basic.analysis.plotting import plot_losses
    from basic.commands.prepare_text import END, tokenize
    from basic.corpus.train_valid import write_stories
    from basic.generation.text import complete
    from basic.tokens.opening import open_tokens, read_info
    from basic.training.loop import train
    from basic.training.parallel.devices import choose_device
    from basic.training.records.metrics import encode_record, read_metrics

    # What is wrong with the options is said before the stories are drawn.
    choose_device(options.device)
    configure(options, options.vocab_size)
    stories = write_stories(folder, TRAIN_STORIES, VALID_STORIES, seed=options.seed, separator=END, progress=True)
    # Without kernels: compiling them would take longer than these few megabytes.
    tokenizer, _ = tokenize(folder, options.vocab_size, kernels=False, progress=True)
    tokens = open_tokens(folder / "train.bin"), open_tokens(folder / "valid.bin")
    config = configure(options, tokenizer.vocab_size)
    try:
        model = train(config, *tokens, folder, tokenizer=tokenizer, progress=True).model
    except KeyboardInterrupt:  # the folder becomes the output only when it is complete, so its run cannot be resumed
        raise KeyboardInterrupt("stopped; `basic quickstart` begins from the start again") from None
    records, info = read_metrics(folder / "metrics.jsonl"), read_info(folder / "valid.bin")
    loss, exact = records[-1]["valid_loss"], [story.nats for story in stories]
    bits_per_byte = loss / math.log(2) * info.count / info.source_bytes
    print(f"\nvalidation loss {loss:.3f} nats per token, {bits_per_byte:.3f} bits per byte, of sampled sequences, each")
    print("a story and the beginning of the next one; beginnings have more information than ends")
    documents = [tokenizer.encode(story.text) for story in stories]
    comparison = compare_with_entropy(model, documents, exact, tokens[0], tokenizer.special_token_ids[END])
    print(comparison)
    floor_nats, end_nats = sum(exact) / info.count, None
    if comparison.num_fitting:
        end_nats = floor_nats * comparison.model / comparison.exact
        print(
            f"per token of these documents, the exact information is {floor_nats:.3f} nats, this model {end_nats:.3f}"
        )
    nats = {"entropy_nats": floor_nats, "loss_nats": end_nats}
    with open(folder / "metrics.jsonl", "ab") as log:  # reports and plots of the run draw it
        log.write(encode_record({"kind": "source", "step": records[-1]["step"], **nats}))
    plot_losses({options.output.name: records}, folder / "loss.png", floor_nats=floor_nats, end_nats=end_nats)
    samples = complete(model, tokenizer, [END] * 8, 256, temperature=0.7, top_p=0.95, seed=options.seed)
    (folder / "samples.txt").write_text("\n\n".join(map(str.strip, samples)) + "\n", encoding="utf-8")
    for number, sample in enumerate(samples[:2], 1):
        command_line.print_text(f"\nsample {number}: {sample.strip()}")


def configure(options: Options, vocab_size: int):
    """Fill the options into configs/quickstart.toml."""
    from basic.common.config_files import INCLUDED, load_config
    from basic.training.settings import DataConfig, RunConfig

    config = load_config(INCLUDED / "configs" / "quickstart.toml", RunConfig)
    train = replace(config.train, steps=options.steps, seed=options.seed, device=options.device)
    train_tokens, valid_tokens, tokenizer = (
        f"{options.output}/{name}" for name in ("train.bin", "valid.bin", "tokenizer")
    )
    data = DataConfig(train_tokens=train_tokens, valid_tokens=valid_tokens, tokenizer=tokenizer)
    return RunConfig(model=replace(config.model, vocab_size=vocab_size), train=train, data=data)
