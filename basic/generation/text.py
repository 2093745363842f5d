"""From a text to its continuation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from basic.common.arguments import check_text_list
from basic.common.errors import InvalidInputError
from basic.generation.sampling import Sampling, check_max_new_tokens, continue_ids, generate
from basic.model import TransformerLM


@runtime_checkable  # the tests check argument types at run time
class TextStreamDecoder(Protocol):
    """Decodes ids that arrive one after the other; `basic.bpe.stream_decoder.StreamDecoder` does it."""

    def decode(self, ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


@runtime_checkable
class TextTokenizer(Protocol):
    """The methods that generation needs of a tokenizer; `basic.Tokenizer.Tokenizer` has them."""

    vocab_size: int
    special_token_ids: dict[str, int]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def stream_decoder(self) -> TextStreamDecoder: ...


@runtime_checkable
class SavableTokenizer(TextTokenizer, Protocol):
    """The methods that training needs: the run folder keeps a copy of the tokenizer."""

    def save(self, directory: str | os.PathLike) -> None: ...


def tokenizer_for_samples(
    tokenizer: SavableTokenizer | None, end_of_text: str, warn: Callable[[str], object]
) -> SavableTokenizer | None:
    """Return a tokenizer, or None with a warning if it cannot encode the text from which samples start."""
    try:
        if tokenizer is None or tokenizer.encode(end_of_text):
            return tokenizer
        reason = "it has no token"
    except ValueError as error:
        reason = str(error)
    warn(
        f"warning: there will be no samples, because the tokenizer cannot encode end_of_text = {end_of_text!r} "
        f"({reason}); set train.end_of_text to the special token between its documents"
    )
    return None


def complete(
    model: TransformerLM,
    tokenizer: TextTokenizer,
    prompts: Iterable[str],
    max_new_tokens: int,
    *,
    end_of_text: str = "<|endoftext|>",
    **sampling: Any,
) -> list[str]:
    """Continue each text until the model ends it, or by `max_new_tokens` tokens.

    Args:
        prompts: texts. To generate a document from nothing, pass the end-of-text token, which is before every document.
        max_new_tokens: >= 0.
        end_of_text: the special token that ends a document; if the tokenizer does not have it, no text ends early.
        sampling: fields of `basic.generation.sampling.Sampling`: temperature, top_k, top_p, seed.

    Returns:
        The continuations, without the prompts and without the end-of-text token.

    Raises:
        TypeError: `prompts` is a single text, or a keyword is no field of `Sampling`.
        InvalidInputError: a prompt encodes to no token, or a setting is out of its range.
    """
    prompts = check_text_list("prompts", prompts)
    completions = generate(
        model,
        [_encode_prompt(tokenizer, prompt, end_of_text) for prompt in prompts],
        max_new_tokens,
        end_id=tokenizer.special_token_ids.get(end_of_text),
        vocab_size=tokenizer.vocab_size,
        **sampling,
    )
    return [tokenizer.decode(ids) for ids in completions]


def stream(
    model: TransformerLM,
    tokenizer: TextTokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    end_of_text: str = "<|endoftext|>",
    **sampling: Any,
) -> Iterator[str]:
    """Continue a text as `complete` does, and yield the new text as it is generated.

    Args:
        prompt, max_new_tokens, end_of_text, sampling: as for `complete`.

    Returns:
        Chunks of the continuation, none of them empty; joined, they are what `complete` returns for the same seed. A
        character whose bytes are in several tokens comes with the last of them.

    Raises:
        TypeError, InvalidInputError: as for `complete`, and before the first chunk is requested.
    """
    settings = Sampling(**sampling)
    check_max_new_tokens(max_new_tokens)
    new_ids = continue_ids(
        model,
        [_encode_prompt(tokenizer, prompt, end_of_text)],
        max_new_tokens,
        settings,
        end_id=tokenizer.special_token_ids.get(end_of_text),
        vocab_size=tokenizer.vocab_size,
    )
    return _decode_stream(tokenizer.stream_decoder(), new_ids)


def _encode_prompt(tokenizer: TextTokenizer, prompt: str, end_of_text: str) -> list[int]:
    if not isinstance(prompt, str):
        raise TypeError(f"a prompt must be a text, got {type(prompt).__name__}: {prompt!r:.80}; ids go to generate")
    ids = tokenizer.encode(prompt)
    if not ids:
        raise InvalidInputError(
            f"the prompt {prompt!r} encodes to no token; give some text, or {end_of_text!r} to start from nothing"
        )
    return ids


def _decode_stream(decoder: TextStreamDecoder, new_ids: Iterable[list[list[int]]]) -> Iterator[str]:
    """Decode the ids of the only sequence, step by step."""
    for (ids,) in new_ids:
        if text := decoder.decode(ids):
            yield text
    if rest := decoder.finish():
        yield rest
