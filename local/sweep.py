"""Train all runs of a sweep and compare them: `uv run local/sweep.py local/experiments/learning_rate.toml --small`.

Started again, it skips runs that have ended and goes on with one that was interrupted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from basic.common import command_line


@dataclass(frozen=True, kw_only=True)
class Options:
    sweeps: tyro.conf.Positional[tuple[Path, ...]]
    """TOML files that plan sweeps (basic/analysis/sweep.py shows how), such as local/experiments/learning_rate.toml."""
    small: bool = False
    """Their small editions, for a CPU; they learn from embedded stories, which are made if they are not there."""
    output: Path = Path("runs")
    """Folder for a folder a sweep."""
    plan: bool = False
    """Only say which runs there would be."""


def main(options: Options) -> None:
    from basic.analysis.sweep import outcome_table, plot_sweep, read_sweep, run_sweep

    if not options.sweeps:
        raise ValueError("no sweep given; name at least one file, such as local/experiments/learning_rate.toml")
    sweeps = {path.stem: read_sweep(path, small=options.small) for path in options.sweeps}
    for name, runs in sweeps.items():
        if options.plan:
            print(name, *(f"  {run.name}" for run in runs), sep="\n")
            continue
        folder = options.output / (f"{name}_small" if options.small else name)
        print(f"{name}: {len(runs)} runs in {folder}")
        outcomes = run_sweep(runs, folder, open_data, progress=True)
        picture = plot_sweep(runs, folder)
        print(f"\n{outcome_table(outcomes)}\nwrote {folder / 'table.md'}" + f" and {picture}" * bool(picture))


def open_data(data):
    """The token files and the tokenizer of a run; those of the stories are made where they are missing."""
    from basic.analysis.sweep import Data
    from basic.Tokenizer import Tokenizer
    from basic.tokens.opening import open_tokens

    folder = Path(data.train_tokens).parent
    if folder.name == "small_stories" and not (folder / "valid.bin").is_file():
        make_stories(folder)
    tokenizer = Tokenizer.load(data.tokenizer) if data.tokenizer else None
    made_by = None if tokenizer is None else tokenizer.fingerprint
    paths = data.train_tokens, data.valid_tokens
    return Data(*(open_tokens(path, dtype=data.dtype or None, made_by=made_by) for path in paths), tokenizer)


def make_stories(folder: Path, *, num_train: int = 20_000, num_valid: int = 400, vocab_size: int = 1024) -> None:
    """Write the embedded stories, train a tokenizer on them and encode them; valid.bin comes last."""
    from basic.corpus.train_valid import write_stories
    from basic.encoding import encode_file
    from basic.Tokenizer import Tokenizer
    from basic.train_bpe import train_bpe

    end = "<|endoftext|>"
    folder.mkdir(parents=True, exist_ok=True)
    write_stories(folder, num_train, num_valid, separator=end, progress=True)
    vocab, merges = train_bpe(folder / "train.txt", vocab_size, [end], kernels=False, progress=True)
    tokenizer = Tokenizer(vocab, merges, [end], kernels=False)
    tokenizer.save(folder / "tokenizer")
    for part in ("train", "valid"):
        encode_file(tokenizer, folder / f"{part}.txt", folder / f"{part}.bin", progress=True)


if __name__ == "__main__":
    command_line.run(lambda: main(tyro.cli(Options, description=__doc__)))
