"""How the next token is chosen, as settings: this module needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from basic.common.config_files import check_fields
from basic.common.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """The fields of `basic.generation.sampling.Sampling`, which `generate`, `complete` and `stream` take too.

    Raises:
        TypeError: a setting is not a number.
        InvalidInputError: a setting is out of its range.
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
