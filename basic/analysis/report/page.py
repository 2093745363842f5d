"""A self-contained HTML page about a run: key figures, curves, samples, tokenizer, configuration, environment.

A page about several runs has their curves together, and a table of their results and different settings.
pages/report.html is the template, report.css the style, and report.js draws the curves. Texts from models,
configurations and tokenizers are untrusted: all of them go through `escape`, and the data of the curves through
`script_json`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median_high
from string import Template
from typing import Any

from basic.analysis.accounting import count_parameters
from basic.analysis.plotting import MAX_SETTINGS_IN_LABEL, run_labels
from basic.analysis.report.html import (
    abbreviate,
    format_count,
    format_duration,
    format_number,
    format_setting,
    lines,
    numbers_table,
    perplexity,
    script_json,
)
from basic.analysis.report.logged_run import X_AXES, LoggedRun
from basic.analysis.report.sections import (
    configuration_section,
    environment_section,
    read_samples,
    samples_section,
    tokenizer_section,
)
from basic.common.config_files import differing_settings, to_table
from basic.common.errors import InvalidInputError
from basic.common.files import open_file
from basic.common.outputs import Output
from basic.training.records.metrics import entropy_to_draw, final_loss

Record = Mapping[str, Any]

CHARTS = (
    # title, columns and their names, scale of the y-axis
    ("Loss", {"train_loss": "training", "valid_loss": "validation"}, "log"),
    ("Learning rate", {"learning_rate": ""}, "linear"),
    ("Gradient norm", {"gradient_norm": ""}, "log"),
    ("Tokens per second", {"tokens_per_s": ""}, "linear"),
    ("Memory", {"gpu_memory_bytes": "GPU", "cpu_memory_bytes": "CPU"}, "linear"),
)
_GENERATOR = b'<meta name="generator" content="basic: report of a training run">'


def report_output(path: str | os.PathLike) -> Output:
    """A file with the page of `report_page`, for `check_outputs`."""

    def is_ours(existing: Path) -> bool:
        with open_file(existing) as file:
            return _GENERATOR in file.read(4096)

    return Output(path, "a report", is_ours)


def report_page(
    runs: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    floor_nats: float | None = None,
    refresh_s: int | None = None,
) -> str:
    """Return the page about a run, or about several, as self-contained HTML.

    Sections without data (samples, tokenizer, environment) are omitted.

    Args:
        runs: a run folder, or several to compare.
        floor_nats: lowest possible loss in nats per token, drawn as a dashed line; None: that in the run's log, if the
            run was trained on a source of known entropy.
        refresh_s: seconds after which an open page loads itself again, for a run that trains; None for never.

    Raises:
        InvalidInputError: `floor_nats` is not above 0, or there is no run.
        NotARunError: the folder is not a run.
        FileNotFoundError: the run has no metrics yet, or a file of its tokenizer is missing.
        InvalidConfigError: the configuration is not valid.
        DamagedFileError: a file of the tokenizer, or environment.json, cannot be read.
    """
    folders = [runs] if isinstance(runs, str | os.PathLike) else list(dict.fromkeys(runs))
    if not folders:
        raise InvalidInputError("no run given; name at least one folder, such as runs/quickstart")
    logged = [LoggedRun.read(Path(folder)) for folder in folders]
    floor_nats = entropy_to_draw(floor_nats, [run.records for run in logged])
    first, is_one = logged[0], len(logged) == 1
    labels = [""] if is_one else run_labels({str(run.folder): to_table(run.config) for run in logged})
    curves = _curves_section(logged, floor_nats)
    if is_one:
        sections = {
            "Curves": curves,
            "Samples": samples_section(read_samples(first.folder, first.records), first.training),
            "Tokenizer": tokenizer_section(first),
            "Configuration": configuration_section(first.config),
            "Environment": environment_section(first.folder / "environment.json"),
        }
    else:
        sections = {"Curves": curves, "Results": _results_section(logged, labels)}
        sections["Last samples"] = _lastsamples_section(logged, labels)
    html = (f"<section>\n<h2>{name}</h2>\n{body}\n</section>" for name, body in sections.items() if body)
    vocab_sizes = {run.config.model.vocab_size for run in logged}
    data = {
        "runs": [
            {"label": labels[i], "columns": _curve_columns(run), "lost": run.skipped} for i, run in enumerate(logged)
        ],
        "floor": floor_nats,
        "uniform": math.log(vocab_sizes.pop()) if len(vocab_sizes) == 1 else None,
    }
    pages = Path(__file__).parents[1] / "pages"
    return Template((pages / "report.html").read_text("utf-8")).substitute(
        title=escape(first.name if is_one else f"{first.name} and {len(logged) - 1} more"),
        lead=_summary(first) if is_one else f"{len(logged)} runs, compared.",
        figures=_key_figures(first) if is_one else "",
        sections=lines(html),
        curves=script_json(data),
        refresh="" if refresh_s is None else f'<meta http-equiv="refresh" content="{refresh_s}">\n',
        style=(pages / "report.css").read_text("utf-8"),
        script=(pages / "report.js").read_text("utf-8"),
    )


# --- Key figures and curves -----------------------------------------------------------------------------------


def _summary(run: LoggedRun) -> str:
    """Describe the model and its training in a sentence."""
    model = f"A Transformer with {format_count(count_parameters(run.config.model))} parameters"
    if not run.training:
        return f"{model}; no metrics have been logged yet."
    last, planned = run.training[-1], run.config.train.steps
    steps = f"{last['step']:,}" + (f" of {planned:,}" if last["step"] < planned else "")
    tokens, time = format_count(last["tokens"]), format_duration(last["wall_s"])
    return f"{model}, trained for {steps} steps: {tokens} tokens in {time}."


def _losses(run: LoggedRun) -> tuple[float | None, float | None, int | None]:
    """The last validation loss, and the lowest with its step."""
    evaluated = [record for record in run.training if record.get("valid_loss") is not None]
    best = min(evaluated, key=lambda record: record["valid_loss"], default={})
    return evaluated[-1]["valid_loss"] if evaluated else None, best.get("valid_loss"), best.get("step")


def _bits_per_byte(run: LoggedRun, loss: float | None) -> float | None:
    info = run.validation
    if loss is None or info is None or not info.source_bytes:
        return None
    return loss / math.log(2) * info.count / info.source_bytes


def _key_figures(run: LoggedRun) -> str:
    """Loss, perplexity, bits per byte and throughput."""
    figures: list[tuple[str, str, str]] = []
    loss, lowest, step = _losses(run)
    if loss is not None:
        when = "the lowest so far" if lowest == loss else f"{lowest:.3f} at step {step:,}"
        figures.append(("Validation loss", f"{loss:.3f}", f"nats per token; {when}"))
        figures.append(("Perplexity", format_number(perplexity(loss)), "of validation tokens"))
        if (bits := _bits_per_byte(run, loss)) is not None:
            figures.append(("Bits per byte", f"{bits:.3f}", "of validation text"))
    elif run.training and run.training[-1].get("train_loss") is not None:
        figures.append(("Training loss", f"{run.training[-1]['train_loss']:.3f}", "nats per token"))
    if speeds := [record["tokens_per_s"] for record in run.training if record.get("tokens_per_s")]:
        figures.append(("Tokens per second", f"{round(median_high(speeds)):,}", "median"))
    items = (f"<div><dt>{name}</dt><dd>{value}<small>{unit}</small></dd></div>" for name, value, unit in figures)
    return f'<dl class="figures">\n{lines(items)}\n</dl>'


def _curve_columns(run: LoggedRun) -> dict[str, list]:
    """Convert records to one list per column that has a value, with None for missing values."""
    names = [*X_AXES, *(name for _, series, _ in CHARTS for name in series)]
    columns = {name: [record.get(name) for record in run.training] for name in names}
    return {name: values for name, values in columns.items() if name in X_AXES or any(x is not None for x in values)}


def _curves_section(runs: Sequence[LoggedRun], floor_nats: float | None) -> str:
    columns = {name for run in runs if run.training for name in _curve_columns(run)}
    if not columns:
        return "<p>No metrics have been logged yet.</p>"
    axes = lines(
        f'<label><input type="radio" name="axis" value="{name}"{" checked" if name == "step" else ""}>{text}</label>'
        for name, text in X_AXES.items()
    )
    charts = [
        f'<figure class="chart" data-scale="{scale}" data-series="{" ".join(series)}" '
        f'data-names="{"|".join(series.values())}">\n'
        f"<figcaption><strong>{title}</strong><output></output></figcaption>\n"
        f'<div class="plot" tabindex="0" role="slider" aria-label="{title}, record" aria-valuemin="1"></div>\n</figure>'
        for title, series, scale in CHARTS
        if columns & series.keys()
    ]
    notes = [
        "Validation losses here are of sampled sequences, as they were measured during training; "
        "<code>basic evaluate</code> and sweeps score every token. Drag across a chart to zoom in."
    ]
    if floor_nats is not None:
        end_nats = final_loss([run.records for run in runs])
        reached = "" if end_nats is None else f"; the model has {end_nats:.3f} at the end"
        notes.append(
            f"Dashed line: the entropy of the source, {floor_nats:.3f} nats per token of whole documents{reached}."
        )
    for run in runs:
        if run.skipped:
            name = "" if len(runs) == 1 else f" of {escape(run.name)}"
            steps = abbreviate(f"{step:,}" for step in run.skipped)
            notes.append(f"Steps{name} without an update, because the loss or the gradient was not finite: {steps}.")
    return (
        f'<fieldset class="axis-choice"><legend>x-axis</legend>\n{axes}\n'
        '<button type="button" class="reset" hidden>show all</button>\n'
        '<label class="smoothing">smoothing <input type="range" min="0" max="0.95" step="0.05" value="0"></label>\n'
        "</fieldset>\n"
        f'<noscript><p class="warning">The curves need JavaScript, which is disabled.</p></noscript>\n'
        f'<div class="curves" style="--columns: {len(charts) - 1}">\n{lines(charts)}\n</div>\n'
        f'<p class="soft" style="margin-top: 1.25rem">{" ".join(notes)}</p>\n'
        + (_evaluation_table(runs[0].training) if len(runs) == 1 else "")
    )


def _results_section(runs: Sequence[LoggedRun], labels: Sequence[str]) -> str:
    """A table with a row for each run, and one with a row for each setting that differs, unless the labels say it."""
    head = ("Run", "Validation", "Lowest", "Bits/byte", "Steps", "Tokens", "Time", "Parameters")
    rows = []
    for run, label in zip(runs, labels, strict=True):
        loss, lowest, step = _losses(run)
        last = run.training[-1] if run.training else {}
        shown = (
            escape(label),
            _or_dash(loss, ".4f"),
            _or_dash(lowest, ".4f") + (f" at {step:,}" if step is not None else ""),
            _or_dash(_bits_per_byte(run, loss), ".3f"),
            _or_dash(last.get("step"), ","),
            format_count(last.get("tokens", 0)),
            format_duration(last.get("wall_s", 0.0)),
            format_count(count_parameters(run.config.model)),
        )
        rows.append(shown)
    results = numbers_table(head, rows)
    differing, settings = differing_settings(to_table(run.config) for run in runs)
    if len(differing) <= MAX_SETTINGS_IN_LABEL:
        return results
    cells = [[escape(key), *(escape(format_setting(values.get(key))) for values in settings)] for key in differing]
    table = numbers_table(["", *(run.name for run in runs)], cells)
    return f'{results}\n<h3 style="margin-top: 1.75rem">Settings</h3>\n{table}'


def _lastsamples_section(runs: Sequence[LoggedRun], labels: Sequence[str]) -> str:
    samples = ((label, read_samples(run.folder, run.records)) for run, label in zip(runs, labels, strict=True))
    items = (
        f"<li><div>{escape(label)}</div><blockquote>{escape(texts[-1][1].strip())}</blockquote></li>"
        for label, texts in samples
        if texts
    )
    page = lines(items)
    return page and f'<ol class="samples">\n{page}\n</ol>'


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _evaluation_table(training: Sequence[Record]) -> str:
    """Return the evaluations as a table, for copying and for screen readers."""
    rows = [
        (
            f"{record['step']:,}",
            f"{record['tokens']:,}",
            format_duration(record["wall_s"]),
            _or_dash(record.get("train_loss"), ".4f"),
            f"{record['valid_loss']:.4f}",
            format_number(perplexity(record["valid_loss"])),
        )
        for record in training
        if record.get("valid_loss") is not None
    ]
    if not rows:
        return ""
    table = numbers_table(("Step", "Tokens", "Time", "Training", "Validation", "Perplexity"), rows)
    return f"<details><summary>Evaluations as a table</summary>\n{table}\n</details>"
