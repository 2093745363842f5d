"""From token ids to their continuation: one token after the other, drawn from the model's distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from basic.common.arguments import check_integer, check_size, id_list
from basic.common.errors import InvalidInputError, WrongTokenizerError
from basic.generation.cpu_decoder import make_cpu_decoder
from basic.generation.decoder import Decoder
from basic.generation.sampling import NO_TOKEN, Sampling
from basic.model import KVCache, TransformerLM
from basic.transformer.functional import token_losses
from basic.transformer.kernels import dispatch

Ids: TypeAlias = "Sequence[int] | np.ndarray | Tensor"
Prompts: TypeAlias = "Iterable[Ids] | np.ndarray | Tensor"


@overload
def generate(
    model: TransformerLM, prompts: Prompts, max_new_tokens: int, *, log_probabilities: Literal[True], **options: Any
) -> tuple[list[list[int]], list[list[float]]]: ...


@overload
def generate(
    model: TransformerLM, prompts: Prompts, max_new_tokens: int, *, log_probabilities: Literal[False] = False,
    **options: Any,
) -> list[list[int]]: ...  # fmt: skip


def generate(
    model: TransformerLM,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    num_samples: int = 1,
    log_probabilities: bool = False,
    end_id: int | None = None,
    vocab_size: int | None = None,
    use_cache: bool = True,
    **sampling: Any,
) -> list[list[int]] | tuple[list[list[int]], list[list[float]]]:
    """Continue each prompt by up to `max_new_tokens` ids; the prompts may differ in length.

    On a GPU, single steps use kernels (`basic.generation.gpu_decoder`) if those support the model, which then keeps
    their buffers for the next call: a copy of the weights in half precision, and a cache of up to 1 GB.

    On a CPU, a bfloat16 model computes in float32 too. If the numbers of a float32 model are bfloat16 ones, they are
    copied to 16 bits for single steps, memory that the model keeps; the results are the same.

    Args:
        prompts: at least one id each, as lists, arrays or tensors, or the rows of one array; of a prompt longer than
            the context, the last ids are used.
        max_new_tokens: >= 0. The model sees at most the last `context_length` ids; when they are that many, it goes on
            with the last half of them.
        num_samples: continuations of each prompt, computed together.
        log_probabilities: also return the logarithm of each new id's probability.
        end_id: a sequence ends when this id is drawn.
        vocab_size: draw only ids below this, if the model's vocabulary is larger than the tokenizer's; at least 1.
        use_cache: keep keys and values of earlier tokens; without, the ids are the same, only slower. (In half
            precision, which rounds otherwise then, they may differ where two tokens are almost equally likely.)
        sampling: fields of `Sampling`: temperature, top_k, top_p, min_p, repetition_penalty, frequency_penalty, seed.

    Returns:
        The new ids of each sequence, without `end_id`: all samples of the first prompt, then those of the second. With
        `log_probabilities` also the natural logarithm of the probability that the model itself gives each of these ids,
        at temperature 1 and without penalties, among the ids below `vocab_size`.

    Raises:
        TypeError: the prompts are not sequences of integers, or a number is something else.
        InvalidInputError: a prompt is empty, or a setting is out of its range.
        WrongTokenizerError: a prompt has an id that the model does not have, or `end_id` is one.
        FloatingPointError: the model's logits are NaN, or none of them is finite.

    Source: assignment, "Generating text".
    """
    settings = Sampling(**sampling)
    check_max_new_tokens(max_new_tokens)
    if vocab_size is not None and check_size("vocab_size", vocab_size) > model.config.vocab_size:
        raise InvalidInputError(
            f"vocab_size must be at most {model.config.vocab_size}, the number of ids that the model has, got "
            f"{vocab_size}; leave it out to draw all of them"
        )
    if end_id is not None and check_integer("end_id", end_id) not in range(model.config.vocab_size):
        raise WrongTokenizerError(
            f"end_id must be one of the model's ids, 0 to {model.config.vocab_size - 1}, got {end_id}; leave it out if "
            "no id ends a sequence"
        )
    prompt_lists = _prompt_lists(prompts, model.config.vocab_size)
    id_lists = [ids for ids in prompt_lists for _ in range(check_size("num_samples", num_samples))]
    sequences: list[list[int]] = [[] for _ in id_lists]
    logarithms: list[list[float]] = [[] for _ in id_lists]
    for new_ids in continue_ids(
        model,
        id_lists,
        max_new_tokens,
        settings,
        end_id=end_id,
        vocab_size=vocab_size,
        use_cache=use_cache,
        log_probabilities=logarithms if log_probabilities else None,
    ):
        for sequence, ids in zip(sequences, new_ids, strict=True):
            sequence += ids
    return (sequences, logarithms) if log_probabilities else sequences


def check_max_new_tokens(max_new_tokens: int) -> None:
    if check_integer("max_new_tokens", max_new_tokens) < 0:
        raise InvalidInputError(f"max_new_tokens must be at least 0, got {max_new_tokens}")


def _prompt_lists(prompts: Prompts, vocab_size: int) -> list[list[int]]:
    """The ids of each prompt, checked."""
    is_list = isinstance(prompts, Iterable) and not isinstance(prompts, str | bytes)
    is_list &= getattr(prompts, "ndim", 2) == 2  # the rows of an array or a tensor
    given = list(prompts) if is_list else []
    if not is_list or any(isinstance(prompt, int | np.integer | str | bytes) for prompt in given):
        raise TypeError(
            "prompts must be a list of prompts, each a list, an array or a tensor of ids, such as [[1, 2, 3]]; got "
            f"{type(prompts).__name__}: {prompts!r:.80}"
        )
    id_lists = [id_list(f"prompts[{index}]", prompt) for index, prompt in enumerate(given)]
    for index, ids in enumerate(id_lists):
        if not ids:
            raise InvalidInputError(f"prompt {index} has no token; the model needs at least one, such as end-of-text")
        for position, token_id in enumerate(ids):
            if not 0 <= token_id < vocab_size:
                raise WrongTokenizerError(
                    f"prompt {index} has the id {token_id} at position {position}, but the model has the ids 0 to "
                    f"{vocab_size - 1}; are these the ids of another tokenizer?"
                )
    return id_lists


def make_decoder(
    model: TransformerLM, prompt_lengths: Int[Tensor, " batch"], vocab_size: int | None, use_cache: bool
) -> Decoder:
    """The decoder that has kernels for the model's device, if it supports the model; else the model itself."""
    if not use_cache:
        return Decoder(model, None)
    if (cpu_decoder := make_cpu_decoder(model, len(prompt_lengths))) is not None:
        return cpu_decoder
    config = model.config
    cache = KVCache(config, len(prompt_lengths), dtype=model.compute_dtype, device=prompt_lengths.device)
    supported = config.norm == "pre" and config.positions == "rope" and config.qk_norm != "all_heads"
    if supported and dispatch.supports_decoding(cache.keys[0]):
        from basic.generation.gpu_decoder import make_gpu_decoder  # imported late: it needs Triton

        return make_gpu_decoder(model, cache, prompt_lengths, vocab_size)
    dispatch.warn_about_plain_decoding(supported, cache.keys[0])
    return Decoder(model, cache)


