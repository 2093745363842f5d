"""Plot the losses of one or more runs: `uv run local/plot.py runs/quickstart`.

Several runs are labelled by the settings in which they differ, or by their folders' names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from basic.common import command_line


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, such as runs/quickstart."""
    output: Path | None = None
    """Picture to write (.png, .svg or .pdf); by default loss.png in the first run's folder."""
    entropy: float | None = None
    """Nats a token that no model can get under, where they are known: drawn as a line."""


def main(options: Options) -> None:
    from basic.analysis.plotting import plot_losses, run_labels
    from basic.common.config_files import to_table
    from basic.training.records.metrics import read_metrics
    from basic.training.run_folder import config_of

    if not options.runs:
        raise ValueError("no run given; name at least one folder, such as runs/quickstart")
    runs = dict.fromkeys(options.runs)  # a run named twice is one
    labels = run_labels({str(run): to_table(config_of(run)) for run in runs})
    records = [read_metrics(run / "metrics.jsonl") for run in runs]
    output = options.output or options.runs[0] / "loss.png"
    plot_losses(dict(zip(labels, records, strict=True)), output, floor_nats=options.entropy)
    print(f"wrote {output}")


if __name__ == "__main__":
    command_line.run(lambda: main(tyro.cli(Options, description=__doc__)))
