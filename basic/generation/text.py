"""From a text to its continuation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from basic.common.arguments import check_size, check_text_list
from basic.common.errors import InvalidInputError, WrongTokenizerError
from basic.generation.continuation import check_max_new_tokens, continue_ids
from basic.generation.sampling import Sampling
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


class StopStrings:
    """Text that arrives in chunks, up to the first stop string that it contains, which is left out.

    What may be the beginning of a stop string is held back, so that no part of one is ever returned. The text does not
    depend on how it is divided into chunks: it ends with the stop string that is complete first.

    Args:
        stop: none of them empty; one string is a list of one.

    Attributes:
        found: whether the text has ended.

    Raises:
        TypeError: `stop` has something else than strings.
        InvalidInputError: a stop string is empty.

    Examples:
        >>> stop = StopStrings(["User:"])
        >>> [stop.add(chunk) for chunk in ("Hi. Us", "e it", " U", "ser: no")]
        ['Hi. ', 'Use it', ' ', '']
    """

    def __init__(self, stop: str | Iterable[str]):
        self.stop = check_text_list("stop", [stop] if isinstance(stop, str) else stop)
        for each in self.stop:
            if not isinstance(each, str):
                raise TypeError(f"stop must have strings only, got {type(each).__name__}: {each!r:.40}")
            if not each:
                raise InvalidInputError("a stop string must not be empty, as every text contains it")
        self.found, self._held = False, ""

    def add(self, text: str) -> str:
        """Return the text that is certain with the next chunk; nothing after the end."""
        if self.found:
            return ""
        text = self._held + text
        ends = [(at + len(each), at) for each in self.stop if (at := text.find(each)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        held = max((n for each in self.stop for n in range(1, len(each)) if text.endswith(each[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return what was held back, as no more text comes."""
        rest, self._held = self._held, ""
        return rest


def complete(
    model: TransformerLM,
    tokenizer: TextTokenizer,
    prompts: Iterable[str],
    max_new_tokens: int,
    *,
    num_samples: int = 1,
    stop: str | Iterable[str] = (),
    end_of_text: str = "<|endoftext|>",
    **sampling: Any,
) -> list[str]:
    """Continue each text until the model ends it, or by `max_new_tokens` tokens.

    Args:
        prompts: texts. To generate a document from nothing, pass the end-of-text token, which is before every document.
        max_new_tokens: >= 0.
        num_samples: continuations of each prompt, computed together.
        stop: a text ends before the first of these strings.
        end_of_text: the special token that ends a document; if the tokenizer does not have it, no text ends early.
        sampling: fields of `basic.generation.sampling.Sampling`: temperature, top_k, top_p, min_p, repetition_penalty,
            frequency_penalty, seed.

    Returns:
        The continuations, without the prompts and without the end-of-text token: all samples of the first prompt, then
        those of the second.

    Raises:
        TypeError: `prompts` is a single text, or a keyword is no field of `Sampling`.
        InvalidInputError: a prompt encodes to no token, or a setting is out of its range.
        WrongTokenizerError: the tokenizer has ids that the model does not have.
    """
    prompts = check_text_list("prompts", prompts)
    settings = Sampling(**sampling)
    check_max_new_tokens(max_new_tokens)
    encoded = [_encode_prompt(model, tokenizer, prompt, end_of_text) for prompt in prompts]
    id_lists = [ids for ids in encoded for _ in range(check_size("num_samples", num_samples))]
    stop = StopStrings(stop).stop
    stops = [StopStrings(stop) for _ in id_lists]
    decoders = [tokenizer.stream_decoder() for _ in id_lists if stop]
    completions: list[list[int]] = [[] for _ in id_lists]

    def has_ended(index: int, ids: list[int]) -> bool:
        if decoders:
            stops[index].add(decoders[index].decode(ids))
        return stops[index].found

    for new_ids in continue_ids(
        model,
        id_lists,
        max_new_tokens,
        settings,
        end_id=tokenizer.special_token_ids.get(end_of_text),
        vocab_size=tokenizer.vocab_size,
        has_ended=has_ended,
    ):
        for completion, ids in zip(completions, new_ids, strict=True):
            completion += ids
    return [_up_to_stop(tokenizer.decode(ids), stop) for ids in completions]


def stream(
    model: TransformerLM,
    tokenizer: TextTokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    stop: str | Iterable[str] = (),
    end_of_text: str = "<|endoftext|>",
    **sampling: Any,
) -> Iterator[str]:
    """Continue a text as `complete` does, and yield the new text as it is generated.

    Args:
        prompt, max_new_tokens, stop, end_of_text, sampling: as for `complete`.

    Returns:
        Chunks of the continuation, none of them empty; joined, they are what `complete` returns for the same seed. A
        character whose bytes are in several tokens comes with the last of them, and what may become a stop string only
        when it is certain that it does not.

    Raises:
        TypeError, InvalidInputError, WrongTokenizerError: as for `complete`, and before the first chunk is requested.
    """
    settings = Sampling(**sampling)
    check_max_new_tokens(max_new_tokens)
    new_ids = continue_ids(
        model,
        [_encode_prompt(model, tokenizer, prompt, end_of_text)],
        max_new_tokens,
        settings,
        end_id=tokenizer.special_token_ids.get(end_of_text),
        vocab_size=tokenizer.vocab_size,
    )
    return _decode_stream(tokenizer.stream_decoder(), StopStrings(stop), new_ids)


def _encode_prompt(model: TransformerLM, tokenizer: TextTokenizer, prompt: str, end_of_text: str) -> list[int]:
    if not isinstance(prompt, str):
        raise TypeError(f"a prompt must be a text, got {type(prompt).__name__}: {prompt!r:.80}; ids go to generate")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise WrongTokenizerError(
            f"the tokenizer's {tokenizer.vocab_size} ids do not fit into the model's vocab_size="
            f"{model.config.vocab_size}; give the tokenizer with which the model was trained"
        )
    ids = tokenizer.encode(prompt)
    if not ids:
        raise InvalidInputError(
            f"the prompt {prompt!r} encodes to no token; give some text, or {end_of_text!r} to start from nothing"
        )
    return ids


def _decode_stream(decoder: TextStreamDecoder, stop: StopStrings, new_ids: Iterable[list[list[int]]]) -> Iterator[str]:
    """Decode the ids of the only sequence, step by step."""
    for (ids,) in new_ids:
        if text := stop.add(decoder.decode(ids)):
            yield text
        if stop.found:
            return
    if rest := stop.add(decoder.finish()) + stop.finish():
        yield rest


def _up_to_stop(text: str, stop: str | Iterable[str]) -> str:
    strings = StopStrings(stop)
    return strings.add(text) + strings.finish()
