"""A self-contained HTML page about a run: key figures, curves, samples, tokenizer, configuration, environment.

pages/report.html is the template, report.css the style, and report.js draws the curves. Texts from models,
configurations and tokenizers are untrusted: all of them go through `escape`, and the data of the curves through
`_script_json`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import torch

from basic.common.config_files import flatten_settings
from basic.common.errors import DamagedFileError, InvalidInputError
from basic.common.files import load_json, open_file
from basic.common.outputs import Output
from basic.model import TransformerLM
from basic.Tokenizer import Tokenizer
from basic.tokens.info import TokenFileInfo
from basic.tokens.opening import find_info
from basic.training.records.metrics import read_all_records
from basic.training.run_folder import load_run_config
from basic.training.settings import RunConfig

Record = Mapping[str, Any]

X_AXES = {"step": "steps", "tokens": "tokens", "wall_s": "time"}
CHARTS = (
    # title, columns and their names, scale of the y-axis
    ("Loss", {"train_loss": "training", "valid_loss": "validation"}, "log"),
    ("Learning rate", {"learning_rate": ""}, "linear"),
    ("Gradient norm", {"gradient_norm": ""}, "log"),
    ("Tokens per second", {"tokens_per_s": ""}, "linear"),
)
NUM_SHOWN_SAMPLES = 6
"""Samples that are visible at first; a click shows all."""
NUM_LONGEST_TOKENS = 40
_GENERATOR = b'<meta name="generator" content="basic: report of a training run">'


def report_output(path: str | os.PathLike) -> Output:
    """A file with the page of `report_page`, for `check_outputs`."""

    def is_ours(existing: Path) -> bool:
        with open_file(existing) as file:
            return _GENERATOR in file.read(4096)

    return Output(path, "a report", is_ours)


def report_page(run_dir: str | os.PathLike, *, floor_nats: float | None = None, refresh_s: int | None = None) -> str:
    """Return the page about a run as self-contained HTML.

    Sections without data (samples, tokenizer, environment) are omitted.

    Args:
        floor_nats: lowest possible loss in nats per token, drawn as a dashed line.
        refresh_s: seconds after which an open page loads itself again, for a run that trains; None for never.

    Raises:
        InvalidInputError: `floor_nats` is not finite.
        NotARunError: the folder is not a run.
        FileNotFoundError: the run has no metrics yet, or a file of its tokenizer is missing.
        InvalidConfigError: the configuration is not valid.
        DamagedFileError: a file of the tokenizer, or environment.json, cannot be read.
    """
    if floor_nats is not None and not math.isfinite(floor_nats):
        raise InvalidInputError(f"the entropy must be a finite number, got {floor_nats}")
    run_dir = Path(run_dir)
    config = load_run_config(run_dir)
    records = read_all_records(run_dir / "metrics.jsonl")
    # A damaged record may have lost a key; without its position it cannot be shown.
    training = [record for record in records if "kind" not in record and None not in map(record.get, X_AXES)]
    files = {
        "training": _token_file_info(config.data.train_tokens, run_dir),
        "validation": _token_file_info(config.data.valid_tokens, run_dir),
    }
    skipped = [record["step"] for record in records if record.get("kind") == "nonfinite"]
    sections = {
        "Curves": _curves_section(training, skipped, floor_nats),
        "Samples": _samples_section(_read_samples(run_dir, records), training),
        "Tokenizer": _tokenizer_section(run_dir / "tokenizer", files),
        "Configuration": _configuration_section(config),
        "Environment": _environment_section(run_dir / "environment.json"),
    }
    html = (f"<section>\n<h2>{name}</h2>\n{body}\n</section>" for name, body in sections.items() if body)
    pages = Path(__file__).parent / "pages"
    return Template((pages / "report.html").read_text("utf-8")).substitute(
        title=escape(run_dir.resolve().name),
        lead=_summary(config, training),
        figures=_key_figures(training, files["validation"]),
        sections=_lines(html),
        curves=_script_json({"columns": _curve_columns(training), "lost": skipped, "floor": floor_nats}),
        refresh="" if refresh_s is None else f'<meta http-equiv="refresh" content="{refresh_s}">\n',
        style=(pages / "report.css").read_text("utf-8"),
        script=(pages / "report.js").read_text("utf-8"),
    )


# --- Key figures and curves -----------------------------------------------------------------------------------


def _summary(config: RunConfig, training: Sequence[Record]) -> str:
    """Describe the model and its training in a sentence."""
    with torch.device("meta"):  # shapes without memory
        parameters = TransformerLM(config.model).num_parameters
    model = f"A Transformer with {_format_count(parameters)} parameters"
    if not training:
        return f"{model}; no metrics have been logged yet."
    last = training[-1]
    steps = f"{last['step']:,}" + (f" of {config.train.steps:,}" if last["step"] < config.train.steps else "")
    tokens, time = _format_count(last["tokens"]), _format_duration(last["wall_s"])
    return f"{model}, trained for {steps} steps: {tokens} tokens in {time}."


def _key_figures(training: Sequence[Record], validation: TokenFileInfo | None) -> str:
    """Loss, perplexity, bits per byte and throughput."""
    figures: list[tuple[str, str, str]] = []
    evaluated = [record for record in training if record.get("valid_loss") is not None]
    if evaluated:
        loss, best = evaluated[-1]["valid_loss"], min(evaluated, key=lambda record: record["valid_loss"])
        lowest = "the lowest so far" if best is evaluated[-1] else f"{best['valid_loss']:.3f} at step {best['step']:,}"
        figures.append(("Validation loss", f"{loss:.3f}", f"nats per token; {lowest}"))
        figures.append(("Perplexity", _format_number(_perplexity(loss)), "of validation tokens"))
        if validation is not None and validation.source_bytes:
            bits = loss / math.log(2) * validation.count / validation.source_bytes
            figures.append(("Bits per byte", f"{bits:.3f}", "of validation text"))
    elif training and training[-1].get("train_loss") is not None:
        figures.append(("Training loss", f"{training[-1]['train_loss']:.3f}", "nats per token"))
    speeds = sorted(record["tokens_per_s"] for record in training if record.get("tokens_per_s"))
    if speeds:
        figures.append(("Tokens per second", f"{round(speeds[len(speeds) // 2]):,}", "median"))
    items = (f"<div><dt>{name}</dt><dd>{value}<small>{unit}</small></dd></div>" for name, value, unit in figures)
    return f'<dl class="figures">\n{_lines(items)}\n</dl>'


def _curve_columns(training: Sequence[Record]) -> dict[str, list]:
    """Convert records to one list per column, with None for missing values."""
    names = [*X_AXES, *(name for _, series, _ in CHARTS for name in series)]
    return {name: [record.get(name) for record in training] for name in names}


def _curves_section(training: Sequence[Record], skipped: Sequence[int], floor_nats: float | None) -> str:
    if not training:
        return "<p>No metrics have been logged yet.</p>"
    axes = _lines(
        f'<label><input type="radio" name="axis" value="{name}"{" checked" if name == "step" else ""}>{text}</label>'
        for name, text in X_AXES.items()
    )
    charts = _lines(
        f'<figure class="chart" data-scale="{scale}" data-series="{" ".join(series)}" '
        f'data-names="{"|".join(series.values())}">\n'
        f"<figcaption><strong>{title}</strong><output></output></figcaption>\n"
        f'<div class="plot" tabindex="0" role="slider" aria-label="{title}, record" aria-valuemin="1"></div>\n</figure>'
        for title, series, scale in CHARTS
    )
    notes = []
    if floor_nats is not None:
        notes.append(f"Dashed line: the entropy of the source, {floor_nats:.3f} nats per token.")
    if skipped:
        steps = _abbreviate(f"{step:,}" for step in skipped)
        notes.append(f"Steps without an update, because the loss or the gradient was not finite: {steps}.")
    return (
        f'<fieldset class="axis-choice"><legend>x-axis</legend>\n{axes}\n'
        '<label class="smoothing">smoothing <input type="range" min="0" max="0.95" step="0.05" value="0"></label>\n'
        "</fieldset>\n"
        f'<noscript><p class="warning">The curves need JavaScript, which is disabled.</p></noscript>\n'
        f'<div class="curves">\n{charts}\n</div>\n'
        + (f'<p class="soft" style="margin-top: 1.25rem">{" ".join(notes)}</p>\n' if notes else "")
        + _evaluation_table(training)
    )


def _evaluation_table(training: Sequence[Record]) -> str:
    """Return the evaluations as a table, for copying and for screen readers."""
    rows = [
        (
            f"{record['step']:,}",
            f"{record['tokens']:,}",
            _format_duration(record["wall_s"]),
            "–" if record.get("train_loss") is None else f"{record['train_loss']:.4f}",
            f"{record['valid_loss']:.4f}",
            _format_number(_perplexity(record["valid_loss"])),
        )
        for record in training
        if record.get("valid_loss") is not None
    ]
    if not rows:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("Step", "Tokens", "Time", "Training", "Validation", "Perplexity"))
    body = _lines("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    table = f'<table class="numbers">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>'
    return f'<details><summary>Evaluations as a table</summary>\n<div class="scroll">\n{table}\n</div>\n</details>'


# --- Samples --------------------------------------------------------------------------------------------------


def _read_samples(run_dir: Path, records: Sequence[Record]) -> list[tuple[int | None, str]]:
    """Read steps and texts from the log, or from samples.txt for older runs, oldest first."""
    samples: list[tuple[int | None, str]] = [
        (record["step"], record["text"])
        for record in records
        if record.get("kind") == "sample" and isinstance(record.get("text"), str)
    ]
    path = run_dir / "samples.txt"
    if samples or not path.is_file():
        return samples
    content = path.read_text("utf-8", errors="replace")
    first, *steps_and_texts = re.split(r"^--- step (\d+) ---\n", content, flags=re.MULTILINE)
    if first.strip():
        samples.append((None, first))
    pairs = zip(steps_and_texts[::2], steps_and_texts[1::2], strict=True)
    return samples + [(int(step), text) for step, text in pairs]


def _samples_section(samples: Sequence[tuple[int | None, str]], training: Sequence[Record]) -> str:
    items = []
    for step, text in samples:
        when = "End of training" if step is None else f"Step {step:,}"
        losses = [record.get("train_loss") for record in training if step is not None and record["step"] <= step]
        loss = f"<small>loss {losses[-1]:.3f}</small>" if losses and losses[-1] is not None else ""
        items.append(f"<li><div>{when}{loss}</div><blockquote>{escape(text.strip())}</blockquote></li>")
    if not items:
        return ""
    # Evenly spaced, including the first and the last.
    shown = {round(i * (len(items) - 1) / (NUM_SHOWN_SAMPLES - 1)) for i in range(NUM_SHOWN_SAMPLES)}
    page = f'<ol class="samples">\n{_lines(items[i] for i in sorted(shown))}\n</ol>'
    if len(items) > len(shown):
        all_samples = f'<ol class="samples">\n{_lines(items)}\n</ol>'
        page += f"\n<details><summary>All {len(items)} samples</summary>\n{all_samples}\n</details>"
    return page


# --- Tokenizer ------------------------------------------------------------------------------------------------


def _token_file_info(path: str, run_dir: Path) -> TokenFileInfo | None:
    """Read the sidecar of a token file at its path in the configuration, or else in the run's folder."""
    for candidate in (Path(path), run_dir / Path(path).name) if path else ():
        if (info := find_info(candidate)) is not None:
            return info
    return None


