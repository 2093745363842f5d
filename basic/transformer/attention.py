"""What causal attention is computed with, besides features and matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """The options of `functional.causal_self_attention`, which the model, `dispatch` and the kernels share."""

    num_heads: int
    """Number of query heads."""
    rope: tuple[Float[Tensor, "... seq half"], Float[Tensor, "... seq half"]] | None = None
    """Cosines and sines of each token's angles, which broadcast against the leading dimensions of x; None for no
    rotation."""
    window: int | None = None
    """Number of keys that a query may attend to, its own included; None for all before it."""
    document_starts: Int[Tensor, "... seq"] | None = None
    """Index of the first token of each token's document, before which it does not attend; None if a sequence is one
    document. RoPE sees the difference of two positions only, so that they need not start again."""
    change_heads: Callable[[Tensor], Tensor] | None = None
    """Takes the projections (..., seq, head, d), heads of queries, then of keys, then of values, and returns what RoPE
    and attention are to use instead, such as with biases and norms."""
    extend_cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """Takes the new keys and values (..., kv head, seq, d) and returns them behind those of earlier tokens; None if
    nothing is cached."""
    num_cached: int = 0
    """Number of these earlier tokens."""
    fp8: Any = None
    """The `Fp8Matrix` of the three matrices, which multiplies in 8 bits; None for the dtype of x."""