def continue_ids(
    model: TransformerLM,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    end_id: int | None,
    vocab_size: int | None,
    use_cache: bool = True,
    log_probabilities: list[list[float]] | None = None,
    has_ended: Callable[[int, list[int]], bool] = lambda index, new_ids: False,
    make_decoder: Callable[..., Decoder] = make_decoder,
    steps_per_read: int = 32,
) -> Iterator[list[list[int]]]:
    """The loop of `generate`: yield the new ids of each sequence after every step, or after several greedy ones.

    Sequences are not padded: all grow from the length of the shortest prompt on, one token a step. As long as a
    sequence is inside its own prompt, the prompt's token is taken instead of the drawn one, and nothing is yielded for
    it, nor after its end. The loop stops when all sequences have ended.

    Args:
        prompts: not empty.
        log_probabilities: a list for each prompt, to which those of its new ids are added (see `generate`).
        has_ended: called with the index of a sequence and its new ids, after they are yielded; whether to end it.
        make_decoder: a function like this module's.
        steps_per_read: greedy steps after which the new ids are read, which waits for the GPU.
    """
    if not prompts:
        return
    device, context = model.token_embeddings.weight.device, model.config.context_length
    prompts = [prompt[-context:] for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts]
    prompt_lengths = torch.tensor(lengths, device=device)
    tokens = torch.zeros(len(prompts), max(lengths) + max_new_tokens, dtype=torch.int64, device=device)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    shape = tokens.shape if log_probabilities is not None else (0, 0)
    logarithms = torch.zeros(shape, dtype=torch.float32, device=device)
    needs_logits = sampling.temperature != 0 or sampling.has_penalties or log_probabilities is not None
    generator = torch.Generator(device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    decoder = make_decoder(model, prompt_lengths, vocab_size, use_cache)

    @torch.inference_mode()  # not around the loop: the mode would be on in the caller's code between two steps
    def extend(length: int) -> int:
        """Fill in `tokens[:, length]`, and with greedy decoding some columns after it; return the new length."""
        first = first_seen(length, context)
        if decoder.num_read >= length - first:  # the first ids are dropped
            decoder.forget(length - first)
        if decoder.chooses and not needs_logits and decoder.num_read == length - first - 1:
            return first + decoder.choose(tokens[:, first:], length - first, steps_per_read)
        logits = penalized = decoder.read(tokens[:, first:length])
        if sampling.has_penalties:
            is_new = torch.arange(length, device=device) >= prompt_lengths.unsqueeze(-1)
            penalized = sampling.penalized(logits, tokens[:, :length], is_new)
        drawn = sampling.draw(penalized[:, :vocab_size], generator)
        if log_probabilities is not None:
            logarithms[:, length] = -token_losses(logits[:, :vocab_size], drawn.clamp(min=0))
        tokens[:, length] = torch.where(length < prompt_lengths, tokens[:, length], drawn)
        return length + 1

    length, remaining = min(lengths), [max_new_tokens] * len(prompts)
    while any(remaining):
        end = extend(length)
        new_ids = []
        for index, ids in enumerate(tokens[:, length:end].tolist()):  # waits for the GPU
            drawn = ids[max(lengths[index] - length, 0) :][: remaining[index]]
            if NO_TOKEN in drawn:
                raise FloatingPointError(
                    f"the model's logits after {length + ids.index(NO_TOKEN)} tokens of sequence {index} are NaN: its "
                    "weights are damaged, or its training has diverged; load an earlier checkpoint, or use float32"
                )
            remaining[index] -= len(drawn)
            if end_id in drawn:
                drawn, remaining[index] = drawn[: drawn.index(end_id)], 0
            if log_probabilities is not None and drawn:
                log_probabilities[index].append(logarithms[index, length].item())
            new_ids.append(drawn)
        yield new_ids
        for index, ids in enumerate(new_ids):
            if remaining[index] and has_ended(index, ids):
                remaining[index] = 0
        length = end
    decoder.close(model)


def first_seen(length: int, context: int) -> int:
    """The index of the first of `length` ids that the model sees: 0 as long as the context has room for all.

    When it is full, it begins again with its last half, so that half of it is computed once for each half of new ids.
    To drop one id a step would change the position of every other, and so compute the whole context for each id.
    """
    dropped_at_once = context - context // 2
    return -(-max(0, length - context) // dropped_at_once) * dropped_at_once