def _tokenizer_section(folder: Path, files: Mapping[str, TokenFileInfo | None]) -> str:
    rows = {
        f"{name.capitalize()} text": f"{_format_count(info.count)} tokens, "
        f"{info.source_bytes / info.count:.3f} bytes per token"
        for name, info in files.items()
        if info is not None and info.count and info.source_bytes
    }
    if not (folder / "vocab.json").is_file():
        return _table(rows) if rows else ""
    tokenizer = Tokenizer.load(folder)
    special = tokenizer.special_token_ids
    learned = [token for token in tokenizer.vocab.values() if token.decode("utf-8", errors="replace") not in special]
    longest = sorted(learned, key=lambda token: (-len(token), token))[:NUM_LONGEST_TOKENS]
    rows = {"Vocabulary": f"{len(tokenizer.vocab):,} tokens"} | rows
    if special:
        rows["Special tokens"] = _abbreviate(map(repr, special))
    items = "".join(f'<li title="{len(token)} bytes">{_visible_text(token)}</li>' for token in longest)
    return (
        f'<div class="columns">\n<div>\n{_table(rows)}\n</div>\n'
        f"<div>\n<h3>Token lengths in bytes</h3>\n{_length_histogram(learned)}\n</div>\n</div>\n"
        f'<h3 style="margin-top: 1.75rem">Longest tokens</h3>\n<ul class="tokens">{items}</ul>'
    )


