"""From token ids to their continuation: one token after the other, drawn from the model's distribution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from basic.model import KVCache, TransformerLM
from basic.transformer.functional import at_least_float32, softmax
from basic.transformer.kernels import dispatch

if TYPE_CHECKING:
    from basic.generation.decoder import Decoder


# Greedy steps between two looks at what came out: looking waits for the GPU.
_STEPS_BETWEEN_LOOKS = 32
# A prompt of so many tokens is read faster by recorded single steps than by a pass of many launches.
_STEPS_FOR_A_PROMPT = 48


def generate(
    model: TransformerLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    end_id: int | None = None,
    vocab_size: int | None = None,
    use_cache: bool = True,
) -> list[list[int]]:
    """Continue each sequence of ids, all of them side by side.

    The prompts may differ in length. All rows grow from the shortest prompt on, one token a step, and while a row
    is still inside its own prompt, the prompt's token is taken instead of the drawn one; so no row is padded.
    On a GPU the single steps go through the kernels of `basic.generation.decoder`, if they cover the model.

    Args:
        prompts: ids, at least one each; of those longer than the context the last ones are used.
        max_new_tokens: most ids to add to each; the model sees the last `context_length` ids only.
        temperature: divides the logits; 0 always takes the likeliest id, 1 is the model's own distribution.
        top_k: draw among the k likeliest ids only.
        top_p: draw among the fewest likeliest ids that together have at least this probability only (0 to 1).
        seed: makes the draws repeatable; None draws afresh.
        end_id: a row stops when it draws this id.
        vocab_size: draw ids below this only, where the model has room for more than the tokenizer knows.
        use_cache: keep keys and values of earlier tokens; the ids are the same without, only slower.

    Returns:
        The new ids of each row, without `end_id`.

    Raises:
        ValueError: a prompt is empty, or a setting is out of its range.

    Source: handout, "Generating text"; Holtzman et al. 2019 (top-p).
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {row} holds no token; the model needs at least one, such as end-of-text")
    rows: list[list[int]] = [[] for _ in prompts]
    for new_ids in continue_ids(
        model,
        prompts,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        end_id=end_id,
        vocab_size=vocab_size,
        use_cache=use_cache,
    ):
        for row, ids in zip(rows, new_ids, strict=True):
            row += ids
    return rows


