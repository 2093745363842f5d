"""The data that the playground page shows: the tokens of a text, and a model's loss and predictions at each of them.

All answers are plain lists and numbers, for JSON; tokens are sent as their bytes in hexadecimal. The size of an answer
is bounded: it contains the first tokens of a long text, and statistics over all of them. `server` serves the
page and these answers.
"""

from __future__ import annotations

import base64
import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch

from basic.analysis.attention import attention_maps
from basic.analysis.playground.choices import Choices, LoadedModel, how_to_get
from basic.common.errors import InvalidInputError
from basic.generation.text import stream
from basic.model import TransformerLM
from basic.Tokenizer import Tokenizer
from basic.training.run_folder import Run
from basic.transformer.functional import at_least_float32, softmax, token_losses

MAX_SHOWN_TOKENS = 3000
"""Tokens of a text that are sent to the page."""
MAX_SCORED_TOKENS = 1024
"""Tokens of a text that the model scores, if its context is longer."""
MAX_MAPPED_TOKENS = 64
"""Tokens of a text whose attention is shown."""
NUM_CANDIDATES = 10
"""Most probable tokens that are listed for each position."""
MAX_PATTERN_S = 5.0
"""Time in which a tokenizer's own pattern must split a text; some patterns need exponential time."""


class Playground(Choices):
    """Answers the requests of the page; methods may be called from several threads."""

    def about(self) -> dict[str, Any]:
        """List the tokenizers, how to get those that are missing, and the models."""
        tokenizers = self.tokenizers()
        missing = {name: how for name, how in how_to_get(self._data).items() if name not in tokenizers}
        models = self.models()
        return {"tokenizers": tokenizers, "missing": missing, "models": models, "num_first": len(self._first)}

    def tokenize(self, tokenizer_id: str, text: str) -> dict[str, Any]:
        """Tokenize a text; return its first tokens and statistics over all of them.

        Args:
            tokenizer_id: a name that `about` lists; it is never used as a path.

        Raises:
            KeyError: the name is unknown.
            OSError, DamagedFileError: the tokenizer's files are missing or damaged.
            InvalidInputError: the text cannot be encoded, or not within MAX_PATTERN_S.
        """
        tokenizer = self.tokenizer(tokenizer_id)
        ids = _with_deadline(tokenizer).encode_array(text)
        return {
            "tokens": len(ids),
            "distinct": len(np.unique(ids)),
            "bytes": len(tokenizer.decode_bytes(ids)),
            "vocab_size": tokenizer.vocab_size,
            **_describe_tokens(tokenizer, ids[:MAX_SHOWN_TOKENS].tolist()),
        }

    def evaluate(
        self, text: str, model: str | None = None, checkpoint: int | None = None, *, keep_end: bool = False
    ) -> dict[str, Any]:
        """Compute the model's loss and its most probable tokens at each token of a text.

        The text follows an end-of-text token, as documents do in training, so that its first token has a loss too.

        Args:
            keep_end: evaluate the end of the text instead of its start, if it is longer than the context.

        Returns:
            `tokens`: number of tokens of the text. `first`: index of the first evaluated token. `nats`: loss of each
            evaluated token. `ranks`: 1 + the number of tokens with a higher probability. `likeliest`: ids and
            probabilities of the NUM_CANDIDATES most probable tokens at each position; if the context is not full, one
            more position follows, for the next token. A first token without context has None in all three lists.
            `model`: what the model is.

        Raises:
            InvalidInputError: there is no model, or the text cannot be encoded.
        """
        run, tokenizer = self._model(model, checkpoint)
        ids = tokenizer.encode_array(text)
        max_inputs = min(run.config.model.context_length, MAX_SCORED_TOKENS)
        prefix = _document_start(run, tokenizer)
        max_tokens = max_inputs + 1 - len(prefix)  # the last token is a target, but not an input
        if keep_end and len(ids) > max_tokens:
            first, prefix = len(ids) - max_inputs - 1, []
            evaluated = ids[first:].tolist()
        else:
            first, evaluated = 0, ids[:max_tokens].tolist()
        sequence = [*prefix, *evaluated]
        without_context = [None] * (1 - len(prefix)) if evaluated else []
        nats, ranks, likeliest = _evaluate_sequence(run.model, sequence, max_inputs, tokenizer.vocab_size)
        candidate_ids = {token_id for position in likeliest for token_id, _ in position if token_id in tokenizer.vocab}
        num_bytes = len(tokenizer.decode_bytes(sequence[1:]))
        return {
            "tokens": len(ids),
            "first": first,
            **_describe_tokens(tokenizer, evaluated),
            "nats": without_context + [_round(x) for x in nats],
            "ranks": without_context + ranks,
            "likeliest": without_context + likeliest,
            "names": {token_id: tokenizer.vocab[token_id].hex() for token_id in candidate_ids},
            "mean_nats": sum(nats) / len(nats) if nats else None,
            "bits_per_byte": sum(nats) / math.log(2) / num_bytes if num_bytes else None,
            "model": {
                "parameters": run.model.num_parameters,
                "context_length": run.config.model.context_length,
                "step": run.step,
            },
        }

    def attention(self, text: str, model: str | None = None, checkpoint: int | None = None) -> dict[str, Any]:
        """Compute where each head attends to, for the first tokens of a text after an end-of-text token.

        Returns:
            The tokens, the number of `layers` and `heads`, and `maps`: their weights, from 0 to 255, as bytes in base64
            in the order layer, head, query, key.

        Raises:
            InvalidInputError: there is no model, or the text cannot be encoded.
        """
        run, tokenizer = self._model(model, checkpoint)
        ids = [*_document_start(run, tokenizer), *tokenizer.encode_array(text).tolist()]
        ids = ids[: min(run.config.model.context_length, MAX_MAPPED_TOKENS)]
        maps = attention_maps(run.model, ids) if ids else torch.zeros(0, 0, 0, 0)
        weights = (255 * maps).round().to(torch.uint8).numpy().tobytes()
        shape = {"layers": maps.shape[0], "heads": maps.shape[1], "maps": base64.b64encode(weights).decode()}
        return {**_describe_tokens(tokenizer, ids), **shape}

    def generate(
        self,
        prompt: str,
        max_new_tokens: int,
        model: str | None = None,
        checkpoint: int | None = None,
        *,
        num_samples: int = 1,
        seed: int | None = None,
        **sampling: Any,
    ) -> Iterator[dict[str, Any]]:
        """Generate continuations: first the length of the prompt, then text as it is generated, sample by sample.

        Args:
            prompt: empty for a new document; if it is longer than the context, its last tokens are used.
            seed: of the first sample; the next one has the next seed.

        Yields:
            {"tokens": prompt tokens, "seen": prompt tokens that the model uses}, then {"text": new text, "sample":
            number of the sample} repeatedly.

        Raises:
            InvalidInputError: there is no model, or an argument is out of its range.
        """
        run, tokenizer = self._model(model, checkpoint)
        num_tokens = len(tokenizer.encode_array(prompt))
        yield {"tokens": num_tokens, "seen": min(num_tokens, run.config.model.context_length)}
        end = run.config.train.end_of_text
        start = run.with_document_start(prompt or end)
        for sample in range(num_samples):
            how: dict[str, Any] = {**sampling, "seed": None if seed is None else seed + sample, "end_of_text": end}
            for text in stream(run.model, tokenizer, start, max_new_tokens, **how):
                yield {"text": text, "sample": sample}

    def answer(
        self,
        messages: Sequence[Mapping[str, str]],
        max_new_tokens: int,
        model: str | None = None,
        checkpoint: int | None = None,
        **sampling: Any,
    ) -> Iterator[dict[str, Any]]:
        """Answer the last message of a conversation, in the model's chat template.

        Args:
            messages: {"role": "user" or "assistant", "content": text}; the oldest are left out if they do not fit.

        Yields:
            {"forgotten": messages that were left out}, then {"text": new text} repeatedly.

        Raises:
            InvalidInputError: the model has no chat template, or it refuses the conversation.
        """
        loaded = self._model(model, checkpoint)
        chat = loaded.chat
        kept = [{**each, "content": chat.without_special_tokens(each["content"])} for each in messages]
        prompt, forgotten = chat.fitting_prompt(kept, loaded.run.config.model.context_length - max_new_tokens)
        yield {"forgotten": forgotten}
        end = chat.end_of_answer or loaded.run.config.train.end_of_text
        for text in stream(loaded.run.model, loaded.tokenizer, prompt, max_new_tokens, end_of_text=end, **sampling):
            yield {"text": text}

    def _model(self, name: str | None, checkpoint: int | None) -> LoadedModel:
        run, tokenizer = self.model(name, checkpoint)
        return LoadedModel(run, _with_deadline(tokenizer))