def _length_histogram(tokens: Iterable[bytes], longest: int = 12) -> str:
    """Draw the number of tokens of each length as bars; the last bar includes all longer tokens."""
    counts = Counter(min(len(token), longest) for token in tokens)
    most = max(counts.values(), default=1)
    bars = (
        f"<div><dt>{length}{'+' * (length == longest)}</dt>"
        f'<dd><span style="width: {100 * counts[length] / most:.1f}%"></span></dd><dd>{counts[length]:,}</dd></div>'
        for length in range(1, max(counts, default=0) + 1)
    )
    return f'<dl class="lengths">\n{_lines(bars)}\n</dl>'


def _visible_text(token: bytes) -> str:
    """Return a token with marks for white space and escapes for bytes that are not UTF-8, as HTML."""
    text = escape(token.decode("utf-8", errors="backslashreplace"))
    for plain, sign in ((" ", "·"), ("\n", "↵"), ("\t", "→"), ("\r", "␍")):
        text = text.replace(plain, f"\0{sign}\1")
    return text.replace("\0", "<i>").replace("\1", "</i>")


# --- Configuration, environment -------------------------------------------------------------------------------


def _configuration_section(config: RunConfig) -> str:
    """Return a table for each section of the configuration, with default values in grey."""
    tables = []
    for section in dataclasses.fields(config):
        table, rows = getattr(config, section.name), []
        for field in dataclasses.fields(table):
            value = getattr(table, field.name)
            style = ' class="default"' if value == field.default else ""
            rows.append(f"<tr{style}><th>{field.name}</th><td>{escape(_format_setting(value))}</td></tr>")
        tables.append(f"<h3>{section.name.capitalize()}</h3>\n<table>\n{_lines(rows)}\n</table>")
    return f'<p class="soft">Grey values are the defaults.</p>\n<div class="settings">\n{_lines(tables)}\n</div>'


