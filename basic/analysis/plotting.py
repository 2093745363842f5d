"""Plots of runs, from their metrics logs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

from basic.common.config_files import differing_settings, setting_label
from basic.common.errors import InvalidInputError
from basic.common.files import atomic_write, read_file
from basic.common.outputs import Output, check_outputs

Records = Sequence[Mapping[str, Any]]

_TITLE = "Drawn by basic, a language model library"
_MAX_PICTURE_BYTES = 1 << 26

VALIDATION_NOTE = "validation loss: of sampled sequences (`basic evaluate` and sweeps score every token)"

MAX_SETTINGS_IN_LABEL = 3
"""Runs that differ in more settings are labeled by their names."""


def plot_losses(
    runs: Mapping[str, Records],
    path: str | os.PathLike,
    *,
    floor_nats: float | None = None,
    end_nats: float | None = None,
) -> None:
    """Plot losses against steps, tokens and wall time, and learning rate, gradient norm and throughput against steps.

    Args:
        runs: label to records, as `basic.training.records.metrics.read_metrics` returns them.
        path: output file; its suffix selects the format (png, svg, pdf).
        floor_nats: lowest possible loss over whole documents, in nats per token, drawn as a dashed line. Losses during
            training are of sampled sequences, which need not be whole documents.
        end_nats: the loss of one run at its end over whole documents, in nats per token, drawn as a star.

    Raises:
        InvalidInputError: a run has no records, or the format is unknown.
        FileExistsError: the file exists and is no picture that this library drew.
        OSError: the file cannot be written.
    """
    check_outputs([picture_output(path)], overwrite=True)
    for label, records in runs.items():
        if not records:
            raise InvalidInputError(f"the run {label} has no metrics yet; let it train for log_interval steps")
    # Figure instead of pyplot avoids global state and window systems.
    figure = Figure(figsize=(15, 8.5), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
    panels = figure.subplots(2, 3, height_ratios=(5, 3))
    losses, (rate, norm, speed) = panels[0], panels[1]
    units = "step", "tokens", "wall_s"
    for number, (label, records) in enumerate(runs.items()):
        color = f"C{number % 10}"
        for axes, unit in zip(losses, units, strict=True):
            _plot_line(axes, records, unit, "train_loss", color=color, alpha=0.5, linewidth=1)
            _plot_line(
                axes, records, unit, "valid_loss", color=color, marker=".", label=_final_loss_label(label, records)
            )
        _plot_line(rate, records, "step", "learning_rate", color=color)
        _plot_line(norm, records, "step", "gradient_norm", color=color, linewidth=1)
        _plot_line(speed, records, "step", "tokens_per_s", color=color, linewidth=1)
    for axes, unit in zip(losses, units, strict=True):
        if floor_nats is not None:
            text = f"entropy of the source, per token of whole documents: {floor_nats:.3f}"
            axes.axhline(floor_nats, color="black", linestyle="--", linewidth=1, label=text)
        if end_nats is not None:
            (last,) = (records[-1] for records in runs.values())
            text = f"the model at the end, per token of whole documents: {end_nats:.3f}"
            axes.plot(last[unit], end_nats, color="black", marker="*", linestyle="", label=text)
        # On a logarithmic axis small differences late in training remain visible.
        _set_log_scale(axes)
        axes.sharey(losses[0])
    losses[0].plot([], [], color="gray", alpha=0.5, linewidth=1, label="thin lines: training loss")
    losses[0].plot([], [], color="none", label=VALIDATION_NOTE)
    # Outside the panels the legend covers no curve.
    figure.legend(*losses[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
    _set_log_scale(norm)
    losses[0].set(xlabel="step", ylabel="loss (nats per token)")
    losses[1].set(xlabel="tokens")
    losses[2].set(xlabel="wall time (s)")
    rate.set(xlabel="step", ylabel="learning rate")
    norm.set(xlabel="step", ylabel="gradient norm before clipping")
    speed.set(xlabel="step", ylabel="tokens per second")
    losses[1].xaxis.set_major_formatter(EngFormatter(sep=""))
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in figure.axes:
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (rate, speed):
        axes.set_ylim(bottom=0)
    save_figure(figure, path)


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write a picture atomically, in the format of its suffix, with a title by which `picture_output` recognizes it.

    Raises:
        InvalidInputError: the format is unknown.
        OSError: the file cannot be written.
    """
    image_format = Path(path).suffix.removeprefix(".").lower() or "png"
    metadata: dict[str, Any] = {"Title": _TITLE} if image_format in ("png", "svg", "pdf") else {}
    if image_format == "svg":
        metadata["Date"] = None  # the same figure gives the same file
    try:
        with atomic_write(path) as file:
            figure.savefig(file, format=image_format, dpi=120, metadata=metadata or None)
    except ValueError as error:  # matplotlib does not know the format
        raise InvalidInputError(f"{os.fspath(path)}: {error}") from error


def picture_output(path: str | os.PathLike) -> Output:
    """A picture that `save_figure` will write, for `check_outputs`."""

    def is_ours(existing: Path) -> bool:
        return existing.stat().st_size < _MAX_PICTURE_BYTES and _TITLE.encode() in read_file(existing)

    return Output(path, "a picture", is_ours)


def run_labels(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Label each run with the settings in which the runs differ.

    Args:
        configs: run name to configuration, as a table (`basic.common.config_files.to_table`).

    Returns:
        Distinct labels, in the order given: the names if the runs differ in no setting or in more than
        MAX_SETTINGS_IN_LABEL; settings followed by the name where several runs have the same settings.
    """
    differing, settings = differing_settings(configs.values())
    if not 0 < len(differing) <= MAX_SETTINGS_IN_LABEL:
        return list(configs)
    labels = [", ".join(setting_label(key, values.get(key)) for key in differing) for values in settings]
    counts = Counter(labels)
    return [label if counts[label] == 1 else f"{label} ({name})" for name, label in zip(configs, labels, strict=True)]


def _plot_line(axes: Axes, records: Records, x: str, y: str, **style) -> None:
    # The log has null for values that were not finite.
    points = [(record[x], record[y]) for record in records if record.get(x) is not None and record.get(y) is not None]
    if len(points) == 1:  # a line through one point is invisible
        style["marker"] = "."
    axes.plot([point[0] for point in points], [point[1] for point in points], **style)


def _final_loss_label(label: str, records: Records) -> str:
    losses = [record["valid_loss"] for record in records if record.get("valid_loss") is not None]
    return f"{label}: validation loss {losses[-1]:.3f}" if losses else f"{label}: not validated yet"


def _set_log_scale(axes: Axes) -> None:
    """Make the y-axis logarithmic, with ticks at 1, 1.5, 2, 3, 5, 7 times powers of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
