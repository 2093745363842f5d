"""How the next token is chosen, from the model's logits."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from basic.generation.settings import SamplingSettings
from basic.transformer.functional import at_least_float32, softmax

NO_TOKEN = -1
"""Stands for a token that cannot be chosen, because the logits are not finite; see also `decode_kernels.choose`."""


class Sampling(SamplingSettings):
    """How the next token is chosen: the settings, and what they do to logits.

    Source: Holtzman et al. 2019 (top-p); Fan et al. 2018 (top-k); Nguyen et al. 2024 (min-p); Keskar et al. 2019
    (repetition penalty).
    """

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
            largest, ids = logits.max(-1)
            return ids.where(largest > -torch.inf, NO_TOKEN)
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
