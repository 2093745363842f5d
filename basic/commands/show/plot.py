"""Plot the losses of one or more runs: `basic plot runs/my`.

Several runs are labeled by the settings in which they differ, or by the names of their folders.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import tyro

from basic.common.errors import InvalidInputError

if TYPE_CHECKING:
    from basic.training.settings import RunConfig

_RUNS = tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)")
Runs: TypeAlias = Annotated[tuple[Path, ...], tyro.conf.Positional, _RUNS]


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: Runs
    """Run folders, such as runs/quickstart."""
    output: Path | None = None
    """Image file to write (.png, .svg or .pdf); None: loss.png in the run folder, or for several runs a file beside the
    first, such as runs/losses_of_my_other.png."""
    overwrite: bool = False
    """Replace the picture that exists."""
    entropy: float | None = None
    """Entropy of the data in nats per token, drawn as a line; None: that in the logs, if it is known."""


def main(options: Options) -> None:
    from basic.analysis.plotting import picture_output, plot_losses, run_labels
    from basic.common.config_files import to_table
    from basic.common.outputs import reserved_outputs
    from basic.training.records.metrics import entropy_to_draw, final_loss, read_all_records

    configs = given_runs(options.runs)
    runs = list(configs)
    output = options.output or default_output(runs, "loss.png", "losses_of")
    with reserved_outputs([picture_output(output)], overwrite=options.overwrite):
        labels = run_labels({str(run): to_table(config) for run, config in configs.items()})
        logs = [read_all_records(run / "metrics.jsonl") for run in runs]
        floor_nats = entropy_to_draw(options.entropy, logs)
        training = [[record for record in log if "kind" not in record] for log in logs]
        losses = dict(zip(labels, training, strict=True))
        plot_losses(losses, output, floor_nats=floor_nats, end_nats=final_loss(logs))
    print(f"wrote {output}")


def given_runs(runs: tuple[Path, ...]) -> dict[Path, RunConfig]:
    """The runs of a command without duplicates, with their configurations.

    Raises:
        InvalidInputError: there is none.
        NotARunError: a folder is not a run.
    """
    from basic.training.run_folder import load_run_config

    if not runs:
        raise InvalidInputError("no run given; name at least one folder, such as runs/quickstart")
    return {run: load_run_config(run) for run in runs}


def default_output(runs: list[Path], own_name: str, start: str) -> Path:
    """A file in the run's own folder; for several runs, which must not replace it, one beside the first."""
    if len(runs) == 1:
        return runs[0] / own_name
    names = [run.resolve().name for run in runs]
    if len(names) > 4:
        names[3:] = [f"and_{len(names) - 3}_more"]
    first = runs[0] if runs[0].name not in ("", "..") else runs[0].resolve()
    return first.parent / f"{start}_{'_'.join(names)}{Path(own_name).suffix}"