def _document_start(run: Run, tokenizer: Tokenizer) -> list[int]:
    """The id of the end-of-text token, which precedes every document in training; none if the tokenizer has none."""
    end_id = tokenizer.special_token_ids.get(run.config.train.end_of_text)
    return [] if end_id is None else [end_id]


class _PatternWithDeadline:
    """A pattern that finds pre-tokens until a time, and then raises InvalidInputError."""

    def __init__(self, pattern: Any, deadline_s: float) -> None:
        self.splits, self.name, self._find, self._deadline_s = pattern.splits, pattern.name, pattern.find, deadline_s

    def find(self, text: str) -> list[str]:
        try:
            return self._find(text, timeout=max(self._deadline_s - time.monotonic(), 1e-3))
        except TimeoutError:
            raise InvalidInputError(
                f"the tokenizer's pattern {self.splits[0][:80]!r} needs more than {MAX_PATTERN_S:g} s for this text; "
                "use a shorter text or another tokenizer"
            ) from None


def _with_deadline(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer that works until MAX_PATTERN_S from now; GPT-2's pattern needs linear time and no deadline."""
    if tokenizer.pattern is None:
        return tokenizer
    limited = copy.copy(tokenizer)
    deadline_s = time.monotonic() + MAX_PATTERN_S
    limited.compiled_pattern = cast("Any", _PatternWithDeadline(tokenizer.compiled_pattern, deadline_s))
    return limited


@torch.inference_mode()
def _evaluate_sequence(
    model: TransformerLM, ids: list[int], max_inputs: int, vocab_size: int
) -> tuple[list[float], list[int], list[list[tuple[int, float]]]]:
    """Compute losses and ranks of all ids but the first, and the most probable next ids after each input.

    Args:
        ids: at most max_inputs + 1; the first max_inputs are inputs.
        vocab_size: ids below this are candidates; the model's vocabulary may be padded.
    """
    if not ids:
        return [], [], []
    device = model.token_embeddings.weight.device
    inputs, targets = (torch.tensor(x, dtype=torch.int64, device=device) for x in (ids[:max_inputs], ids[1:]))
    logits = model(inputs.unsqueeze(0))[0, :, :vocab_size]
    target_logits = logits[: len(targets)]
    ranks = 1 + (target_logits > target_logits.gather(-1, targets.unsqueeze(-1))).sum(-1)
    probabilities, top_ids = softmax(at_least_float32(logits), -1).topk(min(NUM_CANDIDATES, logits.shape[-1]))
    likeliest = [
        [(token_id, _round(p)) for token_id, p in zip(*candidates, strict=True)]
        for candidates in zip(top_ids.tolist(), probabilities.tolist(), strict=True)
    ]
    return token_losses(target_logits, targets).tolist(), ranks.tolist(), likeliest


def _describe_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> dict[str, Any]:
    """Return ids, their bytes in hexadecimal, and the indices of special tokens."""
    special_ids = set(tokenizer.special_token_ids.values())
    return {
        "ids": list(ids),
        "token_bytes": [tokenizer.vocab[token_id].hex() for token_id in ids],
        "special": [index for index, token_id in enumerate(ids) if token_id in special_ids],
    }


def _round(x: float) -> float:
    """Round to four significant digits, which keeps the JSON of long texts small."""
    return float(f"{x:.4g}")
