"""The sections of a report that describe a run: samples, tokenizer, configuration, environment."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from basic.analysis.report.html import abbreviate, format_count, format_setting, lines, table
from basic.analysis.report.logged_run import LoggedRun, token_file_info
from basic.common.config_files import flatten_settings
from basic.common.errors import DamagedFileError
from basic.common.files import load_json
from basic.Tokenizer import Tokenizer
from basic.training.settings import RunConfig

Record = Mapping[str, Any]

NUM_SHOWN_SAMPLES = 6
"""Samples that are visible at first; a click shows all."""
NUM_LONGEST_TOKENS = 40


# --- Samples --------------------------------------------------------------------------------------------------


def read_samples(run_dir: Path, records: Sequence[Record]) -> list[tuple[int | None, str]]:
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


def samples_section(samples: Sequence[tuple[int | None, str]], training: Sequence[Record]) -> str:
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
    page = f'<ol class="samples">\n{lines(items[i] for i in sorted(shown))}\n</ol>'
    if len(items) > len(shown):
        all_samples = f'<ol class="samples">\n{lines(items)}\n</ol>'
        page += f"\n<details><summary>All {len(items)} samples</summary>\n{all_samples}\n</details>"
    return page


# --- Tokenizer ------------------------------------------------------------------------------------------------


def tokenizer_section(run: LoggedRun) -> str:
    folder, train_info = run.folder / "tokenizer", token_file_info(run.config.data.train_tokens, run.folder)
    files = {"training": train_info, "validation": run.validation}
    rows = {
        f"{name.capitalize()} text": f"{format_count(info.count)} tokens, "
        f"{info.source_bytes / info.count:.3f} bytes per token"
        for name, info in files.items()
        if info is not None and info.count and info.source_bytes
    }
    if not (folder / "vocab.json").is_file():
        return table(rows) if rows else ""
    tokenizer = Tokenizer.load(folder)
    special = tokenizer.special_token_ids
    learned = [token for token in tokenizer.vocab.values() if token.decode("utf-8", errors="replace") not in special]
    longest = sorted(learned, key=lambda token: (-len(token), token))[:NUM_LONGEST_TOKENS]
    rows = {"Vocabulary": f"{len(tokenizer.vocab):,} tokens"} | rows
    if special:
        rows["Special tokens"] = abbreviate(map(repr, special))
    items = "".join(f'<li title="{len(token)} bytes">{_visible_text(token)}</li>' for token in longest)
    return (
        f'<div class="columns">\n<div>\n{table(rows)}\n</div>\n'
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
    return f'<dl class="lengths">\n{lines(bars)}\n</dl>'


def _visible_text(token: bytes) -> str:
    """Return a token with marks for white space and escapes for bytes that are not UTF-8, as HTML."""
    text = escape(token.decode("utf-8", errors="backslashreplace"))
    for plain, sign in ((" ", "·"), ("\n", "↵"), ("\t", "→"), ("\r", "␍")):
        text = text.replace(plain, f"\0{sign}\1")
    return text.replace("\0", "<i>").replace("\1", "</i>")


# --- Configuration, environment -------------------------------------------------------------------------------


def configuration_section(config: RunConfig) -> str:
    """Return a table for each section of the configuration, with default values in gray."""
    tables = []
    for section in dataclasses.fields(config):
        rows = []
        for name, value, default in _settings_of(getattr(config, section.name)):
            style = ' class="default"' if value == default else ""
            rows.append(f"<tr{style}><th>{name}</th><td>{escape(format_setting(value))}</td></tr>")
        tables.append(f"<h3>{section.name.capitalize()}</h3>\n<table>\n{lines(rows)}\n</table>")
    return f'<p class="soft">Gray values are the defaults.</p>\n<div class="settings">\n{lines(tables)}\n</div>'


def _settings_of(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, value and default of each field, also of tables in the table."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from _settings_of(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value, field.default


def environment_section(path: Path) -> str:
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
        title = f"<h3>Resumed after step {escape(format_setting(step))}</h3>\n" if tables else ""
        tables.append(f"<div>\n{title}{table(changed)}\n</div>")
        previous = values
    return f'<div class="starts">\n{lines(tables)}\n</div>'


def _format_value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
