"""From token ids to their continuation: one token after the other, drawn from the model's distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from basic.common.arguments import check_integer, check_size, id_list
from basic.common.config_files import check_fields
from basic.common.errors import InvalidInputError, WrongTokenizerError
from basic.generation.cpu_decoder import CpuDecoder, make_cpu_decoder
from basic.model import KVCache, TransformerLM
from basic.transformer.functional import at_least_float32, softmax, token_losses
from basic.transformer.kernels import dispatch

if TYPE_CHECKING:
    from basic.generation.decoder import Decoder

Ids: TypeAlias = "Sequence[int] | np.ndarray | Tensor"

# Prompts up to this length are read by replayed single steps: as fast as launching the kernels of a whole prompt, and a
# few times slower than replaying those, which the second prompt of about a length does.
_MAX_REPLAYED_PROMPT = 16

NO_TOKEN = -1
"""Stands for a token that cannot be chosen, because the logits are not finite; see also `decode_kernels.choose`."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    `generate`, `complete` and `stream` take these fields as keyword arguments.

    Raises:
        TypeError: a setting is not a number.
        InvalidInputError: a setting is out of its range.

    Source: Holtzman et al. 2019 (top-p); Fan et al. 2018 (top-k); Nguyen et al. 2024 (min-p); Keskar et al. 2019
    (repetition penalty).
    """

    temperature: float = 1.0
    """Divides the logits, >= 0: 0 always takes the likeliest token, 1 is the model's own distribution."""
    top_k: int | None = None
    """Draw among the k likeliest tokens, >= 1; None for all. Applied before top_p."""
    top_p: float | None = None
    """Draw among the fewest likeliest tokens that together have at least this probability, above 0 and at most 1; None
    for all. Applied before min_p."""
    min_p: float | None = None
    """Draw among the tokens with at least this share of the likeliest token's probability, above 0 and at most 1; None
    for all."""
    repetition_penalty: float = 1.0
    """Divides the logit of each token that occurs in the prompt or the new text if it is above 0, else multiplies it;
    above 0. 1 changes nothing, 1.1 makes repetitions rarer."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that it occurs in the new text; 0 changes nothing."""
    seed: int | None = None
    """Makes the draws repeatable; None for different draws each time."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.temperature < float("inf"):
            raise InvalidInputError(
                f"temperature must be a number >= 0 (0 takes the likeliest token), got {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise InvalidInputError(f"top_k must be at least 1 (None for all tokens), got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InvalidInputError(f"top_p must be above 0 and at most 1 (None for all tokens), got {self.top_p}")
        if self.min_p is not None and not 0 < self.min_p <= 1:
            raise InvalidInputError(f"min_p must be above 0 and at most 1 (None for all tokens), got {self.min_p}")
        if not self.repetition_penalty > 0:
            raise InvalidInputError(f"repetition_penalty must be above 0 (1 for none), got {self.repetition_penalty}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:  # what torch's generators accept
            raise InvalidInputError(f"seed must have at most 64 bits, got {self.seed}")

    @property
    def has_penalties(self) -> bool:
        """Whether the choice depends on which tokens there are already."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0

    def penalized(
        self,
        logits: Float[Tensor, " batch vocab_size"],
        tokens: Int64[Tensor, " batch length"],
        is_new: Bool[Tensor, " batch length"],
    ) -> Float[Tensor, " batch vocab_size"]:
        """The logits after both penalties, in at least float32.

        Args:
            tokens: the ids so far, of the prompt and the new ones.
            is_new: which of them are new.
        """
        logits = at_least_float32(logits)
        counts = torch.zeros_like(logits).scatter_add_(-1, tokens, torch.ones_like(tokens, dtype=logits.dtype))
        scaled = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
        new_counts = torch.zeros_like(logits).scatter_add_(-1, tokens, is_new.to(logits.dtype))
        return torch.where(counts > 0, scaled, logits) - self.frequency_penalty * new_counts

    def probabilities(self, logits: Float[Tensor, " ... vocab_size"]) -> Float[Tensor, " ... vocab_size"]:
        """The distribution that the next token is drawn from, in at least float32; NaN if a logit is NaN.

        The penalties are left out: they need the tokens so far (`penalized`).
        """
        logits = at_least_float32(logits)
        if self.temperature == 0:  # the first of the likeliest tokens has probability 1
            certain = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
            return certain.masked_fill_(logits.isnan().any(-1, keepdim=True), torch.nan)
        # So that no temperature overflows, the largest logit is subtracted first, and the divisor has a finite
        # reciprocal (a GPU multiplies by it).
        divisor = max(self.temperature, torch.finfo(torch.float32).tiny)
        logits = (logits - logits.amax(-1, keepdim=True)) / divisor
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            largest, ids = logits.topk(self.top_k)
            logits = torch.full_like(logits, -torch.inf).scatter_(-1, ids, largest)
        probabilities = softmax(logits, -1)
        if self.top_p is not None and self.top_p < 1:  # 1 would leave tokens out because of rounding
            descending, ids = probabilities.sort(dim=-1, descending=True, stable=True)
            # A token is in the nucleus if those before it have less than top_p; the first always is.
            mass_before = descending.cumsum(-1) - descending
            in_nucleus = mass_before < self.top_p
            in_nucleus[..., 0] = True
            nucleus = torch.zeros_like(probabilities).scatter_(-1, ids, descending * in_nucleus)
            probabilities = nucleus / nucleus.sum(-1, keepdim=True)
        if self.min_p is not None:
            is_kept = probabilities >= self.min_p * probabilities.amax(-1, keepdim=True)
            probabilities = probabilities.where(is_kept | probabilities.isnan(), 0)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities

    def draw(
        self, logits: Float[Tensor, " batch vocab_size"], generator: torch.Generator | None = None
    ) -> Int64[Tensor, " batch"]:
        """Draw the next token of each sequence; `NO_TOKEN` where a logit is NaN, or none is finite."""
        if self.temperature == 0:  # as `probabilities` would have it, without a pass over the vocabulary for each step
            return logits.argmax(-1).where(~logits.isnan().any(-1), NO_TOKEN)
        probabilities = self.probabilities(logits)
        is_finite = probabilities.isfinite().all(-1)
        # torch could not draw from NaN: it would raise its own error, which on a GPU stops the process.
        drawable = probabilities.where(is_finite.unsqueeze(-1), 1.0)
        return torch.multinomial(drawable, 1, generator=generator).squeeze(-1).where(is_finite, NO_TOKEN)