def _environment_section(path: Path) -> str:
    """Return a table for each start of the run; those of later starts contain only what changed."""
    if not path.is_file():
        return ""
    content = load_json(path)
    starts = content.get("starts", [content]) if isinstance(content, dict) else None
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise DamagedFileError(f"{path} is damaged: it does not describe the starts of a run; remove it")
    tables, previous = [], {}
    for start in starts:
        values = flatten_settings(start)
        step = values.pop("step", 0)
        changed = {name: _format_value(value) for name, value in values.items() if previous.get(name) != value}
        title = f"<h3>Resumed after step {escape(_format_setting(step))}</h3>\n" if tables else ""
        tables.append(f"<div>\n{title}{_table(changed)}\n</div>")
        previous = values
    return f'<div class="starts">\n{_lines(tables)}\n</div>'


def _format_value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


# --- HTML and formatting --------------------------------------------------------------------------------------


def _script_json(value: Any) -> str:
    """Serialize to JSON that is safe inside <script>: it contains no tag and no comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _table(rows: Mapping[str, str]) -> str:
    lines = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
    return f"<table>\n{_lines(lines)}\n</table>"


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)


def _abbreviate(items: Iterable[str], limit: int = 10) -> str:
    items = list(items)
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def _format_setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        value = ", ".join(map(str, value))
    return "–" if value in (None, "") else str(value)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 100.0))


def _format_number(value: float) -> str:
    """Format with three significant digits, or as an integer from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _format_count(number: float) -> str:
    """Format a large number with its unit: 1.23 million."""
    for size, unit in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"


def _format_duration(seconds: float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {int(seconds % 60)} s" if minutes else f"{seconds:.3g} s"
