"""The picture of a sweep: the final loss of each run over the setting that changes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from basic.analysis.plotting import save_figure
from basic.analysis.sweep import RunResult, SweepRun
from basic.common.config_files import flatten_settings, setting_label, to_table

_LOG_FROM_RATIO = 5
"""A setting has a logarithmic axis if its largest value is at least so many times its smallest."""


def plot_final_losses(runs: Sequence[SweepRun], results: Sequence[RunResult], path: str | os.PathLike) -> None:
    """Draw the final loss over the number that changes most often, a line for each combination of other settings.

    Runs that diverged, or know less than nothing, are crosses at the top. Where no number changes, each run is a bar.

    Raises:
        InvalidInputError: the format is unknown.
        OSError: the file cannot be written.
    """
    key, series = _series(runs, results)
    figure = Figure(figsize=(9, 5.5 if key else 1.2 + 0.4 * len(results)), layout="constrained")
    axes = figure.add_subplot()
    if key is None:
        _draw_bars(axes, results)
    else:
        _draw_lines(axes, key, series)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def _useful_loss(result: RunResult) -> float | None:
    """The loss of a run; None if it diverged or knows less than nothing."""
    return None if result.remark.startswith("worse") else result.loss


def _series(
    runs: Sequence[SweepRun], results: Sequence[RunResult]
) -> tuple[str | None, dict[str, list[tuple[float, RunResult]]]]:
    """The setting for the x-axis, if there is one, and the runs of each line, by the other parts of their names."""
    settings = {run.name: flatten_settings(to_table(run.config)) for run in runs}
    parts = {run.name: run.name.split(",") for run in runs}
    values: dict[str, set[Any]] = {}
    for name, table in settings.items():
        for key, value in table.items():
            if type(value) in (int, float) and setting_label(key, value) in parts[name]:
                values.setdefault(key, set()).add(value)
    key = max(values, key=lambda key: len(values[key]), default=None)
    if key is None or len(values[key]) < 2:
        return None, {}
    series: dict[str, list[tuple[float, RunResult]]] = {}
    for result in results:
        value = settings[result.name][key]
        others = ", ".join(part for part in parts[result.name] if part != setting_label(key, value))
        series.setdefault(others, []).append((value, result))
    return key, series


def _draw_lines(axes: Axes, key: str, series: dict[str, list[tuple[float, RunResult]]]) -> None:
    values = sorted({value for points in series.values() for value, _ in points})
    losses = [loss for points in series.values() for _, result in points if (loss := _useful_loss(result)) is not None]
    top = max(losses, default=1.0)
    height = top - min(losses, default=0.0) or 1.0
    for number, (label, points) in enumerate(series.items()):
        color, points = f"C{number % 10}", sorted(points, key=lambda point: point[0])
        finite = [(value, loss) for value, result in points if (loss := _useful_loss(result)) is not None]
        failed = [value for value, result in points if _useful_loss(result) is None]
        axes.plot(*zip(*finite, strict=True) if finite else ([], []), "o-", color=color, label=label or None)
        if finite:
            best = min(finite, key=lambda point: point[1])
            axes.annotate(f"{best[1]:.3f}", best, xytext=(0, -16), textcoords="offset points", ha="center", color=color)
        crosses = [top + height * (0.15 + 0.05 * number)] * len(failed)  # lines do not hide each other's
        axes.plot(failed, crosses, "x", color=color, markersize=10, markeredgewidth=2)
    if len(losses) < sum(map(len, series.values())):
        axes.plot([], [], "x", color="gray", markersize=10, markeredgewidth=2, label="diverged")
    if values[0] > 0 and values[-1] >= _LOG_FROM_RATIO * values[0]:
        axes.set_xscale("log")
    axes.set_xticks(values)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(y=0.12)
    axes.set(xlabel=key.rpartition(".")[2].replace("_", " "), ylabel="loss on all validation tokens (nats per token)")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)


def _draw_bars(axes: Axes, results: Sequence[RunResult]) -> None:
    losses = [_useful_loss(result) for result in results]
    finite = [loss for loss in losses if loss is not None]
    # Differences between runs are small beside the losses, so the axis does not begin at 0.
    left = max(0.0, min(finite) - 2 * (max(finite) - min(finite)) - 0.05) if finite else 0.0
    names, lengths = [result.name for result in results], [left if loss is None else loss for loss in losses]
    bars = axes.barh(names, lengths, color="C0", height=0.6)
    axes.bar_label(bars, ["diverged" if loss is None else f"{loss:.3f}" for loss in losses], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlim(left=left)
    axes.set(xlabel="loss on all validation tokens (nats per token)")
