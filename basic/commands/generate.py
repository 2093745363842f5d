"""Continue a prompt with a trained model, and print tokens as they are generated: `basic generate runs/my`.

The prompt comes from --prompt, --prompt-file or standard input. In a terminal the script asks for prompts until Ctrl-D.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from basic.common import command_line
from basic.common.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class Options:
    run: tyro.conf.Positional[Path]
    """Run folder, such as runs/quickstart."""
    prompt: str | None = None
    """Text to continue; <|endoftext|> starts a new document. Only the last context_length tokens are used."""
    prompt_file: Path | None = None
    """UTF-8 file with the text to continue; a newline at its end is removed."""
    num_samples: int = 1
    """Independent continuations of each prompt."""
    max_tokens: int = 256
    """Maximum number of new tokens; fewer if the model generates the end-of-text token."""
    temperature: float = 1.0
    """Divides the logits: 0 always takes the most likely token, 1 samples from the model's own distribution."""
    top_p: float | None = 0.95
    """Nucleus sampling: sample from the smallest set of most likely tokens whose total probability is at least this (0
    to 1); None: all tokens."""
    top_k: int | None = None
    """Sample from this many most likely tokens; None: all tokens."""
    seed: int | None = None
    """Seed of the sampling; None: different samples each time."""
    device: str = "auto"
    """cpu, cuda, mps ...; auto: the fastest one available."""


def main(options: Options) -> None:
    from basic.generation.text import stream
    from basic.Tokenizer import Tokenizer
    from basic.training.records.environment import check_run_tokenizer
    from basic.training.run_folder import load_run

    if options.prompt is not None and options.prompt_file is not None:
        raise InvalidInputError("--prompt and --prompt-file are both given; leave one of them out")
    run = load_run(options.run, device=options.device)
    if run.tokenizer_path is None:
        raise InvalidInputError(f"{options.run} has no tokenizer/ folder, which is needed to encode the prompt")
    tokenizer = Tokenizer.load(run.tokenizer_path)
    check_run_tokenizer(options.run, tokenizer.fingerprint)
    end_of_text = run.config.train.end_of_text
    for prompt in read_prompts(options, end_of_text):
        for sample in range(options.num_samples):
            texts = stream(
                run.model,
                tokenizer,
                run.with_document_start(prompt),
                options.max_tokens,
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                seed=None if options.seed is None else options.seed + sample,
                end_of_text=end_of_text,
            )
            command_line.print_text(prompt.removeprefix(end_of_text), end="")
            for text in texts:
                command_line.print_text(text, end="")
            command_line.print_text("\n")


def read_prompts(options: Options, end_of_text: str) -> Iterator[str]:
    """Yield the prompts; an empty input is the start of a new document."""
    try:
        if options.prompt is not None:
            yield options.prompt
        elif options.prompt_file is not None:
            yield options.prompt_file.read_text(encoding="utf-8-sig").removesuffix("\n")  # without a byte order mark
        elif not sys.stdin.isatty():
            yield sys.stdin.read().removeprefix("\ufeff").removesuffix("\n") or end_of_text
        else:
            print("Type a prompt, or press Enter for a new document. Ctrl-D ends.", file=sys.stderr)
            while True:
                yield input("> ") or end_of_text
    except EOFError:
        return
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{options.prompt_file or 'standard input'} is not UTF-8 text: {error}") from error


def command() -> None:
    main(command_line.parse(Options, __doc__))
