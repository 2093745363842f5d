"""Pictures of runs, made from their metrics logs afterwards."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure


def plot_losses(
    runs: Mapping[str, Sequence[Mapping[str, float]]], path: str | os.PathLike, *, floor_nats: float | None = None
) -> None:
    """Draw training and validation loss against steps and against wall time, learning rate and gradient norm below.

    Args:
        runs: a label for each run, and its records as `basic.runs.read_metrics` gives them.
        path: of the picture; its ending says the format (png, svg, pdf).
        floor_nats: nats a token that no model can get under, drawn as a line.

    Raises:
        ValueError: a run has no records yet.
    """
    for label, records in runs.items():
        if not records:
            raise ValueError(f"the run {label} has no metrics yet; let it train for log_interval steps")
    # A figure of its own instead of pyplot: no window system is touched, and no global state.
    figure = Figure(figsize=(11, 7), layout="constrained")
    (by_step, by_time), (rate, norm) = figure.subplots(2, 2)
    for number, (label, records) in enumerate(runs.items()):
        color = f"C{number % 10}"
        for axes, unit in ((by_step, "step"), (by_time, "wall_s")):
            _line(axes, records, unit, "train_loss", color=color, alpha=0.45, linewidth=1, label=f"{label}: training")
            _line(axes, records, unit, "valid_loss", color=color, marker=".", label=f"{label}: validation")
        _line(rate, records, "step", "learning_rate", color=color, label=label)
        _line(norm, records, "step", "gradient_norm", color=color, label=label)
    for axes in (by_step, by_time):
        if floor_nats is not None:
            axes.axhline(floor_nats, color="black", linestyle="--", linewidth=1, label="entropy of the source")
        axes.set_ylabel("loss (nats a token)")
        axes.legend()
    by_time.set_xlabel("wall time (s)")
    for axes, label in ((by_step, None), (rate, "learning rate"), (norm, "gradient norm before clipping")):
        axes.set_xlabel("step")
        if label is not None:
            axes.set_ylabel(label)
    norm.set_yscale("log")
    for axes in (by_step, by_time, rate, norm):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _line(axes, records: Sequence[Mapping[str, float]], x: str, y: str, **style) -> None:
    points = [(record[x], record[y]) for record in records if y in record]
    axes.plot([point[0] for point in points], [point[1] for point in points], **style)