def next_token_probabilities(
    logits: Float[Tensor, " ... vocab_size"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Tensor, " ... vocab_size"]:
    """The distribution that the next token is drawn from.

    Args:
        logits: the model's scores.
        temperature, top_k, top_p: as for `generate`; top_k is applied before top_p.

    Returns:
        Probabilities in at least float32; each row sums to one.
    """
    logits = at_least_float32(logits)
    if temperature == 0:
        # The first of the likeliest, with certainty.
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # The largest score at zero first, and a divisor whose reciprocal is finite (a GPU multiplies by it): no
    # temperature, however small, makes anything overflow.
    divisor = max(temperature, torch.finfo(torch.float32).tiny)
    logits = (logits - logits.amax(-1, keepdim=True)) / divisor
    if top_k is not None and top_k < logits.shape[-1]:
        largest, ids = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter_(-1, ids, largest)
    probabilities = softmax(logits, -1)
    if top_p is not None and top_p < 1:  # with 1, rounding alone would leave ids out
        descending, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        # An id is needed while those before it have not reached top_p yet; the first one always is.
        mass_before = descending.cumsum(-1) - descending
        needed = mass_before < top_p
        needed[..., 0] = True
        kept = torch.zeros_like(probabilities).scatter_(-1, ids, descending * needed)
        probabilities = kept / kept.sum(-1, keepdim=True)
    return probabilities


def continue_ids(
    model: TransformerLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    end_id: int | None,
    vocab_size: int | None,
    use_cache: bool = True,
) -> Iterator[list[list[int]]]:
    """The loop of `generate`, which has checked the arguments: the new ids of each row, whenever there are some.

    A row gets none while it is still inside its prompt, nor after its end; when all have ended, so does the loop.
    """
    if not prompts:
        return
    device = model.token_embeddings.weight.device
    context = model.config.context_length
    kept = [prompt[-context:] for prompt in prompts]
    lengths = [len(prompt) for prompt in kept]
    prompt_lengths = torch.tensor(lengths, device=device)
    tokens = torch.zeros(len(kept), max(lengths) + max_new_tokens, dtype=torch.int64, device=device)
    for row, prompt in enumerate(kept):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    cache, decoder = None, None
    if use_cache:
        cache = KVCache(model.config, len(kept), dtype=model.compute_dtype, device=device)
        decoder = _decoder(model, cache, prompt_lengths, vocab_size)

    @torch.inference_mode()  # not around the loop, where the mode would be on in the caller's code between two steps
    def grow(length: int) -> int:
        """Fill in the column of tokens at `length`, or some more of them; returns how far it got."""
        if decoder is not None and temperature == 0 and decoder.cache.length == length - 1 < context:
            return _decode_greedily(decoder, tokens, length)
        logits = _next_logits(model, tokens[:, :length], cache, decoder)[:, :vocab_size]
        probabilities = next_token_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        drawn = torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
        tokens[:, length] = torch.where(length < prompt_lengths, tokens[:, length], drawn)
        return length + 1

    length, left = min(lengths), [max_new_tokens] * len(kept)
    while any(left):
        end = grow(length)
        columns = tokens[:, length:end].tolist()  # waits for the GPU
        new_ids = []
        for row, ids in enumerate(columns):
            drawn = ids[max(lengths[row] - length, 0) :][: left[row]]
            left[row] -= len(drawn)
            if end_id in drawn:
                drawn, left[row] = drawn[: drawn.index(end_id)], 0
            new_ids.append(drawn)
        yield new_ids
        length = end


def _decoder(model: TransformerLM, cache: KVCache, prompt_lengths: Tensor, vocab_size: int | None) -> Decoder | None:
    """The kernels for single steps, where there are any for this model."""
    config = model.config
    usual = (config.norm, config.positions, config.ffn) == ("pre", "rope", "swiglu")
    if not usual or config.kv_heads < config.num_heads or not dispatch.cover_decoding(cache.keys[0]):
        return None
    from basic.generation.decoder import Decoder  # here, because it needs Triton

    return Decoder(model, cache, prompt_lengths, vocab_size)


def _decode_greedily(decoder: Decoder, tokens: Int[Tensor, " batch total"], length: int) -> int:
    """Fill in some tokens from `length` on, without waiting for the GPU in between; returns how far it got."""
    decoder.start(tokens)
    end = min(length + _STEPS_BETWEEN_LOOKS, tokens.shape[1], decoder.tokens.shape[1])
    for _ in range(length, end):
        decoder.step()
    tokens[:, length:end] = decoder.tokens[:, length:end]
    return end


def _next_logits(
    model: TransformerLM, tokens: Int[Tensor, " batch length"], cache: KVCache | None, decoder: Decoder | None
) -> Tensor:
    """The scores of the token after the last one, (batch, vocab_size)."""
    context = model.config.context_length
    if cache is None or tokens.shape[1] > context:
        # Past the context every token's position changes at every step, so nothing cached would be right.
        return model(tokens[:, -context:])[:, -1]
    new = tokens[:, cache.length :]
    if decoder is not None and new.shape[1] <= _STEPS_FOR_A_PROMPT:
        decoder.start(tokens)
        for _ in range(new.shape[1]):
            decoder.step()
        return decoder.logits
    logits = model(new, cache)[:, -1]
    cache.advance(new.shape[1])
    return logits


def check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a number >= 0 (0 takes the likeliest token), got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1 (None for all tokens), got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1 (None for all tokens), got {top_p}")
