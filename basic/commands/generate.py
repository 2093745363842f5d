"""Continue a prompt with a trained model, and print tokens as they are generated: `basic generate runs/my`.

The prompt comes from --prompt, --prompt-file or standard input. In a terminal the script asks for prompts until Ctrl-D.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from basic.chat import ChatFormat
from basic.common import command_line
from basic.common.errors import InvalidInputError
from basic.common.native.object_files import has_objects
from basic.generation.settings import SamplingSettings

_SAMPLES_AT_A_TIME = 64  # so many caches of keys and values


@dataclass(frozen=True, kw_only=True)
class Options:
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder, such as runs/quickstart."""
    prompt: str | None = None
    """Text to continue; <|endoftext|> starts a new document. Only the last context_length tokens are used."""
    prompt_file: Path | None = None
    """UTF-8 file with the text to continue; a newline at its end is removed."""
    chat: bool = False
    """Talk: what you type is a message of the user, written with the tokenizer's chat template, or a plain one; the
    model answers, and remembers the conversation. With --prompt, one answer."""
    system: str | None = None
    """With --chat: the system's message, at the beginning of the conversation."""
    num_samples: int = 1
    """Independent continuations of each prompt, up to 64 computed together and printed when they are complete."""
    max_tokens: int = 256
    """Maximum number of new tokens; fewer if the model generates the end-of-text token."""
    stop: tuple[str, ...] = ()
    """Strings before which a text ends."""
    log_probabilities: bool = False
    """List the new tokens, each behind the natural logarithm of the probability that the model gives it."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingSettings] = field(default_factory=lambda: SamplingSettings(top_p=0.95))
    """How the next token is chosen."""
    checkpoint: int | Literal["best", "last"] = "last"
    """The step of a checkpoint, best for the one with the lowest validation loss, or last for the newest."""
    device: str = "auto"
    """cpu, cuda, mps ...; auto: the fastest one available."""


def main(options: Options) -> None:
    from basic.generation.continuation import generate
    from basic.generation.text import complete, stream
    from basic.training.run_folder import load_run

    if options.prompt is not None and options.prompt_file is not None:
        raise InvalidInputError("--prompt and --prompt-file are both given; leave one of them out")
    if options.max_tokens < 0:  # before the prompt is shown
        raise InvalidInputError(f"--max-tokens must be at least 0, got {options.max_tokens}")
    if options.num_samples < 1:
        raise InvalidInputError(f"--num-samples must be at least 1, got {options.num_samples}")
    if options.log_probabilities and (options.chat or options.stop):
        raise InvalidInputError("--log-probabilities lists all tokens of a continuation; leave --chat and --stop out")
    run = load_run(options.run, checkpoint=options.checkpoint, device=options.device)
    if run.model.token_embeddings.weight.device.type == "cpu" and not has_objects("decode_kernels"):
        print("the first token compiles kernels, once on this machine", file=sys.stderr)
    tokenizer, end_of_text = run.tokenizer, run.config.train.end_of_text
    how: dict[str, Any] = {**asdict(options.sampling), "stop": options.stop, "end_of_text": end_of_text}
    if options.chat:
        chat = ChatFormat(tokenizer, end_of_text=end_of_text)
        how["end_of_text"] = chat.end_of_answer or end_of_text
        context = run.config.model.context_length - options.max_tokens
        answer = partial(stream, run.model, tokenizer, max_new_tokens=options.max_tokens, **how)
        talk(chat, read_prompts(options, ""), answer, options.system, max(1, context))
        return
    for prompt in read_prompts(options, end_of_text):
        shown, prompt = prompt.removeprefix(end_of_text), run.with_document_start(prompt)
        if options.log_probabilities:
            found: Any = generate(
                run.model,
                [tokenizer.encode(prompt)],
                options.max_tokens,
                num_samples=options.num_samples,
                log_probabilities=True,
                end_id=tokenizer.special_token_ids.get(end_of_text),
                vocab_size=tokenizer.vocab_size,
                **asdict(options.sampling),
            )
            for ids, logarithms in zip(*found, strict=True):
                for token_id, logarithm in zip(ids, logarithms, strict=True):
                    command_line.print_text(f"{logarithm:10.4f}  {tokenizer.decode([token_id])!r}\n", end="")
            continue
        if options.num_samples == 1:
            command_line.print_text(shown, end="")
            for text in stream(run.model, tokenizer, prompt, options.max_tokens, **how):
                command_line.print_text(text, end="")
            command_line.print_text("\n")
            continue
        for first in range(0, options.num_samples, _SAMPLES_AT_A_TIME):
            how["num_samples"] = min(options.num_samples - first, _SAMPLES_AT_A_TIME)
            how["seed"] = None if options.sampling.seed is None else options.sampling.seed + first
            for text in complete(run.model, tokenizer, [prompt], options.max_tokens, **how):
                command_line.print_text(f"{shown}{text}\n")


def talk(
    chat: ChatFormat, lines: Iterable[str], answer: Callable[..., Iterable[str]], system: str | None, max_tokens: int
) -> None:
    """Print an answer to each line. The oldest messages are forgotten when the prompt has more than `max_tokens`."""
    first = [] if system is None else [{"role": "system", "content": system}]
    messages: list[dict[str, str]] = []
    for line in lines:
        messages.append({"role": "user", "content": line})
        try:
            prompt, num_forgotten = chat.fitting_prompt([*first, *messages], max_tokens)
        except InvalidInputError as error:
            print(f"error: {error}", file=sys.stderr)
            messages.pop()
            continue
        if num_forgotten:
            print("(the oldest messages are forgotten: they do not fit into the context)", file=sys.stderr)
            del messages[:num_forgotten]
        texts = []
        for text in answer(prompt=prompt):
            command_line.print_text(text, end="")
            texts.append(text)
        command_line.print_text("\n")
        messages.append({"role": "assistant", "content": chat.without_special_tokens("".join(texts)).strip()})


def read_prompts(options: Options, end_of_text: str) -> Iterator[str]:
    """Yield the prompts; an empty input is the start of a new document."""
    try:
        if options.prompt is not None:
            yield options.prompt
        elif options.prompt_file is not None:
            yield options.prompt_file.read_text(encoding="utf-8-sig").removesuffix("\n")  # without a byte order mark
        elif not sys.stdin.isatty():
            text = sys.stdin.read().removeprefix("\ufeff")
            yield from text.splitlines() if options.chat else [text.removesuffix("\n") or end_of_text]
        else:
            what = "a message" if options.chat else "a prompt, or press Enter for a new document"
            print(f"Type {what}. Ctrl-D ends.", file=sys.stderr)
            while True:
                yield input("> ") or end_of_text
    except EOFError:
        return
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{options.prompt_file or 'standard input'} is not UTF-8 text: {error}") from error
