"""Let a trained model continue a text, shown while it grows: `uv run local/generate.py runs/quickstart`.

The text comes from --prompt, from --prompt-file, from a pipe, or, in a terminal, is asked for again and again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from basic.common import command_line


@dataclass(frozen=True, kw_only=True)
class Options:
    run: tyro.conf.Positional[Path]
    """Folder of the run, such as runs/quickstart."""
    prompt: str | None = None
    """Text to continue; the end-of-text token starts a new document. Of a long text, the last tokens count."""
    prompt_file: Path | None = None
    """File with the text to continue, in UTF-8; the newline at its end does not count."""
    num_samples: int = 1
    """Continuations to write of each text, each drawn on its own."""
    max_tokens: int = 256
    """Most tokens to add; the model may end the text earlier."""
    temperature: float = 1.0
    """Divides the scores: 0 always takes the likeliest token, 1 is the model's own distribution."""
    top_p: float | None = 0.95
    """Draw among the fewest likeliest tokens that have this probability together (0 to 1); None for all."""
    top_k: int | None = None
    """Draw among so many likeliest tokens; None for all."""
    seed: int | None = None
    """Makes the draws repeatable; None draws afresh."""
    device: str = "auto"
    """cpu, cuda, mps ...; auto takes the best there is."""


def main(options: Options) -> None:
    from basic.generation.text import stream
    from basic.Tokenizer import Tokenizer
    from basic.training.run_folder import load_run

    if options.prompt is not None and options.prompt_file is not None:
        raise ValueError("--prompt and --prompt-file are both given; leave one of them out")
    run = load_run(options.run, device=options.device)
    if run.tokenizer_path is None:
        raise ValueError(f"{options.run} has no tokenizer/ folder, which turns text into the model's ids")
    tokenizer = Tokenizer.load(run.tokenizer_path)
    end_of_text = run.config.train.end_of_text
    for prompt in prompts(options, end_of_text):
        for sample in range(options.num_samples):
            pieces = stream(
                run.model,
                tokenizer,
                run.begun(prompt),
                options.max_tokens,
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                seed=None if options.seed is None else options.seed + sample,
                end_of_text=end_of_text,
            )
            print(prompt.removeprefix(end_of_text), end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print("\n", flush=True)


def prompts(options: Options, end_of_text: str) -> Iterator[str]:
    """The texts to continue; where nothing is piped or typed, the start of a new document."""
    if options.prompt is not None:
        yield options.prompt
    elif options.prompt_file is not None:
        yield options.prompt_file.read_text(encoding="utf-8").removesuffix("\n")
    elif not sys.stdin.isatty():
        yield sys.stdin.read().removesuffix("\n") or end_of_text
    else:
        print("A text to continue, or nothing for a new one; Ctrl-D ends.", file=sys.stderr)
        while True:
            try:
                yield input("> ") or end_of_text
            except EOFError:
                return


if __name__ == "__main__":
    command_line.run(lambda: main(tyro.cli(Options, description=__doc__)))
