"""One HTML page about a run, whole in itself: figures, curves to point at, samples, tokenizer, settings, machine.

report.html is the page's frame, report.css its looks, report.js what draws the curves; here is what stands in it. Text
comes from models, configurations and tokenizers, and none of it is trusted: every one goes through `escape`, and the
data of the curves through `_script_json`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import torch

from basic.model import TransformerLM
from basic.tokens.info import TokenFileInfo
from basic.tokens.opening import known_info
from basic.training.records.metrics import read_all_records
from basic.training.run_folder import load_run_config
from basic.training.settings import RunConfig

Record = Mapping[str, Any]
LoadVocab = Callable[[Path], Mapping[int, bytes]]

X_AXES = {"step": "steps", "tokens": "tokens", "wall_s": "time"}
CHARTS = (
    # title, columns and their names, scale
    ("Loss", {"train_loss": "training", "valid_loss": "validation"}, "log"),
    ("Learning rate", {"learning_rate": ""}, "linear"),
    ("Gradient norm", {"gradient_norm": ""}, "log"),
    ("Tokens a second", {"tokens_per_s": ""}, "linear"),
)
SAMPLES_SHOWN = 6
"""At once; the others are behind a click."""
LONGEST_TOKENS_SHOWN = 40


def report_page(run_dir: str | os.PathLike, *, load_vocab: LoadVocab, floor_nats: float | None = None) -> str:
    """The page about a run, as HTML that needs nothing else.

    What the folder does not hold (samples, a tokenizer, the environment) the page does not mention.

    Args:
        load_vocab: from the path of a vocab.json to the bytes of each id (`basic.bytes_utils.load_vocab`).
        floor_nats: nats a token that no model can get under, drawn as a line.

    Raises:
        FileNotFoundError: the folder is no run, or has no metrics yet.
        ValueError: the configuration or the vocabulary cannot be read.
    """
    run_dir = Path(run_dir)
    config = load_run_config(run_dir)
    records = read_all_records(run_dir / "metrics.jsonl")
    training = [record for record in records if "kind" not in record]
    files = {
        "training": _token_file(config.data.train_tokens, run_dir),
        "validation": _token_file(config.data.valid_tokens, run_dir),
    }
    lost = [record["step"] for record in records if record.get("kind") == "nonfinite"]
    sections = {
        "Curves": _curves_section(training, lost, floor_nats),
        "Samples": _samples_section(_samples(run_dir, records), training),
        "Tokenizer": _tokenizer_section(run_dir / "tokenizer", files, load_vocab),
        "Configuration": _configuration_section(config),
        "Environment": _environment_section(run_dir / "environment.json"),
    }
    filled = (f"<section>\n<h2>{name}</h2>\n{body}\n</section>" for name, body in sections.items() if body)
    pages = Path(__file__).parent / "pages"
    return Template((pages / "report.html").read_text("utf-8")).substitute(
        title=escape(run_dir.resolve().name),
        lead=_lead(config, training),
        figures=_figures(training, files["validation"]),
        sections=_lines(filled),
        curves=_script_json({"columns": _columns(training), "lost": lost, "floor": floor_nats}),
        style=(pages / "report.css").read_text("utf-8"),
        script=(pages / "report.js").read_text("utf-8"),
    )


# --- What the run did -----------------------------------------------------------------------------------------


def _lead(config: RunConfig, training: Sequence[Record]) -> str:
    """What was trained, in a sentence."""
    with torch.device("meta"):  # shapes without numbers
        parameters = TransformerLM(config.model).num_parameters
    model = f"A Transformer of {_rounded(parameters)} parameters"
    if not training:
        return f"{model}, of which nothing has been logged yet."
    last = training[-1]
    steps = f"{last['step']:,}" + (f" of {config.train.steps:,}" if last["step"] < config.train.steps else "")
    return f"{model} after {steps} steps: {_rounded(last['tokens'])} tokens in {_duration(last['wall_s'])}."


def _figures(training: Sequence[Record], validation: TokenFileInfo | None) -> str:
    """The numbers that one asks for first."""
    figures: list[tuple[str, str, str]] = []
    measured = [record for record in training if record.get("valid_loss") is not None]
    if measured:
        loss, best = measured[-1]["valid_loss"], min(measured, key=lambda record: record["valid_loss"])
        least = "the lowest so far" if best is measured[-1] else f"{best['valid_loss']:.3f} at step {best['step']:,}"
        figures.append(("Validation loss", f"{loss:.3f}", f"nats a token; {least}"))
        figures.append(("Perplexity", _figure(_perplexity(loss)), "tokens to choose from"))
        if validation is not None and validation.source_bytes:
            bits = loss / math.log(2) * validation.count / validation.source_bytes
            figures.append(("Bits per byte", f"{bits:.3f}", "of validation text"))
    elif training and training[-1].get("train_loss") is not None:
        figures.append(("Training loss", f"{training[-1]['train_loss']:.3f}", "nats a token"))
    speeds = sorted(record["tokens_per_s"] for record in training if record.get("tokens_per_s"))
    if speeds:
        figures.append(("Tokens a second", f"{round(speeds[len(speeds) // 2]):,}", "median of the records"))
    items = (f"<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>" for name, value, more in figures)
    return f'<dl class="figures">\n{_lines(items)}\n</dl>'


def _columns(training: Sequence[Record]) -> dict[str, list]:
    """The records as the curves want them: a list a name, None where a record says nothing."""
    names = [*X_AXES, *(name for _, series, _ in CHARTS for name in series)]
    return {name: [record.get(name) for record in training] for name in names}


def _curves_section(training: Sequence[Record], lost: Sequence[int], floor_nats: float | None) -> str:
    if not training:
        return "<p>There is no record yet.</p>"
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
        notes.append(f"Dashed: the entropy of the source, {floor_nats:.3f} nats a token over whole documents.")
    if lost:
        notes.append(
            f"At {len(lost)} step{'s' * (len(lost) > 1)} the loss or the gradient was not finite, and the weights did "
            f"not change: {_some(f'{step:,}' for step in lost)}."
        )
    return (
        f'<fieldset class="axis-choice"><legend>Against</legend>\n{axes}\n</fieldset>\n'
        f'<noscript><p class="warning">The curves are drawn by JavaScript, which is off.</p></noscript>\n'
        f'<div class="curves">\n{charts}\n</div>\n'
        + (f'<p class="soft" style="margin-top: 1.25rem">{" ".join(notes)}</p>\n' if notes else "")
        + _evaluations(training)
    )


def _evaluations(training: Sequence[Record]) -> str:
    """The curves' most important points as a table, for those who cannot see them or want to copy them."""
    rows = [
        (
            f"{record['step']:,}",
            f"{record['tokens']:,}",
            _duration(record["wall_s"]),
            "–" if record.get("train_loss") is None else f"{record['train_loss']:.4f}",
            f"{record['valid_loss']:.4f}",
            _figure(_perplexity(record["valid_loss"])),
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


# --- What it wrote --------------------------------------------------------------------------------------------


def _samples(run_dir: Path, records: Sequence[Record]) -> list[tuple[int | None, str]]:
    """Steps and texts, from the log or else from samples.txt, oldest first."""
    found: list[tuple[int | None, str]] = [
        (record["step"], record["text"])
        for record in records
        if record.get("kind") == "sample" and isinstance(record.get("text"), str)
    ]
    path = run_dir / "samples.txt"
    if found or not path.is_file():
        return found
    first, *parts = re.split(r"^--- step (\d+) ---\n", path.read_text("utf-8", errors="replace"), flags=re.MULTILINE)
    if first.strip():
        found.append((None, first))
    return found + [(int(step), text) for step, text in zip(parts[::2], parts[1::2], strict=True)]


def _samples_section(samples: Sequence[tuple[int | None, str]], training: Sequence[Record]) -> str:
    items = []
    for step, text in samples:
        when = "In the end" if step is None else f"Step {step:,}"
        losses = [record["train_loss"] for record in training if step is not None and record["step"] <= step]
        loss = f"<small>loss {losses[-1]:.3f}</small>" if losses and losses[-1] is not None else ""
        items.append(f"<li><div>{when}{loss}</div><blockquote>{escape(text.strip())}</blockquote></li>")
    if not items:
        return ""
    # As evenly spaced as they can be, the first and the last among them.
    shown = {round(i * (len(items) - 1) / (SAMPLES_SHOWN - 1)) for i in range(SAMPLES_SHOWN)}
    page = f'<ol class="samples">\n{_lines(items[i] for i in sorted(shown))}\n</ol>'
    if len(items) > len(shown):
        everything = f'<ol class="samples">\n{_lines(items)}\n</ol>'
        page += f"\n<details><summary>All {len(items)} samples</summary>\n{everything}\n</details>"
    return page


# --- What it read ---------------------------------------------------------------------------------------------


def _token_file(path: str, run_dir: Path) -> TokenFileInfo | None:
    """What is known of a token file where the run found it, or in the run's own folder."""
    for place in (Path(path), run_dir / Path(path).name) if path else ():
        if (info := known_info(place)) is not None:
            return info
    return None


def _tokenizer_section(folder: Path, files: Mapping[str, TokenFileInfo | None], load_vocab: LoadVocab) -> str:
    rows = {
        f"{name.capitalize()} text": f"{_rounded(info.count)} tokens, {info.source_bytes / info.count:.3f} bytes each"
        for name, info in files.items()
        if info is not None and info.count and info.source_bytes
    }
    if not (folder / "vocab.json").is_file():
        return _table(rows) if rows else ""
    vocab = load_vocab(folder / "vocab.json")
    special: list[str] = []
    if (folder / "special_tokens.json").is_file():
        special = json.loads((folder / "special_tokens.json").read_text("utf-8"))
    learned = [token for token in vocab.values() if token.decode("utf-8", errors="replace") not in special]
    longest = sorted(learned, key=lambda token: (-len(token), token))[:LONGEST_TOKENS_SHOWN]
    rows = {"Vocabulary": f"{len(vocab):,} tokens"} | rows
    if special:
        rows["Special tokens"] = _some(map(repr, special))
    chips = "".join(f'<li title="{len(token)} bytes">{_visible(token)}</li>' for token in longest)
    return (
        f'<div class="columns">\n<div>\n{_table(rows)}\n</div>\n'
        f"<div>\n<h3>Tokens of so many bytes</h3>\n{_lengths(learned)}\n</div>\n</div>\n"
        f'<h3 style="margin-top: 1.75rem">The longest tokens</h3>\n<ul class="tokens">{chips}</ul>'
    )


def _lengths(tokens: Iterable[bytes], longest: int = 12) -> str:
    """How many tokens have each length, as bars; the last one is for all that are longer too."""
    counts = Counter(min(len(token), longest) for token in tokens)
    most = max(counts.values(), default=1)
    bars = (
        f"<div><dt>{length}{'+' * (length == longest)}</dt>"
        f'<dd><span style="width: {100 * counts[length] / most:.1f}%"></span></dd><dd>{counts[length]:,}</dd></div>'
        for length in range(1, max(counts, default=0) + 1)
    )
    return f'<dl class="lengths">\n{_lines(bars)}\n</dl>'


def _visible(token: bytes) -> str:
    """A token with what cannot be seen made visible; bytes that are no text as numbers."""
    text = escape(token.decode("utf-8", errors="backslashreplace"))
    for plain, sign in ((" ", "·"), ("\n", "↵"), ("\t", "→"), ("\r", "␍")):
        text = text.replace(plain, f"\0{sign}\1")
    return text.replace("\0", "<i>").replace("\1", "</i>")


# --- How and where --------------------------------------------------------------------------------------------


def _configuration_section(config: RunConfig) -> str:
    """A table for each part; values that nobody chose are grey."""
    tables = []
    for part in dataclasses.fields(config):
        table, rows = getattr(config, part.name), []
        for field in dataclasses.fields(table):
            value = getattr(table, field.name)
            style = ' class="default"' if value == field.default else ""
            rows.append(f"<tr{style}><th>{field.name}</th><td>{escape(_setting(value))}</td></tr>")
        tables.append(f"<h3>{part.name.capitalize()}</h3>\n<table>\n{_lines(rows)}\n</table>")
    return f'<p class="soft">Grey values are the defaults.</p>\n<div class="settings">\n{_lines(tables)}\n</div>'


def _environment_section(path: Path) -> str:
    """A table for each start of the run; of the later ones, what had changed."""
    if not path.is_file():
        return ""
    content = json.loads(path.read_text("utf-8"))
    tables, before = [], {}
    for start in content.get("starts", [content]):
        values = dict(_flat(start))
        step = values.pop("step", 0)
        changed = {name: str(value) for name, value in values.items() if before.get(name) != value}
        title = f"<h3>Resumed after step {step:,}</h3>\n" if tables else ""
        tables.append(f"<div>\n{title}{_table(changed)}\n</div>")
        before = values
    return f'<div class="starts">\n{_lines(tables)}\n</div>'


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dictionaries, under their names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, " ".join(map(str, value)) if isinstance(value, list) else value


# --- Pieces of HTML -------------------------------------------------------------------------------------------


def _script_json(value: Any) -> str:
    """JSON that can stand inside <script>: no text in it can end the element, or begin a comment or another one."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _table(rows: Mapping[str, str]) -> str:
    lines = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
    return f"<table>\n{_lines(lines)}\n</table>"


def _lines(parts: Iterable[str]) -> str:
    return "\n".join(parts)


def _some(words: Iterable[str], most: int = 10) -> str:
    words = list(words)
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def _setting(value: Any) -> str:
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


def _figure(value: float) -> str:
    """Three digits, or all those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _rounded(number: float) -> str:
    """A large number as one says it."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,.0f}"


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {int(seconds % 60)} s" if minutes else f"{seconds:.3g} s"
