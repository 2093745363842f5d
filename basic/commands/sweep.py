"""Train all runs of a sweep and compare them: `basic sweep learning_rate --small`.

The same command skips finished runs and resumes an interrupted one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from basic.common.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class Options:
    sweeps: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="SWEEP [SWEEP ...]", help_behavior_hint="(required)"),
    ]
    """TOML files of sweeps, whose format stands in basic/analysis/sweep.py, or names of those that are included:
    learning_rate, batch_size, ablations, architecture, optimizer, isoflop."""
    small: bool = False
    """Run the small versions, for a CPU, on embedded stories, which are generated if they do not exist."""
    output: Path = Path("runs")
    """Folder that gets one folder for each sweep."""
    plan: bool = False
    """Only print the names of the runs."""


def main(options: Options) -> None:
    from basic.analysis.sweep import plot_sweep, read_sweep, result_table, run_sweep
    from basic.analysis.sweep_plot import plot_final_losses

    if not options.sweeps:
        raise InvalidInputError("no sweep given; name at least one file, or an included one, such as learning_rate")
    sweeps = {path.stem: read_sweep(path, small=options.small) for path in options.sweeps}
    for name, runs in sweeps.items():
        if options.plan:
            print(name, *(f"  {run.name}" for run in runs), sep="\n")
            continue
        folder = options.output / (f"{name}_small" if options.small else name)
        print(f"{name}: {len(runs)} runs in {folder}")
        results = run_sweep(runs, folder, open_data, progress=True)
        plot_final_losses(runs, results, folder / "final_loss.png")
        curves = plot_sweep(runs, folder)
        print(f"\n{result_table(results)}\nwrote {folder / 'final_loss.png'} (the final losses), {folder / 'table.md'}")
        if curves is not None:
            print(f"wrote {curves} (the losses during training)")


def open_data(data):
    """Open the token files and the tokenizer of a run; generate those of the stories if they do not exist."""
    from basic.analysis.sweep import SweepData
    from basic.commands import train

    folder = Path(data.train_tokens).parent
    if folder.name == "small_stories" and not (folder / "valid.bin").is_file():
        make_stories(folder)
    return SweepData(*train.open_data(data))


def make_stories(folder: Path, *, num_train: int = 20_000, num_valid: int = 400, vocab_size: int = 1024) -> None:
    """Write the embedded stories, train a tokenizer and encode them; valid.bin is written last."""
    from basic.commands.prepare_text import tokenize
    from basic.common.files import make_folder
    from basic.common.folder_lock import FolderLock
    from basic.corpus.train_valid import write_stories

    make_folder(folder)
    with FolderLock(folder):
        write_stories(folder, num_train, num_valid, progress=True)
        tokenize(folder, vocab_size, kernels=False, progress=True)
