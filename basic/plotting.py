"""Pictures of runs, made from their metrics logs afterwards."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

Records = Sequence[Mapping[str, float]]


def plot_losses(runs: Mapping[str, Records], path: str | os.PathLike, *, floor_nats: float | None = None) -> None:
    """Draw training and validation loss against steps and against wall time, learning rate and gradient norm below.

    Args:
        runs: a label for each run, and its records as `basic.runs.read_metrics` gives them.
        path: of the picture; its ending says the format (png, svg, pdf).
        floor_nats: nats a token that no model can get under, drawn as a line.

    Raises:
        ValueError: a run has no records yet, or the format is unknown.
    """
    for label, records in runs.items():
        if not records:
            raise ValueError(f"the run {label} has no metrics yet; let it train for log_interval steps")
    # A figure of its own instead of pyplot: no window system is touched, and no global state.
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    by_step, by_time, rate, norm = figure.subplots(2, 2, height_ratios=(5, 3)).flat
    for number, (label, records) in enumerate(runs.items()):
        color = f"C{number % 10}"
        for axes, unit in ((by_step, "step"), (by_time, "wall_s")):
            _line(axes, records, unit, "train_loss", color=color, alpha=0.5, linewidth=1)
            _line(axes, records, unit, "valid_loss", color=color, marker=".", label=_with_last_loss(label, records))
        _line(rate, records, "step", "learning_rate", color=color)
        _line(norm, records, "step", "gradient_norm", color=color, linewidth=1)
    for axes in (by_step, by_time):
        if floor_nats is not None:
            text = f"entropy of the source, whole documents: {floor_nats:.3f}"
            axes.axhline(floor_nats, color="black", linestyle="--", linewidth=1, label=text)
        # The last hundredths matter as much as the first nats.
        _logarithmic(axes)
    by_time.sharey(by_step)
    by_step.plot([], [], color="gray", alpha=0.5, linewidth=1, label="thin lines: training")
    by_step.legend(title="validation loss (nats a token)", frameon=False)
    _logarithmic(norm)
    by_step.set(xlabel="step", ylabel="loss (nats a token)")
    by_time.set(xlabel="wall time (s)")
    rate.set(xlabel="step", ylabel="learning rate")
    norm.set(xlabel="step", ylabel="gradient norm before clipping")
    for axes in figure.axes:
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    rate.set_ylim(bottom=0)
    figure.savefig(path, dpi=120, bbox_inches="tight", pad_inches=0.2)


def _line(axes: Axes, records: Records, x: str, y: str, **style) -> None:
    points = [(record[x], record[y]) for record in records if y in record]
    if len(points) == 1:  # which a line alone would not show
        style["marker"] = "."
    axes.plot([point[0] for point in points], [point[1] for point in points], **style)


def _with_last_loss(label: str, records: Records) -> str:
    losses = [record["valid_loss"] for record in records if "valid_loss" in record]
    return f"{label}: {losses[-1]:.3f}" if losses else f"{label}: none yet"


def _logarithmic(axes: Axes) -> None:
    """A logarithmic y-axis with ticks as people count: 1, 2, 3, 5."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