def next_token_probabilities(
    logits: Float[Tensor, " ... vocab_size"], **sampling: Any
) -> Float[Tensor, " ... vocab_size"]:
    """The distribution that the next token is drawn from.

    Args:
        logits: the model's scores.
        sampling: fields of `Sampling`; the penalties, which need the tokens so far, have no effect.

    Returns:
        Probabilities in at least float32, which sum to one along the last dimension.
    """
    return Sampling(**sampling).probabilities(logits)


@overload
def generate(
    model: TransformerLM,
    prompts: Iterable[Ids] | np.ndarray | Tensor,
    max_new_tokens: int,
    *,
    num_samples: int = 1,
    log_probabilities: Literal[False] = False,
    end_id: int | None = None,
    vocab_size: int | None = None,
    use_cache: bool = True,
    **sampling: Any,
) -> list[list[int]]: ...


@overload
def generate(
    model: TransformerLM,
    prompts: Iterable[Ids] | np.ndarray | Tensor,
    max_new_tokens: int,
    *,
    num_samples: int = 1,
    log_probabilities: Literal[True],
    end_id: int | None = None,
    vocab_size: int | None = None,
    use_cache: bool = True,
    **sampling: Any,
) -> tuple[list[list[int]], list[list[float]]]: ...


def generate(
    model: TransformerLM,
    prompts: Iterable[Ids] | np.ndarray | Tensor,
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

    On a GPU, single steps use the kernels of `basic.generation.decoder` if those support the model, which then keeps
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
        TypeError: the prompts are not sequences of integers.
        InvalidInputError: a prompt is empty, or a setting is out of its range.
        WrongTokenizerError: a prompt has an id that the model does not have.
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


def _prompt_lists(prompts: Iterable[Ids] | np.ndarray | Tensor, vocab_size: int) -> list[list[int]]:
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


# The last decoder of each model, with its copy of the weights, its cache and its graphs: a second call begins sooner.
_idle_decoders: WeakKeyDictionary[TransformerLM, Decoder] = WeakKeyDictionary()
_MAX_IDLE_BYTES = 2**29  # of keys; larger caches are for many sequences, whose decoding takes longer than a beginning


@torch.inference_mode()  # as the steps: what is made in this mode can only be changed in it
def make_decoder(
    model: TransformerLM, cache: KVCache, prompt_lengths: Tensor, vocab_size: int | None
) -> Decoder | None:
    """The kernels for single steps, or None if they do not support the model."""
    if (idle := _idle_decoders.pop(model, None)) is not None and idle.restart(model, cache, prompt_lengths, vocab_size):
        return idle
    config = model.config
    supported = config.norm == "pre" and config.positions == "rope" and config.qk_norm != "all_heads"
    if not supported or not dispatch.supports_decoding(cache.keys[0]):
        dispatch.warn_about_plain_decoding(supported, cache.keys[0])
        return None
    from basic.generation.decoder import Decoder  # imported late: it needs Triton

    return Decoder(model, cache, prompt_lengths, vocab_size)


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
    make_decoder: Callable[..., Any] = make_decoder,
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
    cache, decoder, cpu_decoder = None, None, None
    if use_cache and (cpu_decoder := make_cpu_decoder(model, len(prompts))) is not None:
        cache = cpu_decoder.cache
    elif use_cache:
        cache = KVCache(model.config, len(prompts), dtype=model.compute_dtype, device=device)
        decoder = make_decoder(model, cache, prompt_lengths, vocab_size)
        cache = cache if decoder is None else decoder.cache

    @torch.inference_mode()  # not around the loop: the mode would be on in the caller's code between two steps
    def extend(length: int) -> int:
        """Fill in `tokens[:, length]`, and with greedy decoding some columns after it; return the new length."""
        first = first_seen(length, context)
        if cache is not None and cache.length >= length - first:  # the first ids are dropped
            cache.length = 0
            if decoder is not None:
                decoder.prompt_lengths.fill_(length - first)  # known ids, which are read and not chosen
        if decoder is not None and not needs_logits and decoder.cache.length == length - first - 1:
            return first + _decode_greedily(decoder, tokens[:, first:], length - first, steps_per_read)
        logits = penalized = _next_logits(model, tokens[:, first:length], cache, decoder, cpu_decoder)
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
    if decoder is not None and decoder.cache.keys.nbytes <= _MAX_IDLE_BYTES:
        _idle_decoders[model] = decoder
    if cpu_decoder is not None:
        cpu_decoder.finish()


def first_seen(length: int, context: int) -> int:
    """The index of the first of `length` ids that the model sees: 0 as long as the context has room for all.

    When it is full, it begins again with its last half, so that half of it is computed once for each half of new ids.
    To drop one id a step would change the position of every other, and so compute the whole context for each id.
    """
    dropped_at_once = context - context // 2
    return -(-max(0, length - context) // dropped_at_once) * dropped_at_once


def _decode_greedily(decoder: Decoder, tokens: Int[Tensor, " batch total"], length: int, steps: int) -> int:
    """Fill in up to `steps` columns from `length` on, without waiting for the GPU; return the new length."""
    decoder.start(tokens)
    end = min(length + steps, tokens.shape[1], decoder.tokens.shape[1])
    for _ in range(length, end):
        decoder.step()
    tokens[:, length:end] = decoder.tokens[:, length:end]
    return end


def _next_logits(
    model: TransformerLM,
    tokens: Int[Tensor, " batch length"],
    cache: KVCache | None,
    decoder: Decoder | None,
    cpu_decoder: CpuDecoder | None,
) -> Float[Tensor, " batch vocab_size"]:
    """The logits of the token after the last one."""
    if cache is None:
        return model(tokens)[:, -1]
    new = tokens[:, cache.length :]
    if decoder is not None and new.shape[1] <= _MAX_REPLAYED_PROMPT:
        decoder.start(tokens)
        for _ in range(new.shape[1]):
            decoder.step()
        return decoder.logits
    if decoder is not None and cache.length == 0:
        return decoder.read_prompt(new)
    logits = model(new, cache)[:, -1] if cpu_decoder is None else cpu_decoder.logits(new)
    cache.advance(new.shape[1])
    return logits
