"""Numbers and texts as HTML. Texts of others are untrusted: `escape` them, and put data in scripts by `script_json`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any


def script_json(value: Any) -> str:
    """Serialize to JSON that is safe inside <script>: it contains no tag and no comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def table(rows: Mapping[str, str]) -> str:
    shown = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
    return f"<table>\n{lines(shown)}\n</table>"


def numbers_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table whose cells are HTML, with a bar to scroll it where it is too wide."""
    titles = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = lines("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    content = f"<thead><tr>{titles}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return f'<div class="scroll">\n<table class="numbers">\n{content}\n</table>\n</div>'


def lines(texts: Iterable[str]) -> str:
    return "\n".join(texts)


def abbreviate(items: Iterable[str]) -> str:
    """The first ten of them, and how many more there are."""
    items = list(items)
    return ", ".join(items[:10]) + (f" and {len(items) - 10} more" if len(items) > 10 else "")


def format_setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        value = ", ".join(map(str, value))
    return "–" if value in (None, "") else str(value)


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 100.0))


def format_number(value: float) -> str:
    """Format with three significant digits, or as an integer from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def format_count(number: float) -> str:
    """Format a large number with its unit: 1.23 million."""
    for size, unit in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"


def format_duration(seconds: float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {int(seconds % 60)} s" if minutes else f"{seconds:.3g} s"
