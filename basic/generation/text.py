"""From a prompt to its continuation: one token after the other, drawn from the model's distribution."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from basic.generation.sampling import check_sampling, continue_ids, generate
from basic.model import TransformerLM


@runtime_checkable  # the tests check argument types at run time
class TextTokenizer(Protocol):
    """The methods that generation needs of a tokenizer; `basic.Tokenizer.Tokenizer` has them."""

    vocab_size: int
    special_token_ids: dict[str, int]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...


@runtime_checkable
class SavableTokenizer(TextTokenizer, Protocol):
    """The methods that training needs: the run folder keeps a copy of the tokenizer."""

    def save(self, directory: str | os.PathLike) -> None: ...


def complete(
    model: TransformerLM,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    end_of_text: str = "<|endoftext|>",
) -> list[str]:
    """Continue each text until the model ends it or `max_new_tokens` are there.

    Args:
        prompts: texts; to start from nothing, use the end-of-text token, behind which every document begins.
        temperature, top_k, top_p, seed: as for `generate`.
        end_of_text: the special token that ends a document; where the tokenizer has none, nothing ends early.

    Returns:
        The continuations, without the prompts and without the end-of-text token.

    Raises:
        TypeError: `prompts` is a single text.
        ValueError: a prompt encodes to no token at all.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list of texts, got one text; write [{prompts[:20]!r}]")
    completions = generate(
        model,
        [_encode_prompt(tokenizer, prompt, end_of_text) for prompt in prompts],
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        end_id=tokenizer.special_token_ids.get(end_of_text),
        vocab_size=tokenizer.vocab_size,
    )
    return [tokenizer.decode(ids) for ids in completions]


def stream(
    model: TransformerLM,
    tokenizer: TextTokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    end_of_text: str = "<|endoftext|>",
) -> Iterator[str]:
    """Continue a text as `complete` does, and hand it out while it grows.

    Args:
        prompt, max_new_tokens, temperature, top_k, top_p, seed, end_of_text: as for `complete`.

    Returns:
        The pieces of the continuation, none of them empty; joined, they are what `complete` returns for the same
        seed. A character whose bytes are spread over several tokens comes whole, with the last of them.

    Raises:
        ValueError: as `complete` does, and at once, before the first piece is asked for.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    new_ids = continue_ids(
        model,
        [_encode_prompt(tokenizer, prompt, end_of_text)],
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        end_id=tokenizer.special_token_ids.get(end_of_text),
        vocab_size=tokenizer.vocab_size,
    )
    return _whole_characters(tokenizer.decode_bytes(ids) for (ids,) in new_ids)


def _encode_prompt(tokenizer: TextTokenizer, prompt: str, end_of_text: str) -> list[int]:
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError(
            f"the prompt {prompt!r} encodes to no token; give some text, or {end_of_text!r} to start from nothing"
        )
    return ids


def _whole_characters(pieces: Iterable[bytes]) -> Iterator[str]:
    """The text of UTF-8 bytes that come in pieces; what is cut is held back until the rest of it is there."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in pieces:
        if text := decoder.decode(piece):
            yield text
    if rest := decoder.decode(b"", final=True):
        yield rest
