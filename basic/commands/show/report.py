"""Write a report of a run as one self-contained HTML file: `basic report runs/quickstart`.

It has interactive curves, the samples over time, the tokenizer, the settings and the machine. Every run leaves one at
its end; `basic report runs/my --follow` shows a run that trains. Several runs are compared on one page:
`basic report runs/my runs/other`.
"""

from __future__ import annotations

import sys
import time
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from basic.commands.show.plot import Runs, default_output, given_runs
from basic.common.errors import BasicError

FOLLOW_S = 10


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: Runs
    """Run folders, such as runs/quickstart."""
    output: Path | None = None
    """HTML file to write; None: report.html in the run folder, which every run leaves there and which is replaced; for
    several runs a file beside the first, such as runs/report_of_my_other.html."""
    overwrite: bool = False
    """Replace another file that exists."""
    entropy: float | None = None
    """Entropy of the data in nats per token, drawn as a line; None: that in the run's log, if it is known."""
    follow: bool = False
    """Write the report again every 10 seconds until all runs have done their steps. An open page loads itself again."""


def main(options: Options) -> None:
    from basic.analysis.report.page import report_output, report_page
    from basic.common.files import atomic_write
    from basic.common.outputs import reserved_outputs

    runs = list(given_runs(options.runs))
    output = options.output or default_output(runs, "report.html", "report_of")

    def write(refresh_s: int | None) -> bytes:
        page = report_page(runs, floor_nats=options.entropy, refresh_s=refresh_s).encode()
        with atomic_write(output) as file:
            file.write(page)
        return page

    with reserved_outputs([report_output(output)], overwrite=options.overwrite or options.output is None):
        try:
            while options.follow and not all(map(is_finished, runs)):
                write(FOLLOW_S)
                print(f"\r{output} is of {time.strftime('%H:%M:%S')}; Ctrl-C ends", end="", file=sys.stderr, flush=True)
                time.sleep(FOLLOW_S)
        finally:
            page = write(None)
    print(f"wrote {output} ({len(page) / 1e3:,.0f} kB); open it in any browser")


def is_finished(run_dir: Path) -> bool:
    """Whether a run has done all its steps."""
    from basic.training.records.metrics import read_metrics
    from basic.training.run_folder import load_run_config

    records = read_metrics(run_dir / "metrics.jsonl")
    return bool(records) and records[-1]["step"] == load_run_config(run_dir).train.steps


def leave_report(run_dir: Path) -> None:
    """Write report.html at the end of a training; a failure is a warning, because the run itself is complete."""
    try:
        with redirect_stdout(StringIO()):
            main(Options(runs=(run_dir,)))
    except (BasicError, OSError) as error:
        warnings.warn(f"there is no report of {run_dir}: {error}", stacklevel=2)
