"""Let a trained model continue a text: `uv run local/generate.py runs/quickstart --prompt "Once upon a time"`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Options:
    run: tyro.conf.Positional[Path]
    """Folder of the run, such as runs/quickstart."""
    prompt: str = "<|endoftext|>"
    """Text to continue; the end-of-text token starts a new document. Of a long text, the last tokens count."""
    num_samples: int = 1
    """Continuations to write, each drawn on its own."""
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
    from basic.generation import complete
    from basic.runs import load_run
    from basic.Tokenizer import Tokenizer

    run = load_run(options.run, device=options.device)
    if run.tokenizer_path is None:
        raise ValueError(f"{options.run} has no tokenizer/ folder, which turns text into the model's ids")
    end_of_text = run.config.train.end_of_text
    completions = complete(
        run.model,
        Tokenizer.load(run.tokenizer_path),
        [options.prompt] * options.num_samples,
        options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        end_of_text=end_of_text,
    )
    for completion in completions:
        print((options.prompt.removeprefix(end_of_text) + completion).strip(), end="\n\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
