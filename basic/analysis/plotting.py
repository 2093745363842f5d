"""Pictures of runs, made from their metrics logs afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

Records = Sequence[Mapping[str, Any]]

MOST_KEYS_IN_A_LABEL = 3
"""Runs that differ in more are told apart by their names."""


def plot_losses(runs: Mapping[str, Records], path: str | os.PathLike, *, floor_nats: float | None = None) -> None:
    """Draw the losses against steps, tokens and wall time; below, learning rate, gradient norm and throughput.

    Args:
        runs: a label for each run, and its records as `basic.training.records.metrics.read_metrics` gives them.
        path: of the picture; its ending says the format (png, svg, pdf).
        floor_nats: nats a token that no model can get under, drawn as a line.

    Raises:
        ValueError: a run has no records yet, or the format is unknown.
    """
    for label, records in runs.items():
        if not records:
            raise ValueError(f"the run {label} has no metrics yet; let it train for log_interval steps")
    # A figure of its own instead of pyplot: no window system is touched, and no global state.
    figure = Figure(figsize=(15, 8.5), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
    panels = figure.subplots(2, 3, height_ratios=(5, 3))
    losses, (rate, norm, speed) = panels[0], panels[1]
    for number, (label, records) in enumerate(runs.items()):
        color = f"C{number % 10}"
        for axes, unit in zip(losses, ("step", "tokens", "wall_s"), strict=True):
            _line(axes, records, unit, "train_loss", color=color, alpha=0.5, linewidth=1)
            _line(axes, records, unit, "valid_loss", color=color, marker=".", label=_with_last_loss(label, records))
        _line(rate, records, "step", "learning_rate", color=color)
        _line(norm, records, "step", "gradient_norm", color=color, linewidth=1)
        _line(speed, records, "step", "tokens_per_s", color=color, linewidth=1)
    for axes in losses:
        if floor_nats is not None:
            text = f"entropy of the source, whole documents: {floor_nats:.3f}"
            axes.axhline(floor_nats, color="black", linestyle="--", linewidth=1, label=text)
        # The last hundredths matter as much as the first nats.
        _logarithmic(axes)
        axes.sharey(losses[0])
    losses[0].plot([], [], color="gray", alpha=0.5, linewidth=1, label="thin lines: training loss")
    # Above the panels, where it covers no curve.
    figure.legend(*losses[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False)
    _logarithmic(norm)
    losses[0].set(xlabel="step", ylabel="loss (nats a token)")
    losses[1].set(xlabel="tokens")
    losses[2].set(xlabel="wall time (s)")
    rate.set(xlabel="step", ylabel="learning rate")
    norm.set(xlabel="step", ylabel="gradient norm before clipping")
    speed.set(xlabel="step", ylabel="tokens a second")
    losses[1].xaxis.set_major_formatter(EngFormatter(sep=""))
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in figure.axes:
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (rate, speed):
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


def run_labels(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A label for each run that says what sets it apart: the settings in which not all runs are alike.

    Args:
        configs: for each run's name, its configuration as nested tables (`basic.common.config_files.to_table`).

    Returns:
        Different labels, in the order given: the names where nothing differs, or too much; names behind the settings
        where only some runs are alike.

    Example:
        >>> run_labels({"a": {"train": {"lr": 0.1, "seed": 0}}, "b": {"train": {"lr": 0.2, "seed": 0}}})
        ['lr=0.1', 'lr=0.2']
    """
    settings = {name: dict(_flat(table)) for name, table in configs.items()}
    keys = dict.fromkeys(key for values in settings.values() for key in values)
    differing = [key for key in keys if len({repr(values.get(key)) for values in settings.values()}) > 1]
    if not 0 < len(differing) <= MOST_KEYS_IN_A_LABEL:
        return list(configs)
    labels = {
        name: ", ".join(f"{key.rpartition('.')[2]}={_short(values.get(key))}" for key in differing)
        for name, values in settings.items()
    }
    told = list(labels.values())
    return [label if told.count(label) == 1 else f"{label} ({name})" for name, label in labels.items()]


def _flat(table: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{where}{key}.")
        else:
            yield where + key, value


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _line(axes: Axes, records: Records, x: str, y: str, **style) -> None:
    # What was not finite is null in the log.
    points = [(record[x], record[y]) for record in records if record.get(y) is not None]
    if len(points) == 1:  # which a line alone would not show
        style["marker"] = "."
    axes.plot([point[0] for point in points], [point[1] for point in points], **style)


def _with_last_loss(label: str, records: Records) -> str:
    losses = [record["valid_loss"] for record in records if record.get("valid_loss") is not None]
    return f"{label}: validation loss {losses[-1]:.3f}" if losses else f"{label}: not validated yet"


def _logarithmic(axes: Axes) -> None:
    """A logarithmic y-axis with ticks as people count: 1, 2, 3, 5."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
