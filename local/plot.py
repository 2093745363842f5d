"""Plot the losses of one or more runs: `uv run local/plot.py runs/quickstart`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, such as runs/quickstart."""
    output: Path | None = None
    """Picture to write (.png, .svg or .pdf); by default loss.png in the first run's folder."""


def main(options: Options) -> None:
    from basic.plotting import plot_losses
    from basic.runs import read_metrics

    if not options.runs:
        raise ValueError("no run given; name at least one folder, such as runs/quickstart")
    output = options.output or options.runs[0] / "loss.png"
    plot_losses({str(run): read_metrics(run / "metrics.jsonl") for run in options.runs}, output)
    print(f"wrote {output}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
