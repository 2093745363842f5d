"""Write one HTML page about a run, which needs nothing else: `uv run local/report.py runs/quickstart`.

It shows curves to point at, samples over time, facts about the tokenizer, the settings and the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from basic.common import command_line


@dataclass(frozen=True, kw_only=True)
class Options:
    run: tyro.conf.Positional[Path]
    """Folder of a run, such as runs/quickstart."""
    output: Path | None = None
    """Page to write; by default report.html in the run's folder."""
    entropy: float | None = None
    """Nats a token that no model can get under, where they are known: drawn as a line."""


def main(options: Options) -> None:
    from basic.analysis.report import report_page
    from basic.bytes_utils import load_vocab
    from basic.common.files import atomic_write

    page = report_page(options.run, load_vocab=load_vocab, floor_nats=options.entropy).encode()
    output = options.output or options.run / "report.html"
    with atomic_write(output) as file:
        file.write(page)
    print(f"wrote {output} ({len(page) / 1e3:,.0f} kB); open it in any browser")


if __name__ == "__main__":
    command_line.run(lambda: main(tyro.cli(Options, description=__doc__)))
